"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): a router gives each token k of E small MLPs. None is dropped
unless a capacity is set.

E experts  D width of what they see: the model's, or `latent`  F hidden width of an expert  R latent width
C tokens of a device  J the k experts of a token  P = C * J pairs of a token and an expert, sorted by expert

Weights: w_router_DE, b_router_E, select_bias_E; of the experts w_up_EDF, w_gate_EDF, w_down_EFD, b_up_EF, b_gate_EF and
b_down_ED; shared.<an Mlp's>, w_shared_gate_D; w_latent_in_DR, w_latent_out_RD. Of these, the ones that the spec asks for.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.layers.mlp import Mlp, MlpSpec, hidden
from maxlm.layers.norm import NormSpec
from maxlm.layers.param import constant, normal
from maxlm.layers.router import RouterStats, route, router_logits, router_stats
from maxlm.layers.rows import Rows
from maxlm.ops import exchange as ops
from maxlm.ops.einsum import einsum, row_major, scatter, split_axes
from maxlm.ops.grouped_matmul import bias_of_rows, grouped_matmul, grouped_matmuls
from maxlm.sharding import axes, axis_size
from maxlm.sharding import spec as shard

ROUTER = ('w_router_DE', 'b_router_E', 'select_bias_E')
EXPERTS = ('w_up_EDF', 'w_gate_EDF', 'w_down_EFD', 'b_up_EF', 'b_gate_EF', 'b_down_ED')


@dataclasses.dataclass(kw_only=True, slots=True)
class MoeSpec:
  """experts: the MLP that each of n_experts is; a token gets k of them. shared: an MLP that all tokens get; shared_gate: it
  is multiplied by a sigmoid of the token (Qwen3-Next). latent: the experts work on a projection of that width (Nemotron 3).

  score: of the router's logits. router_bias: added to them (gpt-oss). select_bias: added to the scores where experts are
  selected and not where they are weighted (arXiv 2408.15664); it has no gradient. groups, groups_kept: experts come from
  the groups_kept groups, of `groups` of neighbours, whose two best scores have the highest sum (DeepSeek-V3, arXiv
  2412.19437). normalise: the weights of a token's experts sum to 1. scale: of these weights, last.
  """

  n_experts: int
  k: int
  experts: MlpSpec
  shared: MlpSpec | None = None
  shared_gate: bool = False
  latent: int | None = None
  score: Literal['softmax', 'sigmoid'] = 'softmax'
  router_bias: bool = False
  select_bias: bool = False
  groups: int = 1
  groups_kept: int = 1
  normalise: bool = True
  scale: float = 1.0

  def check(self, where: str) -> None:
    """ValueError, beginning with `where`, for what has no meaning."""
    self.experts.check(f'{where}.experts')
    if self.experts.activation == 'xielu':
      raise ValueError(f"{where}.experts.activation='xielu' has scalars that are learned for a layer, not for an expert")
    if self.experts.out_scale != 1.0:
      raise ValueError(f'{where}.experts.out_scale={self.experts.out_scale}: set {where}.scale instead')
    if self.shared is not None:
      self.shared.check(f'{where}.shared')
    elif self.shared_gate:
      raise ValueError(f'{where}.shared_gate=True needs a shared MLP to act on')
    if self.latent is not None and self.latent < 1:
      raise ValueError(f'{where}.latent={self.latent} must be at least 1 (None: no projection)')
    if self.score not in ('softmax', 'sigmoid'):
      raise ValueError(f'{where}.score={self.score!r} is neither softmax nor sigmoid')
    if self.groups < 1 or self.n_experts % self.groups or self.groups > 1 and self.n_experts // self.groups < 2:
      raise ValueError(f'{where}.groups={self.groups} does not divide n_experts={self.n_experts} into groups of two or more')
    if not 1 <= self.groups_kept <= self.groups:
      raise ValueError(f'{where}.groups_kept={self.groups_kept} must be from 1 to groups={self.groups}')
    choices = self.n_experts // self.groups * self.groups_kept
    if not 1 <= self.k <= choices:
      raise ValueError(f'{where}.k={self.k} must be from 1 to {choices}, the experts that it selects from')

  def split_dims(self) -> dict[str, tuple[str, int]]:
    dims = {'n_experts': ('E', self.n_experts), 'experts.d_ff': ('F', self.experts.d_ff)}
    if self.shared is not None:
      dims['shared.d_ff'] = 'F', self.shared.d_ff
    if self.latent is not None:
      dims['latent'] = 'D', self.latent
    return dims

  def matmul_params(self, d_model: int) -> int:
    """Of the experts only the k that a token gets."""
    total = d_model * self.n_experts + self.k * self.experts.matmul_params(self.latent or d_model)
    if self.latent is not None:
      total += 2 * d_model * self.latent
    if self.shared is not None:
      total += self.shared.matmul_params(d_model) + d_model * self.shared_gate
    return total

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Moe':
    return Moe(self, d_model, rngs)


