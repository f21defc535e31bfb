"""The decoder: embeddings, a pattern of layers, a head.

An architecture is a value, `DecoderConfig`: layer i is `pattern[i % len(pattern)]`, and a layer is a mixer of tokens and
an MLP, either of which may be missing. The weights of all layers that have the same shapes are stacked along L in layer
order, whatever their pattern is, so a checkpoint does not know how its layers were scanned; the forward pass scans over
what repeats (`runs`) and unrolls the rest.

B batch  T query time  S key time  D width  V vocabulary  L layers  M cache length  P learned positions
"""

import collections
import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.lightning import LightningSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.mtp import Ahead
from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.layers.param import normal
from maxlm.layers.rope import RopeSpec, rope_table
from maxlm.layers.router import RouterStats
from maxlm.layers.rows import Past, Rows, rope_key
from maxlm.ops import grouped_matmul
from maxlm.ops.attention import cudnn_cannot
from maxlm.ops.embedding import look_up
from maxlm.ops.exchange import Dispatch
from maxlm.sharding import axis_size
from maxlm.sharding import spec as shard

Mixer = AttentionSpec | MlaSpec | Mamba2Spec | DeltaSpec | LightningSpec | ParallelSpec
FeedForward = MlpSpec | MoeSpec


@dataclasses.dataclass(kw_only=True, slots=True)
class LayerSpec:
  """One layer: a mixer of tokens, then an MLP, each added to the residual stream; None leaves one out.

  norm: 'pre' normalises what goes into a sublayer, 'post' what comes out of it (OLMo 2), 'sandwich' both (Gemma 2);
  'carried' is 'pre' with the normalised state as the residual stream (MiniMax-01). mixer_scales, mlp_scales: factors on
  the stream and on what the sublayer adds to it.
  """

  mixer: Mixer | None
  mlp: FeedForward | None
  norm: Literal['pre', 'post', 'sandwich', 'carried'] = 'pre'
  mixer_scales: tuple[float, float] = (1.0, 1.0)
  mlp_scales: tuple[float, float] = (1.0, 1.0)

  @property
  def parts(self) -> dict:
    """The sublayers that are there, by name."""
    return {name: part for name, part in (('mixer', self.mixer), ('mlp', self.mlp)) if part is not None}


@dataclasses.dataclass(kw_only=True, slots=True)
class DecoderConfig:
  """The architecture. Shapes are here and in the layers of the pattern, nothing about speed.

  vocab_size: at least the tokenizer's. pattern: layer i is pattern[i % len(pattern)]. tied_embeddings: the head is the
  transposed embedding. embed_scale: factor on embeddings (Gemma: sqrt(d_model)). logits_scale: factor on logits.
  logits_softcap: c * tanh(logits / c), after the factor. norm: of layers and the end, of queries and keys. max_positions:
  a learned vector for each position is added to the embeddings (GPT-2). mask_token: what stands for a token that is to be
  filled in: attention then sees both ways, and the model is trained and used by masked diffusion (`maxlm.diffusion`).
  mtp_depth: so many more layers like the last one, each predicting a token further ahead (`layers.mtp`), for training only.
  """

  vocab_size: int
  d_model: int
  n_layers: int
  pattern: tuple[LayerSpec, ...]
  tied_embeddings: bool = False
  embed_scale: float = 1.0
  logits_scale: float = 1.0
  logits_softcap: float | None = None
  norm: NormSpec = dataclasses.field(default_factory=NormSpec)
  max_positions: int | None = None
  mask_token: int | None = None
  mtp_depth: int = 0

  @property
  def layers(self) -> list[LayerSpec]:
    return [self.pattern[i % len(self.pattern)] for i in range(self.n_layers)]


