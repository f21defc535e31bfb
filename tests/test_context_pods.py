"""One attention layer of OLMo 3 7B's shape at 131,072 tokens over 16 devices, compiled for v5p:4x4x4: what travels, how
often its kernels run. Ahead of time: a CPU and libtpu are enough."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maxlm.layers.attention import AttentionSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import rope_table
from maxlm.layers.rows import Rows, rope_key
from maxlm.models.decoder import remat
from maxlm.plan import topology
from maxlm.sharding import MeshConfig, make_mesh
from maxlm.sharding import spec as shard

B, T, D, HEADS, HEAD_DIM, X = 4, 131_072, 4096, 32, 128, 16
CHUNK = T // (2 * X)
NORM = NormSpec()
BYTES = {'bf16': 2, 'f32': 4, 's32': 4}

pytestmark = pytest.mark.slow


@functools.cache
def compiled(window: int | None) -> str:
  """The program of the layer's gradients to its weights and input, remat 'attention', four rows over 4 x 16 devices."""
  spec = AttentionSpec(n_heads=HEADS, n_kv_heads=HEADS, head_dim=HEAD_DIM, window=window)
  key = rope_key(spec.rope, HEAD_DIM)

  def loss(module, x_BTD, ids_BT, positions_BT):
    rows = Rows(segment_ids_BT=ids_BT, positions_BT=positions_BT, kernel='splash', norm=NORM,
                rope={key: rope_table(positions_BT, spec.rope, HEAD_DIM)})
    layer = remat(lambda module, x_BTD: module(spec, x_BTD, rows), 'attention', scanned=False)
    return jnp.sum(jnp.square(layer(module, x_BTD).astype(jnp.float32)))

  mesh = make_mesh(MeshConfig(context=X), topology.parse('v5p:4x4x4').devices())
  with jax.set_mesh(mesh):
    def array(shape, dtype, dims):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, shard(dims)))

    module = jax.eval_shape(lambda: spec.build(D, NORM, nnx.Rngs(0)))
    ids = array((B, T), jnp.int32, 'BT')
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
      module, array((B, T, D), jnp.bfloat16, 'BTD'), ids, ids).compile().as_text()


def outputs(text: str, kind: str) -> list[tuple[str, int, str]]:
  """(dtype, elements, scope) of what each collective of a kind leaves on a device."""
  found = re.findall(rf' = \(?(\w+)\[([\d,]*)\][^=\n]*? {kind}(?:-start)?\(.*', text)
  lines = [line for line in text.splitlines() if re.search(rf' {kind}(-start)?\(', line)]
  assert len(found) == len(lines)
  scopes = [(re.search(r'op_name="([^"]*)"', line) or ['', ''])[1] for line in lines]
  return [(dtype, math.prod(map(int, dims.split(','))), scope) for (dtype, dims), scope in zip(found, scopes)]


def kernels(text: str) -> list[str]:
  """Names of the Mosaic kernels, in order."""
  return sorted(re.search(r'splash_mha_(fwd|dq|dkv)', line)[1] for line in text.splitlines() if '"tpu_custom_call"' in line)


@pytest.mark.parametrize('window', [4096, 1024])
def test_a_sliding_layer_receives_its_halo_and_no_sequence(window):
  text = compiled(window)
  received = outputs(text, 'collective-permute')
  assert all('/halo/' in scope for _, _, scope in received)

  def n_bytes(backward):
    return sum(BYTES[dtype] * n for dtype, n, scope in received if ('transpose' in scope) == backward)

  halo = 2 * (window - 1) * (2 * HEADS * HEAD_DIM * BYTES['bf16'] + BYTES['s32'])  # keys, values, ids before two chunks
  assert halo <= n_bytes(backward=False) <= 1.1 * halo
  assert 2 * halo <= n_bytes(backward=True) + 2 * 4 * window <= 1.1 * 2 * halo  # once more, and their gradients back
  weight = D * HEADS * HEAD_DIM
  for kind in ('all-gather', 'all-reduce', 'reduce-scatter'):
    assert all(n <= weight for _, n, _ in outputs(text, kind)), kind
  assert not re.search(rf'\[(\d+,)*({T}|{X},2,{CHUNK})[,\]]', text)
  assert kernels(text) == ['dkv', 'dq', 'fwd']


def test_a_full_layer_gathers_keys_and_values_and_runs_forward_once():
  text = compiled(None)
  sequence = T * HEADS * HEAD_DIM
  gathered = [scope for _, n, scope in outputs(text, 'all-gather') if n == sequence]
  assert len(gathered) == 4 and all('/gather_kv/' in scope for scope in gathered)  # keys, values; and backward
  assert kernels(text) == ['dkv', 'dq', 'fwd']