class Moe(nnx.Module):
  """Weights of a mixture of experts; the spec says how they are used."""

  def __init__(self, spec: MoeSpec, d_model: int, rngs: nnx.Rngs):
    E, D, F, R = spec.n_experts, spec.latent or d_model, spec.experts.d_ff, spec.latent
    EDF, EFD, EF, ED = (stored(dims, E) for dims in ('EDF', 'EFD', 'EF', 'ED'))
    self.w_router_DE = normal(rngs, 'DE', (d_model, E), d_model**-0.5)
    if spec.router_bias:
      self.b_router_E = constant('E', (E,), 0.0)
    if spec.select_bias:
      self.select_bias_E = constant('E', (E,), 0.0)
    self.w_up_EDF = normal(rngs, EDF, (E, D, F), D**-0.5)
    if spec.experts.gated:
      self.w_gate_EDF = normal(rngs, EDF, (E, D, F), D**-0.5)
    self.w_down_EFD = normal(rngs, EFD, (E, F, D), F**-0.5)
    if spec.experts.bias:
      self.b_up_EF = constant(EF, (E, F), 0.0)
      if spec.experts.gated:
        self.b_gate_EF = constant(EF, (E, F), 0.0)
      self.b_down_ED = constant(ED, (E, D), 0.0)
    if spec.latent is not None:
      self.w_latent_in_DR = normal(rngs, 'DR', (d_model, R), d_model**-0.5)
      self.w_latent_out_RD = normal(rngs, 'RD', (R, d_model), R**-0.5)
    if spec.shared is not None:
      self.shared = Mlp(spec.shared, d_model, rngs)
      if spec.shared_gate:
        self.w_shared_gate_D = normal(rngs, 'D', (d_model,), d_model**-0.5)

  def __call__(self, spec: MoeSpec, x_BTD: jax.Array, rows: Rows, run=None) -> tuple[jax.Array, RouterStats]:
    """(output, what the router did). Experts leave padding at zero. run: the reference `every_expert`, where each device has
    all experts."""
    u_BTD = x_BTD if spec.latent is None else einsum('BTD,DR->BTR', x_BTD, self.w_latent_in_DR[...])
    router, experts = ({name: getattr(self, name)[...] for name in names if hasattr(self, name)}
                       for names in (ROUTER, EXPERTS))

    def island(x_BTD, u_BTD, segment_ids_BT, router, experts):
      x_CD, u_CD = x_BTD.reshape(-1, x_BTD.shape[-1]), u_BTD.reshape(-1, u_BTD.shape[-1])
      with jax.named_scope('router'):
        router = {name: _whole(_dims(name), axes('BT'), jnp.float32, w) for name, w in router.items()}
        logits_CE = router_logits(x_CD, router['w_router_DE'], router.get('b_router_E'))
        weights_CJ, experts_CJ, scores_CE = route(spec, logits_CE, router.get('select_bias_E'), rows.dispatch.balanced)
        chosen_CJ = jnp.where(segment_ids_BT.reshape(-1, 1) > 0, experts_CJ, spec.n_experts)
        kept_CJ = _within_capacity(spec, rows.dispatch, chosen_CJ)
        stats = router_stats(logits_CE, scores_CE, chosen_CJ, jnp.sum(kept_CJ != chosen_CJ, axis=1), segment_ids_BT > 0)
      with jax.named_scope('experts'):
        others = tuple(axis for axis in axes('BT') if axis not in axes('E'))
        experts = {name: _whole(stored(_dims(name), spec.n_experts), others, u_CD.dtype, w)
                   for name, w in experts.items()}
        if 'b_down_ED' in experts:
          experts['b_down_ED'] = jnp.where(jax.lax.axis_index(axes('F')) == 0, experts['b_down_ED'], 0)
      u_CD, weights_CJ = jax.lax.pcast((u_CD, weights_CJ), axes('F'), to='varying')  # here, where they are C rows and not P
      y_CD = (run or _here_or_there(spec, rows.dispatch))(spec.experts, experts, u_CD, weights_CJ, kept_CJ)
      with jax.named_scope('combine'):
        return jax.lax.psum(y_CD, axes('F')).reshape(u_BTD.shape), stats

    y_BTD, stats = jax.shard_map(
      island, in_specs=(shard('BTD'), shard('BTD'), shard('BT'),
                        {name: shard(_dims(name)) for name in router},
                        {name: shard(stored(_dims(name), spec.n_experts)) for name in experts}),
      out_specs=(shard('BTD'), RouterStats(*(shard(_dims(name)) for name in RouterStats._fields))))(
        x_BTD, u_BTD, jax.reshard(rows.segment_ids_BT, shard('BT')), router, experts)
    if spec.latent is not None:
      y_BTD = einsum('BTR,RD->BTD', y_BTD, self.w_latent_out_RD[...])
    if spec.shared is not None:
      shared_BTD = self.shared(spec.shared, x_BTD)
      if spec.shared_gate:
        shared_BTD *= jax.nn.sigmoid(einsum('BTD,D->BT', x_BTD, self.w_shared_gate_D[...]))[:, :, None]
      y_BTD += shared_BTD
    return y_BTD, stats