@dataclasses.dataclass(kw_only=True, slots=True)
class ComputeConfig:
  """How the model is computed: none of this changes what it computes, but for the last two where they are set.

  dtype: of activations and of weights in use (None: bfloat16 on accelerators, float32 on CPU). kernel: of attention
  (None: splash on TPU, cudnn on GPU where it can honour the model, else chunked). remat: what is kept for the backward pass:
  'none' means everything, 'products' what products with weights and attention give, 'experts' what attention and the
  products into experts give, 'attention' what attention gives, 'full' only a layer's input. unroll: periods of layers a
  scan step holds.
  experts_kernel: of the products with experts (None: pallas on TPU, tokamax on GPU, blocked on CPU; `ops.grouped_matmul`).
  exchange: of tokens between the devices of mesh.expert: 'gather' brings all tokens to all of them, 'all_to_all' each to the
  devices of its experts (None: what takes less time, `ops.exchange.exchange_for`).

  capacity: buffers of experts, as a multiple of the average load of a device; what does not fit is dropped, counted and
  logged (None: the worst case fits). benchmark_routing: experts in turn instead of the router's, to time a balanced layer.
  """

  dtype: Literal['float32', 'bfloat16'] | None = None
  kernel: Literal['reference', 'chunked', 'splash', 'cudnn'] | None = None
  remat: Literal['none', 'products', 'experts', 'attention', 'full'] = 'none'
  unroll: int = 1
  experts_kernel: Literal['blocked', 'pallas', 'tokamax', 'ragged_dot'] | None = None
  exchange: Literal['gather', 'all_to_all'] | None = None
  capacity: float | None = None
  benchmark_routing: Literal['balanced'] | None = None

  def resolve(self, platform: str, model: DecoderConfig | None = None, *, whole_rows: bool = True) -> 'ComputeConfig':
    """The choices that None leaves to the platform ('cpu', 'gpu', 'tpu'), made; on a GPU the model decides too.

    whole_rows: no devices share a row.
    """
    dtype = self.dtype or ('float32' if platform == 'cpu' else 'bfloat16')
    kernel = {'cpu': 'chunked', 'gpu': 'chunked', 'tpu': 'splash'}[platform]
    if platform == 'gpu' and model is not None and whole_rows:
      if not any(cudnn_cannot(**needs, dtype=dtype) for needs in kernel_needs(model)):
        kernel = 'cudnn'
    return dataclasses.replace(self, dtype=dtype, kernel=self.kernel or kernel,
                               experts_kernel=self.experts_kernel or grouped_matmul.default_kernel(platform, dtype))


class Layer(nnx.Module):
  """Weights of one layer, or of L stacked ones."""

  def __init__(self, spec: LayerSpec, d_model: int, norm: NormSpec, rngs: nnx.Rngs):
    before, after = spec.norm != 'post', spec.norm in ('post', 'sandwich')
    if spec.mixer is not None:
      self.mixer = spec.mixer.build(d_model, norm, rngs)
      self.mixer_pre_norm = Norm(norm, d_model) if before else None
      self.mixer_post_norm = Norm(norm, d_model) if after else None
    if spec.mlp is not None:
      self.mlp = spec.mlp.build(d_model, norm, rngs)
      self.mlp_pre_norm = Norm(norm, d_model) if before else None
      self.mlp_post_norm = Norm(norm, d_model) if after else None

  def __call__(self, spec: LayerSpec, x_BTD: jax.Array, rows: Rows
               ) -> tuple[jax.Array, RouterStats | None, dict[str, jax.Array]]:
    """(x, what the router did, if there is one, and if `rows` asks for it the largest logit of each head, [N], by the
    place in the mixer: {'': …})."""
    match spec.mixer:
      case AttentionSpec() | MlaSpec() | ParallelSpec() if rows.max_logits:
        mix = lambda h_BTD: self.mixer.observed(spec.mixer, h_BTD, rows)
      case _:
        mix = lambda h_BTD: (self.mixer(spec.mixer, h_BTD, rows), {})
    tops = {}
    if spec.mixer is not None:
      x_BTD, tops = self._mix(spec, x_BTD, rows, mix)
    return *self._feed_forward(spec, x_BTD, rows), tops

  def extend(self, spec: LayerSpec, x_BTD: jax.Array, rows: Rows, cache, past: Past):
    """As `__call__` for new tokens that continue those in the mixer's cache: (x, cache)."""
    if spec.mixer is not None:
      x_BTD, cache = self._mix(spec, x_BTD, rows, lambda h_BTD: self.mixer.extend(spec.mixer, h_BTD, rows, cache, past))
    return self._feed_forward(spec, x_BTD, rows)[0], cache

  def _mix(self, spec, x_BTD, rows, mix):
    with jax.named_scope('mixer'):
      return residual(x_BTD, mix, spec, spec.mixer_scales, rows.norm, self.mixer_pre_norm, self.mixer_post_norm)

  def _feed_forward(self, spec, x_BTD, rows):
    match spec.mlp:
      case None:
        return x_BTD, None
      case MoeSpec():
        mlp = lambda h_BTD: self.mlp(spec.mlp, h_BTD, rows)
      case _:
        mlp = lambda h_BTD: (self.mlp(spec.mlp, h_BTD), None)
    with jax.named_scope('mlp'):
      return residual(x_BTD, mlp, spec, spec.mlp_scales, rows.norm, self.mlp_pre_norm, self.mlp_post_norm)


