"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): a router gives each token k of E small MLPs. None is dropped.

E experts  D width of what they see: the model's, or `latent`  F hidden width of an expert  R latent width  G groups of E
C tokens of a device  J the k experts of a token  P = C * J pairs of a token and an expert, sorted by expert

Weights: w_router_DE, b_router_E, select_bias_E; of the experts w_up_EDF, w_gate_EDF, w_down_EFD, b_up_EF, b_gate_EF and
b_down_ED; shared.<an Mlp's>, w_shared_gate_D; w_latent_in_DR, w_latent_out_RD. Of these, the ones that the spec asks for.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.mlp import Mlp, MlpSpec, hidden
from maxlm.layers.norm import NormSpec
from maxlm.layers.param import constant, normal
from maxlm.ops.einsum import einsum
from maxlm.ops.grouped_matmul import grouped_matmul
from maxlm.sharding import axes
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
    self.w_router_DE = normal(rngs, 'DE', (d_model, E), d_model**-0.5)
    if spec.router_bias:
      self.b_router_E = constant('E', (E,), 0.0)
    if spec.select_bias:
      self.select_bias_E = constant('E', (E,), 0.0)
    self.w_up_EDF = normal(rngs, 'EDF', (E, D, F), D**-0.5)
    if spec.experts.gated:
      self.w_gate_EDF = normal(rngs, 'EDF', (E, D, F), D**-0.5)
    self.w_down_EFD = normal(rngs, 'EFD', (E, F, D), F**-0.5)
    if spec.experts.bias:
      self.b_up_EF = constant('EF', (E, F), 0.0)
      if spec.experts.gated:
        self.b_gate_EF = constant('EF', (E, F), 0.0)
      self.b_down_ED = constant('ED', (E, D), 0.0)
    if spec.latent is not None:
      self.w_latent_in_DR = normal(rngs, 'DR', (d_model, R), d_model**-0.5)
      self.w_latent_out_RD = normal(rngs, 'RD', (R, d_model), R**-0.5)
    if spec.shared is not None:
      self.shared = Mlp(spec.shared, d_model, rngs)
      if spec.shared_gate:
        self.w_shared_gate_D = normal(rngs, 'D', (d_model,), d_model**-0.5)

  def __call__(self, spec: MoeSpec, x_BTD: jax.Array, run=None) -> jax.Array:
    """Every device has all experts for its tokens. run: `sorted_experts` unless given, or `every_expert`, its reference."""
    u_BTD = x_BTD if spec.latent is None else einsum('BTD,DR->BTR', x_BTD, self.w_latent_in_DR[...])
    router, experts = ({name: getattr(self, name)[...] for name in names if hasattr(self, name)}
                       for names in (ROUTER, EXPERTS))

    def island(x_BTD, u_BTD, router, experts):
      router, experts = _whole(router, jnp.float32), _whole(experts, u_BTD.dtype)
      x_CD, u_CD = x_BTD.reshape(-1, x_BTD.shape[-1]), u_BTD.reshape(-1, u_BTD.shape[-1])
      logits_CE = router_logits(x_CD, router['w_router_DE'], router.get('b_router_E'))
      weights_CJ, experts_CJ, _ = route(spec, logits_CE, router.get('select_bias_E'))
      u_CD, weights_CJ = jax.lax.pcast((u_CD, weights_CJ), axes('F'), to='varying')  # here, where they are C rows and not P
      y_CD = (run or sorted_experts)(spec.experts, experts, u_CD, weights_CJ, experts_CJ)
      return jax.lax.psum(y_CD, axes('F')).reshape(u_BTD.shape)

    y_BTD = jax.shard_map(
      island, in_specs=(shard('BTD'), shard('BTD'), *({name: shard(_dims(name)) for name in w} for w in (router, experts))),
      out_specs=shard('BTD'))(x_BTD, u_BTD, router, experts)
    if spec.latent is not None:
      y_BTD = einsum('BTR,RD->BTD', y_BTD, self.w_latent_out_RD[...])
    if spec.shared is not None:
      shared_BTD = self.shared(spec.shared, x_BTD)
      if spec.shared_gate:
        shared_BTD *= jax.nn.sigmoid(einsum('BTD,D->BT', x_BTD, self.w_shared_gate_D[...]))[:, :, None]
      y_BTD += shared_BTD
    return y_BTD


def router_logits(x_CD: jax.Array, w_router_DE: jax.Array, b_router_E: jax.Array | None) -> jax.Array:
  """fp32 logits [C, E]. Unless told, an accelerator rounds fp32 factors to bf16: other experts where two are near."""
  logits_CE = jnp.dot(x_CD.astype(jnp.float32), w_router_DE, precision=jax.lax.Precision.HIGHEST)
  return logits_CE if b_router_E is None else logits_CE + b_router_E