# -- inside the island: what the experts make of a device's tokens, by three ways to one result ---------------------------
# F is this device's part of it: the results are summed over the axes of F, and b_down_ED is zero on all parts but one.
# experts_CJ is n_experts where no expert is to work on the pair.


def _here_or_there(spec: MoeSpec, dispatch: ops.Dispatch):
  """The way for this mesh: all experts are on each device, or tokens are exchanged."""
  devices = axis_size('E')
  if devices == 1:
    return functools.partial(sorted_experts, kernel=dispatch.kernel)
  way = {'gather': gathered_experts, 'all_to_all': sent_experts}[dispatch.exchange or ops.exchange_for(spec.k, devices)]
  return functools.partial(way, capacity=dispatch.capacity, kernel=dispatch.kernel)


def _within_capacity(spec, dispatch, experts_CJ):
  devices = axis_size('E')
  rows = functools.partial(ops.buffer_rows, *experts_CJ.shape, devices, spec.n_experts // devices)
  if dispatch.capacity is None or rows(dispatch.capacity) == rows(None):
    return experts_CJ
  return ops.within_capacity(experts_CJ, spec.n_experts, rows(dispatch.capacity))


def sorted_experts(spec: MlpSpec, w: dict[str, jax.Array], x_CD, weights_CJ, experts_CJ, kernel, rows=None) -> jax.Array:
  """The weighted sum [C, D] of the outputs of each token's experts, those of w: rows of pairs, sorted by expert. rows: of a
  round."""
  rows = experts_CJ.size if rows is None else rows
  with jax.named_scope('dispatch'):
    order = ops.sort_pairs(experts_CJ, w['w_up_EDF'].shape[0], -(-experts_CJ.size // rows) * rows)

  def of_order(order, args):
    x_CD, weights_CJ, w = args
    with jax.named_scope('dispatch'):
      x_RD, weights_R1 = ops.to_rows(x_CD, order), ops.weights_of_rows(weights_CJ, order)
    y_RD = sorted_mlp(spec, w, x_RD, weights_R1, order.sizes_E, kernel)
    with jax.named_scope('combine'):
      return ops.from_rows(y_RD, order)

  if rows == experts_CJ.size:
    return of_order(order, (x_CD, weights_CJ, w))
  return ops.in_rounds(lambda i, order, args: of_order(ops.order_of_round(order, i, rows), args),
                       ops.n_rounds(order.sizes_E, rows), order, (x_CD, weights_CJ, w))


def gathered_experts(spec: MlpSpec, w: dict[str, jax.Array], x_CD, weights_CJ, experts_CJ, kernel, capacity) -> jax.Array:
  """The same where the experts are on several devices: each gets the tokens of all, and the sum of what all make of them is
  scattered to where they came from."""
  experts, devices = w['w_up_EDF'].shape[0], axis_size('E')
  tokens, k = experts_CJ.shape
  with jax.named_scope('dispatch'):
    x_CD, weights_CJ, experts_CJ = (row_major(jax.lax.all_gather(a, axes('E'), tiled=True))
                                    for a in (x_CD, weights_CJ, experts_CJ))
    mine_CJ = experts_CJ - experts * jax.lax.axis_index(axes('E'))
    mine_CJ = jnp.where((mine_CJ >= 0) & (mine_CJ < experts), mine_CJ, experts)
  y_CD = sorted_experts(spec, w, x_CD, weights_CJ, mine_CJ, kernel, ops.round_rows(tokens, k, devices, experts, capacity))
  with jax.named_scope('combine'):
    return row_major(jax.lax.psum_scatter(row_major(y_CD), axes('E'), tiled=True))


def sent_experts(spec: MlpSpec, w: dict[str, jax.Array], x_CD, weights_CJ, experts_CJ, kernel, capacity) -> jax.Array:
  """The same by all-to-all: each pair's row goes to the device of its expert, and its output comes back."""
  (experts, *_), devices = w['w_up_EDF'].shape, axis_size('E')
  rows, most = (n(*experts_CJ.shape, devices, experts, capacity) for n in (ops.round_rows, ops.buffer_rows))
  with jax.named_scope('dispatch'):
    order = ops.sort_pairs(experts_CJ, experts * devices, experts_CJ.size)
    slices = ops.slices_of(order.sizes_E)
    there_RD, weights_R1 = (ops.exchange(a, slices, -(-most // rows) * rows) for a in (
      ops.to_rows(x_CD, order), ops.weights_of_rows(weights_CJ, order)))

  def of_round(i, sizes_E, args):
    there_RD, weights_R1, w = args
    here = (jax.lax.dynamic_slice_in_dim(a, i * rows, rows) for a in (there_RD, weights_R1))
    y_RD = sorted_mlp(spec, w, *here, ops.sizes_of_round(sizes_E, i, rows), kernel)
    return jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(there_RD), y_RD, i * rows, axis=0)

  got_E = slices.got_XL.sum(axis=0)
  y_RD = (sorted_mlp(spec, w, there_RD, weights_R1, got_E, kernel) if rows == most else
          ops.in_rounds(of_round, ops.n_rounds(got_E, rows), got_E, (there_RD, weights_R1, w)))
  with jax.named_scope('combine'):
    return ops.from_rows(ops.exchange(y_RD, slices.back(), experts_CJ.size), order)


def sorted_mlp(spec: MlpSpec, w: dict[str, jax.Array], x_RD, weights_R1, sizes_E, kernel) -> jax.Array:
  """Each row through the expert it belongs to, times its weight -> [R, D]; rows past the sum of sizes_E are undefined.

  The hidden layer is multiplied by the weights, in fp32, not what comes out: then the gradient needs no outputs.
  """
  with jax.named_scope('experts'):
    ws_EDF, biases_EF = _into(w)
    ins_RF = checkpoint_name(grouped_matmuls(x_RD, ws_EDF, sizes_E, biases_EF, kernel=kernel), 'experts_in')
    hidden_RF = (hidden(spec, *ins_RF).astype(jnp.float32) * weights_R1).astype(x_RD.dtype)
    y_RD = grouped_matmul(hidden_RF, w['w_down_EFD'], sizes_E, kernel=kernel)
    return y_RD + bias_of_rows(w['b_down_ED'], sizes_E, weights_R1) if 'b_down_ED' in w else y_RD


def every_expert(spec: MlpSpec, w: dict[str, jax.Array], x_CD, weights_CJ, experts_CJ) -> jax.Array:
  """What they are to equal, as it is defined: every expert on every token, times a weight that is mostly zero."""
  E = w['w_up_EDF'].shape[0]

  def project(dims, x, w_EDF, b_EF):
    y_ECF = jnp.einsum(dims, x, w_EDF)
    return y_ECF if b_EF is None else y_ECF + b_EF[:, None]

  hidden_ECF = hidden(spec, *(project('CD,EDF->ECF', x_CD, *into) for into in zip(*_into(w))))
  y_ECD = project('ECF,EFD->ECD', hidden_ECF, w['w_down_EFD'], w.get('b_down_ED'))
  weights_CE = jnp.einsum('CJ,CJE->CE', weights_CJ, jax.nn.one_hot(experts_CJ, E))
  return jnp.einsum('ECD,CE->CD', y_ECD, weights_CE).astype(x_CD.dtype)


def _into(w: dict[str, jax.Array]) -> tuple[tuple, tuple]:
  """Weights and biases into the hidden layer: of up and, if there is one, of the gate."""
  names = [name for name in ('up', 'gate') if f'w_{name}_EDF' in w]
  return tuple(w[f'w_{name}_EDF'] for name in names), tuple(w.get(f'b_{name}_EF') for name in names)


def stored(dims: str, n_experts: int) -> str:
  """Letters by which a weight of experts is split where it is stored: experts over fsdp too ('ZDF' for 'EDF') where there
  are enough of them, so that whole matrices travel; else the width. A part of a matrix that is no multiple of a TPU's tile
  is copied into another layout after each gather and before each scatter."""
  return dims.replace('E', 'Z') if n_experts % axis_size('Z') == 0 else dims


def _dims(name: str) -> str:
  """'w_up_EDF' -> 'EDF'."""
  return name.rsplit('_', 1)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _whole(dims, summed, dtype, w):
  """Inside an island: the weight cast, then gathered over those of the mesh axes `summed` that split it; on the others of
  them different tokens meet the same part. Its gradient is the sum over all of these."""
  split = [tuple(axis for axis in split_axes(dims, i) if axis in summed) for i in range(w.ndim)]
  w = jax.lax.pcast(w.astype(dtype), tuple(axis for axis in summed if axis not in sum(split, ())), to='varying')
  for i, of_dim in enumerate(split):
    w = jax.lax.all_gather(w, of_dim, axis=i, tiled=True) if of_dim else w
  return w


_whole.defvjp(lambda dims, summed, dtype, w: (_whole(dims, summed, dtype, w), jnp.zeros((), w.dtype)),
              lambda dims, summed, dtype, like, dw: (scatter(dims, dw, summed).astype(like.dtype),))