def residual(x_BTD, sublayer, spec: LayerSpec, scales, norm: NormSpec, pre_norm: Norm | None, post_norm: Norm | None):
  """The stream after a sublayer was added to it, and what else the sublayer returns beside its output. The stream may be
  split over more devices than the sublayer (`stream_dims`)."""
  split = jax.typeof(x_BTD).sharding.spec
  h_BTD = x_BTD if pre_norm is None else pre_norm(norm, x_BTD)
  y_BTD, extra = sublayer(jax.reshard(h_BTD, shard('BTD')))
  y_BTD = jax.reshard(y_BTD, split)
  if post_norm is not None:
    y_BTD = post_norm(norm, y_BTD)
  stream_BTD = h_BTD if spec.norm == 'carried' else x_BTD
  x_BTD = stream_BTD + y_BTD if scales == (1.0, 1.0) else stream_BTD * scales[0] + y_BTD * scales[1]
  return x_BTD, extra


def stream_dims(length: int) -> str:
  """Dims of the residual stream [B, T, D]. Devices that share a layer's heads and hidden width each have all tokens in it;
  between sublayers they share the tokens, so that norms are computed, and the stream is kept, once (Korthikanti et al. 2022,
  arXiv 2205.05198, section 4.2.2): what was a sum over these devices becomes a scatter, and a gather before the next."""
  return 'BUD' if axis_size('N') > 1 and length % axis_size('U') == 0 else 'BTD'


