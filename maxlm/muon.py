"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), scaled as
Moonlight does (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that AdamW's learning rate and decay hold for it too.

What is a matrix, its rows and its columns are read from a weight's name, in `rows_and_columns` and nowhere else. A device
cannot make its part of a matrix orthogonal: stacks are resharded so that each device has whole matrices of some layers, and
back (`with_whole_matrices`), one all-to-all for each dim that is split.

L layers  E experts  X the dims that are a matrix's rows and columns  M matrices: E * L, and padding  A rank of an adapter
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm.ops.einsum import in_and_out
from maxlm.sharding import axes

MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration: singular values come to 0.7 … 1.2
RMS = 0.2  # of AdamW's updates (Moonlight, section 2.2): those of an orthogonal matrix are 1 / sqrt(max(rows, columns))

# What AdamW has: how the last part of its name begins. Embeddings and the head, whose rows are tokens; norms, biases, gains,
# decays and other vectors; convolutions, a few taps for each channel; routers, each of whose columns is an expert's.
VECTORS = ('embed_', 'unembed_', 'positions_', 'scale_', 'bias_', 'b_', 'norm_scale_', 'sinks_', 'alpha_', 'a_log_',
           'dt_bias_', 'skip_', 'decay_', 'conv_', 'select_bias_', 'w_router_', 'w_shared_gate_', 'lora_magnitude')


def rows_and_columns(name: str) -> tuple[str, str] | None:
  """The dims that are the rows and the columns of a weight's matrices; None for what AdamW has. By its dotted name.

  'stacks.0.mixer.w_q_DNH' -> ('D', 'NH');  'stacks.0.mixer.w_o_NHD' -> ('NH', 'D');  'stacks.0.mlp.w_up_EDF' -> ('D', 'F'),
  a matrix an expert. All heads of a layer are one matrix, as in Moonlight; queries, keys and values are three,
  gates and ups two. ValueError for a name that is neither a matrix nor known to be none.
  """
  *_, parent, last = name.rsplit('.', 2) if '.' in name else ('', name)
  if last.startswith(VECTORS):
    return None
  weight = parent if last in ('lora_a', 'lora_b') else last
  dims = weight.rpartition('_')[2].removeprefix('E')
  if not weight.startswith('w_') or not dims.isupper() or len(dims) < 2:
    raise ValueError(f'muon does not know whether {name} is a matrix: name it w_…_<dims>, or add it to muon.VECTORS')
  rows, columns = in_and_out(dims)
  return {'lora_a': (rows, 'A'), 'lora_b': ('A', columns)}.get(last, (rows, columns))


def is_matrix(name: str) -> bool:
  """Whether Muon has this weight. Its update's size then follows from its shape, not from the gradient, so a wider model
  changes its learning rate by another rule than Adam's (`maxlm.parametrisation`)."""
  return rows_and_columns(name) is not None


class MuonState(NamedTuple):
  momentum: dict[str, jax.Array]  # of each matrix: a mean of its gradients, split as it is
  others: optax.OptState


def scale_by_muon(others: optax.GradientTransformation) -> optax.GradientTransformation:
  """Gradients, by name, to updates: of matrices with Nesterov momentum, orthogonal, of the RMS of AdamW's; `others` has the
  rest."""
  def init(weights):
    matrices, rest = apart(weights)
    return MuonState(optax.tree.zeros_like(matrices), others.init(rest))

  def update(grads, state, weights=None):
    del weights
    matrices, rest = apart(grads)
    momentum = {name: MOMENTUM * state.momentum[name] + (1 - MOMENTUM) * g for name, g in matrices.items()}
    ahead = {name: MOMENTUM * momentum[name] + (1 - MOMENTUM) * g for name, g in matrices.items()}
    updates, inner = others.update(rest, state.others)
    updates |= {name: orthogonalised(name, g) for name, g in ahead.items()}
    return {name: updates[name] for name in grads}, MuonState(momentum, inner)

  return optax.GradientTransformation(init, update)


def apart(weights: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """(matrices, the others)."""
  matrices = {name: w for name, w in weights.items() if is_matrix(name)}
  return matrices, {name: w for name, w in weights.items() if name not in matrices}


def orthogonalised(name: str, g: jax.Array) -> jax.Array:
  """Each matrix U S V' of a stack replaced by about U V', times RMS * sqrt(max(rows, columns)). Shape and sharding stay.

  g: fp32 [L, rows…, columns…], or of experts [L, E, rows…, columns…]; without L for a weight that is no stack.
  """
  rows, columns = rows_and_columns(name)
  experts = name.rpartition('_')[2].startswith('E')
  layers = g.ndim > experts + len(rows + columns)
  x_LEX = g if layers else g[None]
  x_ELX = jnp.swapaxes(x_LEX if experts else x_LEX[:, None], 0, 1)
  n_rows = math.prod(x_ELX.shape[2:2 + len(rows)])

  def orthogonal(x_MX):
    x_MDF = x_MX.reshape(x_MX.shape[0], n_rows, -1)  # D and F: whatever dims the rows and columns have
    return (RMS * math.sqrt(max(x_MDF.shape[1:])) * newton_schulz(x_MDF)).reshape(x_MX.shape)

  y_LEX = jnp.swapaxes(with_whole_matrices(orthogonal, x_ELX), 0, 1)
  y_LEX = y_LEX if experts else y_LEX[:, 0]
  return y_LEX if layers else y_LEX[0]


def newton_schulz(x_MDF: jax.Array) -> jax.Array:
  """U V' of each U S V', roughly: singular values above 0.2 % of the matrix's norm come to 0.7 … 1.2."""
  turned = x_MDF.shape[1] > x_MDF.shape[2]
  x = jnp.swapaxes(x_MDF, 1, 2) if turned else x_MDF
  x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-12
  a, b, c = COEFFICIENTS

  def step(_, x):
    xx = jnp.einsum('MDF,MCF->MDC', x, x)
    return a * x + jnp.einsum('MDC,MCF->MDF', b * xx + c * jnp.einsum('MDC,MCB->MDB', xx, xx), x)

  x = jax.lax.fori_loop(0, STEPS, step, x)
  return jnp.swapaxes(x, 1, 2) if turned else x


def with_whole_matrices(function, x_ELX: jax.Array) -> jax.Array:
  """`function` of matrices [M, …], each whole on a device and as evenly spread over the mesh as they are many, on [E, L, …].

  First the axes that split the weight share the matrices, then the others, for what each copy would compute alike. Where
  layers are not a multiple of the devices that share them, some devices have zeros in their place.
  """
  E, L, *shape = x_ELX.shape
  mesh, first = jax.sharding.get_abstract_mesh().shape, jax.typeof(x_ELX).sharding.spec
  sharing, parts = [], 1
  for axis in dict.fromkeys(axes('E') * (E > 1) + axes('DNKFETB')):
    if mesh[axis] > 1 and (parts < E * L or axis in axes('E') * (E > 1)):
      sharing.append(axis)
      parts *= mesh[axis]
  unit = parts // math.gcd(parts, E)
  padding = -L % unit
  x_ELX = jnp.pad(x_ELX, [(0, 0), (0, padding)] + [(0, 0)] * len(shape))
  x_MX = jax.lax.reshape(x_ELX, (E * (L + padding), *shape), out_sharding=jax.P(first[0], *first[2:]))
  specs = specs_to_whole(jax.typeof(x_MX).sharding.spec, sharing)
  for spec in specs[1:]:
    x_MX = jax.reshard(x_MX, spec)
  y_MX = function(x_MX)
  for spec in reversed(specs[:-1]):
    y_MX = jax.reshard(y_MX, spec)
  return jax.lax.reshape(y_MX, (E, L + padding, *shape), out_sharding=first)[:, :L]


def specs_to_whole(first: jax.P, sharing: list[str]) -> list[jax.P]:
  """Shardings from `first` to that which splits the first dim alone, over `sharing`: from one dim after another, then with
  the axes that split none, so that each change is one all-to-all, or a slice."""
  split = [list(s) if isinstance(s, tuple) else [s] if s else [] for s in first]
  specs, kept = [first], [axis for axis in split[0] if axis in sharing]
  for dim in (*split[1:], sharing):
    moved = [axis for axis in sharing if axis in dim and axis not in kept]
    kept += moved
    split = [kept, *([axis for axis in other if axis not in moved] for other in split[1:])]
    specs += [jax.P(*(tuple(axes_of) or None for axes_of in split))] if moved else []
  return [*specs, jax.P(tuple(kept) or None, *[None] * (len(first) - 1))]
