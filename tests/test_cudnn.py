"""cuDNN's attention without a GPU: the layout of packed rows, and what is in the program.

Its numbers are compared with the reference's on a GPU, by tests/benchmarks/gpu.py.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mla import MlaSpec
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.ops import attention, cudnn
from maxlm.sharding import spec

ROWS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4], [1, 2, 1, 1, 3, 3, 3, 0]], np.int32)


def test_documents_are_runs_of_equal_ids():
  assert cudnn.documents(ROWS).tolist() == [4, 1, 5]


def test_the_packed_layout_has_each_document_once():
  length, offset = jax.jit(cudnn.layout, static_argnums=1)(ROWS, 6)
  assert length.tolist() == [[3, 2, 1, 2, -1, -1], [8, -1, -1, -1, -1, -1], [1, 1, 2, 3, 1, -1]]
  assert offset.tolist() == [[0, 3, 5, 6, -1, -1, -1], [0, -1, -1, -1, -1, -1, -1], [0, 1, 2, 4, 7, -1, -1]]


def test_jax_makes_of_the_layout_what_cudnn_wants():
  """Sequences one after another, each from where its first token is in memory: of 4 heads in q, of 2 in k and v."""
  length, offset = cudnn.layout(jnp.asarray(ROWS), 6)
  q, k = (jax.ShapeDtypeStruct((3, 8, heads, 16), jnp.bfloat16) for heads in (4, 2))
  q_length, k_length, q_offset, k_offset = fused_attention_stablehlo._fix_seqlen_offsets(
    length, length, offset, offset, q, k)
  lengths, starts = [3, 2, 1, 2, 8, 1, 1, 2, 3, 1], [0, 3, 5, 6, 8, 16, 17, 18, 20, 23]
  assert q_length.ravel()[:10].tolist() == k_length.ravel()[:10].tolist() == lengths
  assert (q_offset.ravel()[:10] // 64).tolist() == (k_offset.ravel()[:10] // 32).tolist() == starts
  assert not q_length.ravel()[10:].any()


@pytest.mark.parametrize('window', [None, 100])
def test_a_gpus_program_has_kernels_for_one_document_a_row_and_for_packed_rows(mesh_of, monkeypatch, window):
  """Lowered for a Hopper GPU that is not there: what JAX asks the machine is answered for it."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91300)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda capability: True)
  shapes = {'BTNH': (2, 128, 4, 16), 'BSKH': (2, 128, 2, 16)}
  with mesh_of(1):
    q, k, v = (jax.device_put(jnp.ones(shapes[dims], jnp.bfloat16), spec(dims)) for dims in ('BTNH', 'BSKH', 'BSKH'))
    segments = jax.device_put(np.ones((2, 128), np.int32), spec('BT'))
    run = functools.partial(attention.attention, kernel='cudnn', window=window, scale=0.25)
    gradient = jax.jit(jax.grad(lambda *qkv: run(*qkv, segments).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
    program = gradient.trace(q, k, v).lower(lowering_platforms=('cuda',)).as_text()
  assert sorted(re.findall(r'custom_call @(__cudnn\$\w+)\(', program)) == sorted(2 * [
    '__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'])
  said = lambda name: sorted(re.findall(rf'{name}\\22: (\w+|\\22\w+)', program))
  assert said('max_seg_per_batch') == ['1', '1', '32', '32']
  assert said('sliding_window_length') == 4 * [str(window or 0)]
  assert said('mask_type') == 2 * [r'\22CAUSAL'] + 2 * [r'\22PADDING_CAUSAL']
  assert 'case' in program


def test_a_gpu_has_cudnn_where_it_can_honour_the_model():
  def kernel(attention, **options):
    model = DecoderConfig(vocab_size=8, d_model=8, n_layers=2, pattern=(LayerSpec(mixer=attention, mlp=None),))
    return ComputeConfig(dtype=options.pop('dtype', None)).resolve('gpu', model, **options).kernel

  plain = AttentionSpec(n_heads=2, n_kv_heads=1, head_dim=64, window=7)
  latent = MlaSpec(n_heads=2, q_rank=None, kv_rank=8, nope_dim=128, rope_dim=64, v_dim=128)
  assert kernel(plain) == kernel(latent) == kernel(None) == 'cudnn'
  assert kernel(dataclasses.replace(plain, sinks=True)) == kernel(dataclasses.replace(plain, softcap=3.0)) == 'chunked'
  assert kernel(dataclasses.replace(latent, nope_dim=256)) == 'chunked'
  assert kernel(plain, dtype='float32') == kernel(plain, whole_rows=False) == 'chunked'
  assert ComputeConfig().resolve('tpu').kernel == 'splash' and ComputeConfig().resolve('cpu').kernel == 'chunked'


OK = dict(window=100, softcap=None, sinks=False, head_dim=128, seq_len=1000, dtype='bfloat16')


@pytest.mark.parametrize('change, message', [
  ({'sinks': True}, 'has no sinks'), ({'softcap': 30.0}, 'has no softcap'), ({'dtype': 'float32'}, 'not float32'),
  ({'head_dim': 264}, '256 at most, not 264'), ({'head_dim': 12}, 'multiple of 8'), ({'chunks': 4}, 'needs whole rows')])
def test_what_cudnn_cannot_honour_is_refused_in_one_line_that_names_chunked(change, message):
  attention.check_attention('cudnn', 'gpu', **OK)
  with pytest.raises(ValueError, match=f"'cudnn' .*{message}.*: use 'chunked'"):
    attention.check_attention('cudnn', 'gpu', **OK | change)
  with pytest.raises(ValueError, match="runs on gpu, not on tpu: use 'chunked'"):
    attention.check_attention('cudnn', 'tpu', **OK)