class Decoder(nnx.Module):
  """Weights of the whole model."""

  def __init__(self, config: DecoderConfig, key: jax.Array):
    """Weights drawn from `key`, one stream a layer, so that a layer's weights do not depend on the depth."""
    embed_key, layer_key = jax.random.split(key)
    rngs = nnx.Rngs(embed_key)
    D, V = config.d_model, config.vocab_size
    self.embed_VD = normal(rngs, 'VD', (V, D), D**-0.5 if config.tied_embeddings else 1.0)
    if not config.tied_embeddings:
      self.unembed_DV = normal(rngs, 'DV', (D, V), D**-0.5)
    if config.max_positions is not None:
      self.positions_PD = normal(rngs, 'PD', (config.max_positions, D), 0.02)
    self.final_norm = Norm(config.norm, D)
    keys_L = jax.vmap(lambda i: jax.random.fold_in(layer_key, i))(jnp.arange(config.n_layers))
    stack_of = stack_of_layer(config)
    self.stacks = nnx.List([
      jax.vmap(lambda key: Layer(config.layers[members[0]], D, config.norm, nnx.Rngs(key)))(keys_L[jnp.array(members)])
      for members in ([i for i, s in enumerate(stack_of) if s == stack] for stack in range(max(stack_of) + 1))])
    if config.mtp_depth:
      ahead = [nnx.Rngs(jax.random.fold_in(layer_key, config.n_layers + k)) for k in range(config.mtp_depth)]
      self.mtp = nnx.List([Ahead(Layer(config.layers[-1], D, config.norm, rngs), D, config.norm, rngs) for rngs in ahead])

  def hidden(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT, segment_ids_BT, positions_BT
             ) -> tuple[jax.Array, list[RouterStats]]:
    """(final hidden states [B, T, D] of packed rows, normalised, ready for the head; what the routers did, stacked along L,
    one for each of `expert_layers`). `compute` is resolved."""
    return self.observed(config, compute, tokens_BT, segment_ids_BT, positions_BT, max_logits=False)[:2]

  def observed(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT, segment_ids_BT, positions_BT, *,
               max_logits: bool) -> tuple[jax.Array, list[RouterStats], dict[str, jax.Array]]:
    """`hidden`, and if it is asked for the largest logit of each head of the layers of a stack, [L, N] in layer order, by
    the name of the mixer whose weights it comes from: 'stacks.0.mixer'."""
    rows = rows_for(config, compute, segment_ids_BT, positions_BT)._replace(max_logits=max_logits)
    x_BTD = jax.reshard(self.embed(config, compute, tokens_BT, positions_BT), shard(stream_dims(tokens_BT.shape[1])))
    stack_of, taken = stack_of_layer(config), [0] * len(self.stacks)
    kinds = expert_layers(config)
    stats_of, tops_of = [[] for _ in kinds], collections.defaultdict(list)
    for run in runs(config):
      members = range(run.first, run.first + run.period)
      n_of = collections.Counter(stack_of[i] for i in members)  # layers of each stack in a period
      scanned = run.repeats > compute.unroll

      def period(x_BTD, stacks, members=members, n_of=n_of, scanned=scanned):
        """One period of the run; `stacks` holds its weights and no others."""
        weights, said = {s: iter(unstack(stack, n_of[s])) for s, stack in stacks.items()}, {}
        tops = {}
        apply = functools.cache(lambda kind: remat(  # one for all layers of a kind: then JAX traces it once
          lambda layer, x_BTD: layer(config.pattern[kind], x_BTD, rows), compute.remat, scanned))
        for i in members:
          x_BTD, said[i], tops[i] = apply(config.pattern.index(config.layers[i]))(next(weights[stack_of[i]]), x_BTD)
        return x_BTD, ([stacked([said[i] for i in members if i in layers]) for _, layers in kinds],
                       {f'stacks.{s}.mixer': stacked([tops[i] for i in members if stack_of[i] == s]) for s in stacks})

      stacks = {s: jax.tree.map(functools.partial(periods, first=taken[s], repeats=run.repeats, n=n), self.stacks[s])
                for s, n in n_of.items()}
      x_BTD, (stats, tops) = jax.lax.scan(period, x_BTD, stacks, unroll=min(compute.unroll, run.repeats))
      for of_kind, of_run in zip(stats_of, stats):
        of_kind += [jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), of_run)] if of_run else []
      for mixer, of_run in tops.items():
        for place, top in of_run.items():  # [periods, layers of the stack in each, N]
          tops_of[mixer + place].append(top.reshape(-1, top.shape[-1]))
      for s, n in n_of.items():
        taken[s] += n * run.repeats
    x_BTD = jax.reshard(self._finish(config, x_BTD), shard('BTD'))
    stats = [jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts) for parts in stats_of]
    return x_BTD, stats, {name: jnp.concatenate(parts) for name, parts in tops_of.items()}

  def ahead(self, config: DecoderConfig, compute: ComputeConfig, k: int, x_BTD, tokens_BT, segment_ids_BT, positions_BT
            ) -> tuple[jax.Array, RouterStats | None]:
    """From the final hidden states of `hidden` (k = 0), or of the call with k - 1, and the tokens 1 + k after those that
    were read: the states that predict the tokens after these, ready for the head; and what the layer's router did."""
    rows = rows_for(config, compute, segment_ids_BT, positions_BT)

    def run(ahead, x_BTD, token_BTD):
      x_BTD = jax.reshard(ahead.join(config.norm, x_BTD, token_BTD), shard(stream_dims(tokens_BT.shape[1])))
      x_BTD, stats, _ = ahead.layer(config.layers[-1], x_BTD, rows)
      return jax.reshard(ahead.final_norm(config.norm, x_BTD), shard('BTD')), stats

    with jax.named_scope('mtp'):
      token_BTD = self.embed(config, compute, tokens_BT, positions_BT)
      x_BTD, stats = remat(run, compute.remat, False)(self.mtp[k], x_BTD, token_BTD)
      return x_BTD * config.logits_scale if config.logits_scale != 1.0 else x_BTD, stats

  def extend(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT, segment_ids_BT, positions_BT, caches: list,
             past: Past) -> tuple[jax.Array, list]:
    """`hidden` of T new tokens that continue the cached ones, and the caches, one a layer."""
    rows = rows_for(config, compute, segment_ids_BT, positions_BT)
    x_BTD = self.embed(config, compute, tokens_BT, positions_BT)
    weights = [iter(unstack(stack, count)) for stack, count in zip(self.stacks, stack_sizes(config))]
    new_caches = []
    for layer_spec, stack, cache in zip(config.layers, stack_of_layer(config), caches):
      x_BTD, cache = next(weights[stack]).extend(layer_spec, x_BTD, rows, cache, past)
      new_caches.append(cache)
    return self._finish(config, x_BTD), new_caches

  def embed(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT, positions_BT) -> jax.Array:
    """Embeddings [B, T, D] in the compute dtype."""
    with jax.named_scope('embed'):
      x_BTD = look_up(self.embed_VD[...], tokens_BT, compute.dtype)
      if config.embed_scale != 1.0:
        x_BTD *= config.embed_scale
      if config.max_positions is not None:
        x_BTD += look_up(self.positions_PD[...], positions_BT, compute.dtype, 'PD')
    return x_BTD

  def _finish(self, config, x_BTD):
    x_BTD = self.final_norm(config.norm, x_BTD)
    return x_BTD * config.logits_scale if config.logits_scale != 1.0 else x_BTD

  def head_DV(self) -> jax.Array:
    """The matrix [D, V] from hidden states to logits."""
    return self.unembed_DV[...] if hasattr(self, 'unembed_DV') else self.embed_VD[...].T

  def logits(self, config: DecoderConfig, x_BTD: jax.Array) -> jax.Array:
    """fp32 logits [B, T, V] of final hidden states; for a few tokens only: training uses `ops.xent`."""
    head_DV = jax.reshard(self.head_DV().astype(x_BTD.dtype), shard('DV', gathered=True))
    logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, head_DV, out_sharding=shard('BTV'),
                            preferred_element_type=jnp.float32)
    if config.logits_softcap is not None:
      logits_BTV = config.logits_softcap * jnp.tanh(logits_BTV / config.logits_softcap)
    return logits_BTV


