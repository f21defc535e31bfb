"""Makes the texts in this directory: small programs compiled ahead of time for slices of TPUs, with JAX and libtpu.

    python tests/hlo/make.py [NAME …]

What names files of the machine or fills pages, stack frames and the code of kernels, is left out.
"""

import os
import re
import sys
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import jax
import jax.numpy as jnp

from maxlm.compiler import options
from maxlm.plan.topology import parse
from maxlm.sharding import MeshConfig, axes, make_mesh, spec

WIDTH, LAYERS = 256, 6


def array(mesh, shape, parts, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, parts))


def layers_scan(mesh, scatter_at_once, width=1024, rows=8):
  """A scan of layers, each with a gathered weight whose gradient is scattered: what training a sharded model does."""
  def matmul(x_BD, w_DF):
    @jax.custom_vjp
    def product(x_BD, w_DF):
      return x_BD @ gathered(w_DF)

    def gathered(w_DF):
      return jax.lax.all_gather(w_DF, axes('D'), axis=0, tiled=True)

    def backward(saved, dy_BF):
      x_BD, w_DF = saved
      dw_DF = x_BD.T @ dy_BF
      for axis in [axes('D')] if scatter_at_once else axes('D'):
        dw_DF = jax.lax.psum_scatter(dw_DF, axis, scatter_dimension=0, tiled=True)
      return dy_BF @ gathered(w_DF).T, dw_DF

    product.defvjp(lambda x_BD, w_DF: (product(x_BD, w_DF), (x_BD, w_DF)), backward)
    return product(x_BD, w_DF)

  def loss(w_LDF, x_BD):
    x_BD, _ = jax.lax.scan(lambda x_BD, w_DF: (jnp.tanh(matmul(x_BD, w_DF)), None), x_BD, w_LDF)
    return jnp.sum(x_BD.astype(jnp.float32))

  island = jax.shard_map(jax.grad(loss), in_specs=(spec('LDF'), spec('BD')), out_specs=spec('LDF'), check_vma=False)
  weights = array(mesh, (LAYERS, width, width), spec('LDF'))
  return island, (weights, array(mesh, (rows * mesh.devices.size, width), spec('BD')))


def neighbours(mesh):
  """Each device of a ring hands its rows on to the next."""
  ring = [(i, (i + 1) % 4) for i in range(4)]
  island = jax.shard_map(lambda x: jax.lax.ppermute(x, axes('F')[0], ring) * 2, in_specs=spec('FK'), out_specs=spec('FK'))
  return island, (array(mesh, (4 * WIDTH, WIDTH), spec('FK')),)


def all_to_all(mesh):
  """Rows to the devices of another axis, as tokens to their experts."""
  send = lambda x: jax.lax.all_to_all(x, axes('E')[0], 0, 0, tiled=True)
  island = jax.shard_map(send, in_specs=spec('EK'), out_specs=spec('EK'))
  return island, (array(mesh, (64, WIDTH), spec('EK')),)


def product(mesh):
  """A product whose weight is gathered by the compiler."""
  def f(x_BD, w_DF):
    return jnp.einsum('BD,DF->BF', x_BD, jax.reshard(w_DF, jax.P(None, None)), out_sharding=spec('BF'))
  return f, (array(mesh, (4096, 1024), spec('BD')), array(mesh, (1024, 4096), spec('DF')))


def attention(mesh):
  """Splash attention, forward and backward, under a window."""
  from maxlm.ops.attention import attention as op
  def f(q, k, v, segments):
    return jax.grad(lambda q: op(q, k, v, segments, window=128, scale=0.1, kernel='splash').astype(jnp.float32).sum())(q)
  heads = lambda n, dims: array(mesh, (4, 512, n, 128), spec(dims))
  return f, (heads(4, 'BTNH'), heads(2, 'BSKH'), heads(2, 'BSKH'), array(mesh, (4, 512), spec('BT'), jnp.int32))


PROGRAMS = {
  'scan_v5p': ('v5p:4x4x4', {}, lambda mesh: layers_scan(mesh, False), {}),
  'scan_v6e_sparse_core': ('v6e:16x16', {}, lambda mesh: layers_scan(mesh, True, 4096, 1024),
                           options('TPU v6 lite')),
  'scan_v5e_fused': ('v5e:16x16', {}, lambda mesh: layers_scan(mesh, False, 4096, 1024), {}),
  'permute_v5e': ('v5e:2x2', {'tensor': 4, 'fsdp': 1}, neighbours, {}),
  'all_to_all_v5e': ('v5e:4x4', {'expert': 4, 'fsdp': 4}, all_to_all, {}),
  'product_v5p': ('v5p:2x2x1', {}, product, {}),
  'attention_v5p': ('v5p:2x2x1', {}, attention, {}),
}


def compiled(name: str) -> str:
  slice_name, sizes, make, compiler_options = PROGRAMS[name]
  mesh = make_mesh(MeshConfig(**sizes), parse(slice_name).devices())
  with jax.set_mesh(mesh):
    function, args = make(mesh)
    return jax.jit(function).lower(*args).compile(compiler_options=compiler_options).as_text()


def shortened(text: str) -> str:
  """Without what this machine put in, and without the code of kernels."""
  head, _, rest = text.partition('\n')
  body = re.search(r'^(?:%|ENTRY)', rest, re.MULTILINE)
  rest = re.sub(r' stack_frame_id=\d+', '', rest[body.start():])
  rest = re.sub(r'"body":"[^"]*"', '"body":""', rest)
  return f'{head}\n\n{rest}'


if __name__ == '__main__':
  for name in sys.argv[1:] or PROGRAMS:
    text = shortened(compiled(name))
    (HERE / f'{name}.txt').write_text(text)
    print(name, f'{len(text):,} characters')