def route(spec: MoeSpec, logits_CE: jax.Array, select_bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(weights [C, J] of each token's experts, their int32 numbers [C, J], scores [C, E]), from fp32 logits.

  There is no switch for a softmax over the selected logits alone (gpt-oss): it is that over all, normalised.
  """
  scores_CE = jax.nn.softmax(logits_CE) if spec.score == 'softmax' else jax.nn.sigmoid(logits_CE)
  choice_CE = jax.lax.stop_gradient(scores_CE if select_bias_E is None else scores_CE + select_bias_E)
  if spec.groups > 1:
    choice_CGE = choice_CE.reshape(-1, spec.groups, spec.n_experts // spec.groups)
    _, kept = jax.lax.top_k(jax.lax.top_k(choice_CGE, 2)[0].sum(axis=-1), spec.groups_kept)
    kept_CG1 = jax.nn.one_hot(kept, spec.groups, dtype=bool).any(axis=1)[..., None]
    choice_CE = jnp.where(kept_CG1, choice_CGE, -jnp.inf).reshape(choice_CE.shape)
  _, experts_CJ = jax.lax.top_k(choice_CE, spec.k)
  weights_CJ = jnp.take_along_axis(scores_CE, experts_CJ, axis=-1)
  if spec.normalise:  # families add 1e-20 or nothing: the same in fp32 for sums above 1e-11. 1e-20 has no square in fp32
    weights_CJ /= weights_CJ.sum(axis=-1, keepdims=True) + 1e-18
  return spec.scale * weights_CJ, experts_CJ, scores_CE


# -- what the experts make of a device's tokens: two ways to one result --------------------------------------------------
# F is this device's part of it: the results are summed over the axes of F, and b_down_ED is zero on all parts but one.


def sorted_experts(spec: MlpSpec, w: dict[str, jax.Array], x_CD, weights_CJ, experts_CJ) -> jax.Array:
  """The weighted sum [C, D] of the outputs of each token's experts: pairs of a token and an expert, sorted by expert."""
  C, J = experts_CJ.shape
  order_P = jnp.argsort(experts_CJ.reshape(-1))
  back_P = jnp.argsort(order_P)
  expert_P = experts_CJ.reshape(-1)[order_P]
  sizes_E = jnp.bincount(expert_P, length=w['w_up_EDF'].shape[0])

  def project(x_PD, w_EDF, b_EF):
    y_PF = grouped_matmul(x_PD, w_EDF, sizes_E)
    return y_PF if b_EF is None else y_PF + b_EF[expert_P]

  y_PD = _mlp(spec, w, project, _permuted(jnp.repeat(x_CD, J, axis=0), order_P, back_P))
  y_CJD = _permuted(y_PD, back_P, order_P).reshape(C, J, -1)
  return jnp.sum(y_CJD * weights_CJ[:, :, None], axis=1).astype(x_CD.dtype)


def every_expert(spec: MlpSpec, w: dict[str, jax.Array], x_CD, weights_CJ, experts_CJ) -> jax.Array:
  """The same as it is defined: every expert on every token, times a weight that is mostly zero."""
  E = w['w_up_EDF'].shape[0]

  def project(x_ECD, w_EDF, b_EF):
    y_ECF = jnp.einsum('ECD,EDF->ECF', x_ECD, w_EDF)
    return y_ECF if b_EF is None else y_ECF + b_EF[:, None]

  y_ECD = _mlp(spec, w, project, jnp.broadcast_to(x_CD, (E, *x_CD.shape)))
  weights_CE = jnp.einsum('CJ,CJE->CE', weights_CJ, jax.nn.one_hot(experts_CJ, E))
  return jnp.einsum('ECD,CE->CD', y_ECD, weights_CE).astype(x_CD.dtype)


def _mlp(spec, w, project, x):
  up = project(x, w['w_up_EDF'], w.get('b_up_EF'))
  gate = project(x, w['w_gate_EDF'], w.get('b_gate_EF')) if spec.gated else None
  return project(hidden(spec, up, gate), w['w_down_EFD'], w.get('b_down_ED'))


@jax.custom_vjp
def _permuted(x_PD, order_P, back_P):
  """x_PD[order_P], whose gradient is the inverse permutation, where JAX would add up row by row."""
  return x_PD[order_P]


_permuted.defvjp(lambda x_PD, order_P, back_P: (x_PD[order_P], back_P), lambda back_P, dy_PD: (dy_PD[back_P], None, None))


def _dims(name: str) -> str:
  """'w_up_EDF' -> 'EDF'."""
  return name.rsplit('_', 1)[1]


def _whole(weights: dict[str, jax.Array], dtype) -> dict[str, jax.Array]:
  """Inside an island: weights cast, then gathered over E and D; their gradients leave as scatters."""
  whole = {}
  for name, w in weights.items():
    dims = _dims(name)
    split = [(axis, i) for i, dim in enumerate(dims) if dim in 'ED' for axis in axes(dim)]
    replicas = tuple(axis for axis in axes('BT') if axis not in dict(split))  # other tokens meet the same weights there
    w = jax.lax.pcast(w.astype(dtype), replicas, to='varying')
    for axis, i in reversed(split):
      w = jax.lax.all_gather(w, axis, axis=i, tiled=True)
    if name == 'b_down_ED':
      w = jnp.where(jax.lax.axis_index(axes('F')) == 0, w, 0)
    whole[name] = w
  return whole