def empty_caches(config: DecoderConfig, compute: ComputeConfig, batch: int, length: int) -> list:
  """What the mixers remember of `batch` rows of up to `length` tokens before the first one: one cache a layer."""
  return [layer.mixer and layer.mixer.empty_cache(batch, length, compute.dtype) for layer in config.layers]


def rows_for(config: DecoderConfig, compute: ComputeConfig, segment_ids_BT, positions_BT) -> Rows:
  """What the layers are told of the rows; each table of angles is made once."""
  turned = {rope_key(*rope): rope for layer in config.pattern for rope in ropes(layer.mixer)}
  tables = {key: rope_table(positions_BT, *rope) for key, rope in turned.items()}
  dispatch = Dispatch(compute.exchange, compute.capacity, compute.benchmark_routing == 'balanced', compute.experts_kernel)
  return Rows(segment_ids_BT, positions_BT, tables, compute.kernel, config.norm, dispatch, config.mask_token is None)


def attentions(mixer: Mixer | None) -> list[AttentionSpec]:
  """The attention layers that a mixer consists of."""
  match mixer:
    case AttentionSpec():
      return [mixer]
    case ParallelSpec():
      return [attention for part in mixer.mixers for attention in attentions(part)]
  return []


def kernel_needs(model: DecoderConfig) -> list[dict]:
  """What each attention layer of the pattern asks of a kernel, as `cudnn_cannot` takes it."""
  causal = model.mask_token is None
  needs = [dict(softcap=None, sinks=False, head_dim=layer.mixer.nope_dim + layer.mixer.rope_dim, causal=causal)
           for layer in model.pattern if isinstance(layer.mixer, MlaSpec)]
  return needs + [dict(softcap=spec.softcap, sinks=spec.sinks, head_dim=spec.head_dim, causal=causal)
                  for layer in model.pattern for spec in attentions(layer.mixer)]


def ropes(mixer: Mixer | None) -> list[tuple[RopeSpec, int]]:
  """The rotations a mixer uses, with the dims of a head that each is for."""
  match mixer:
    case MlaSpec(rope=RopeSpec()):
      return [(mixer.rope, mixer.rope_dim)]
  return [(attention.rope, attention.head_dim) for attention in attentions(mixer) if attention.rope is not None]


def expert_layers(config: DecoderConfig) -> list[tuple[MoeSpec, list[int]]]:
  """Each kind of experts in the model, with its layers."""
  kinds = []
  for layer in config.pattern:
    if isinstance(layer.mlp, MoeSpec) and layer.mlp not in kinds:
      kinds.append(layer.mlp)
  found = [(kind, [i for i, layer in enumerate(config.layers) if layer.mlp == kind]) for kind in kinds]
  return [(kind, layers) for kind, layers in found if layers]


class Run(NamedTuple):
  """Layers first, first + 1, … of which `period` in a row come `repeats` times."""

  first: int
  period: int
  repeats: int


# In a pattern that is written out, fewer repeats are not worth a loop: it makes the compiler copy what layers keep for
# the backward pass.
FEWEST_REPEATS = 4


def runs(config: DecoderConfig) -> list[Run]:
  """All layers, in order, as runs: the periods of a pattern that repeats, or what repeats within one that does not."""
  n = config.n_layers
  repeats, rest = divmod(n, len(config.pattern))
  if repeats > 1:
    return [Run(0, len(config.pattern), repeats)] + ([Run(n - rest, rest, 1)] if rest else [])
  kinds = [config.pattern.index(layer) for layer in config.layers]
  found, i = [], 0
  while i < n:
    def repeated(period):
      count = 1
      while kinds[i + count * period:i + (count + 1) * period] == kinds[i:i + period]:
        count += 1
      return Run(i, period, count)

    best = max(map(repeated, range(1, n - i + 1)), key=lambda run: run.period * (run.repeats - 1))
    if best.repeats >= FEWEST_REPEATS:
      found.append(best)
    elif found and found[-1].repeats == 1:
      found[-1] = best = Run(found[-1].first, found[-1].period + 1, 1)
    else:
      best = Run(i, 1, 1)
      found.append(best)
    i = best.first + best.period * best.repeats
  return found


def remat(function, policy: str, scanned: bool):
  """`function` with a say in what its backward pass keeps. A scan has two loops, forward and backward: no CSE to prevent."""
  if policy == 'none':
    return function
  attention = 'attn_out', 'attn_lse'
  names = {'full': (), 'attention': attention, 'experts': (*attention, 'experts_in'),
           'products': (*attention, 'experts_in', 'product')}[policy]
  return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=not scanned)


def stack_of_layer(config: DecoderConfig) -> list[int]:
  """For each layer, the stack that holds its weights: one stack for all layers whose weights have the same shapes."""
  known, shapes, stack_of_spec = [], [], []
  for layer_spec in config.pattern:
    if layer_spec in known:
      stack_of_spec.append(stack_of_spec[known.index(layer_spec)])
    else:
      weights = jax.eval_shape(lambda s=layer_spec: Layer(s, config.d_model, config.norm, nnx.Rngs(0)))
      shape = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)]
      if shape not in shapes:
        shapes.append(shape)
      stack_of_spec.append(shapes.index(shape))
    known.append(layer_spec)
  return [stack_of_spec[i % len(config.pattern)] for i in range(config.n_layers)]


def stack_sizes(config: DecoderConfig) -> list[int]:
  """Layers in each stack."""
  stack_of = stack_of_layer(config)
  return [stack_of.count(stack) for stack in range(max(stack_of) + 1)]


def stacked(trees: list) -> Any:
  """Their leaves along a new first dimension; () if there are none."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else ()


def periods(w: jax.Array, *, first: int, repeats: int, n: int) -> jax.Array:
  """[L, …] -> [repeats, n, …] from a stack's layer `first` on. The sharding is said, for a reshape forgets that of dims of
  size 1, such as a lone key-value head."""
  return jax.lax.reshape(w[first:first + n * repeats], (repeats, n, *w.shape[1:]),
                         out_sharding=jax.P(None, None, *jax.typeof(w).sharding.spec[1:]))


def unstack(stack: Layer, count: int) -> list[Layer]:
  """The first `count` layers of a stack. A split, whose gradient is one concatenation, not a sum of padded parts."""
  leaves, treedef = jax.tree.flatten(stack)
  split = [[w[0] for w in jax.lax.split(leaf, [1] * count)] if count else [] for leaf in leaves]
  return [treedef.unflatten(parts) for parts in zip(*split)]
