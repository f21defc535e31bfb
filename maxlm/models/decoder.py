"""The decoder: embeddings, a pattern of layers, a head.

An architecture is a value, `DecoderConfig`: layer i is `pattern[i % len(pattern)]`. The weights of all layers that have
the same shapes are stacked along L in layer order, whatever their pattern is, so a checkpoint does not know how its
layers were scanned; the forward pass scans over periods of the pattern and unrolls what is left over.

B batch  T query time  S key time  D width  V vocabulary  L layers  M cache length
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.attention import Attention, AttentionSpec, Cache, Rows
from maxlm.layers.mlp import Mlp, MlpSpec
from maxlm.layers.norm import RmsNorm
from maxlm.layers.param import normal
from maxlm.layers.rope import rope_table
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class LayerSpec:
  """One layer: attention, then an MLP, each added to the residual stream.

  norm: 'pre' normalises what goes into a sublayer, 'post' what comes out of it (OLMo 2), 'sandwich' both (Gemma 2).
  """

  attention: AttentionSpec
  mlp: MlpSpec
  norm: Literal['pre', 'post', 'sandwich'] = 'pre'


@dataclasses.dataclass(kw_only=True, slots=True)
class DecoderConfig:
  """The architecture. Shapes are here and in the layers of the pattern, nothing about speed.

  vocab_size: at least the tokenizer's. pattern: layer i is pattern[i % len(pattern)]. tied_embeddings: the head is the
  transposed embedding. embed_scale: factor on embeddings (Gemma: sqrt(d_model)). logits_softcap: c * tanh(logits / c).
  """

  vocab_size: int
  d_model: int
  n_layers: int
  pattern: tuple[LayerSpec, ...]
  tied_embeddings: bool = False
  embed_scale: float = 1.0
  logits_softcap: float | None = None
  norm_eps: float = 1e-6

  @property
  def layers(self) -> list[LayerSpec]:
    return [self.pattern[i % len(self.pattern)] for i in range(self.n_layers)]


@dataclasses.dataclass(kw_only=True, slots=True)
class ComputeConfig:
  """How the model is computed: none of this changes what it computes.

  dtype: of activations and of weights in use (None: bfloat16 on accelerators, float32 on CPU). kernel: of attention
  (None: splash on TPU, else chunked). remat: 'none' keeps all activations, 'attention' keeps only the output of
  attention and the layer's input, 'full' only the layer's input. unroll: periods of layers a scan step holds.
  """

  dtype: Literal['float32', 'bfloat16'] | None = None
  kernel: Literal['reference', 'chunked', 'splash'] | None = None
  remat: Literal['none', 'attention', 'full'] = 'none'
  unroll: int = 1

  def resolve(self, platform: str) -> 'ComputeConfig':
    """The choices that None leaves to the platform ('cpu', 'gpu', 'tpu'), made."""
    return dataclasses.replace(self, dtype=self.dtype or ('float32' if platform == 'cpu' else 'bfloat16'),
                               kernel=self.kernel or ('splash' if platform == 'tpu' else 'chunked'))


class Layer(nnx.Module):
  """Weights of one layer, or of L stacked ones."""

  def __init__(self, spec: LayerSpec, d_model: int, rngs: nnx.Rngs):
    self.attention = Attention(spec.attention, d_model, rngs)
    self.mlp = Mlp(spec.mlp, d_model, rngs)
    if spec.norm in ('pre', 'sandwich'):
      self.attention_pre_norm = RmsNorm(d_model)
      self.mlp_pre_norm = RmsNorm(d_model)
    if spec.norm in ('post', 'sandwich'):
      self.attention_post_norm = RmsNorm(d_model)
      self.mlp_post_norm = RmsNorm(d_model)

  def __call__(self, spec: LayerSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    return self._residual(spec, x_BTD, rows.norm_eps, lambda h_BTD: self.attention(spec.attention, h_BTD, rows))

  def extend(self, spec: LayerSpec, x_BTD: jax.Array, rows: Rows, cache: Cache, cached_ids_BM, column):
    """As `__call__` for new tokens that continue those in the cache: (x, cache)."""

    def attend(h_BTD):
      nonlocal cache
      y_BTD, cache = self.attention.extend(spec.attention, h_BTD, rows, cache, cached_ids_BM, column)
      return y_BTD

    return self._residual(spec, x_BTD, rows.norm_eps, attend), cache

  def _residual(self, spec, x_BTD, eps, attend):
    with jax.named_scope('attention'):
      h_BTD = attend(x_BTD if spec.norm == 'post' else self.attention_pre_norm(x_BTD, eps))
      x_BTD = x_BTD + (h_BTD if spec.norm == 'pre' else self.attention_post_norm(h_BTD, eps))
    with jax.named_scope('mlp'):
      h_BTD = self.mlp(spec.mlp, x_BTD if spec.norm == 'post' else self.mlp_pre_norm(x_BTD, eps))
      return x_BTD + (h_BTD if spec.norm == 'pre' else self.mlp_post_norm(h_BTD, eps))


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
    self.final_norm = RmsNorm(D)
    keys_L = jax.vmap(lambda i: jax.random.fold_in(layer_key, i))(jnp.arange(config.n_layers))
    stack_of = stack_of_layer(config)
    self.stacks = nnx.List([
      jax.vmap(lambda key: Layer(config.layers[members[0]], D, nnx.Rngs(key)))(keys_L[jnp.array(members)])
      for members in ([i for i, s in enumerate(stack_of) if s == stack] for stack in range(max(stack_of) + 1))])

  def hidden(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT, segment_ids_BT, positions_BT) -> jax.Array:
    """Final hidden states [B, T, D] of packed rows, normalised, ready for the head. `compute` is resolved."""
    rows = self._rows(config, segment_ids_BT, positions_BT, compute.kernel)
    x_BTD = self.embed(config, compute, tokens_BT)
    period, stack_of = len(config.pattern), stack_of_layer(config)
    n_periods, n_rest = divmod(config.n_layers, period)
    per_period = [stack_of[:period].count(s) if n_periods else 0 for s in range(len(self.stacks))]

    def run(x_BTD, stacks, first, count, scanned):
      """Layers first..first+count of a period, whose weights are the leading entries of each stack."""
      weights = [iter(unstack(stack, stack_of[first:first + count].count(s))) for s, stack in enumerate(stacks)]
      for i in range(first, first + count):
        layer_spec = config.layers[i]
        apply = remat(lambda layer, x_BTD, layer_spec=layer_spec: layer(layer_spec, x_BTD, rows), compute.remat, scanned)
        x_BTD = apply(next(weights[stack_of[i]]), x_BTD)
      return x_BTD

    if n_periods:
      in_periods = [jax.tree.map(lambda w, n=n: w[:n * n_periods].reshape(n_periods, n, *w.shape[1:]), stack)
                    for stack, n in zip(self.stacks, per_period)]
      scanned = compute.unroll < n_periods
      x_BTD, _ = jax.lax.scan(lambda x_BTD, stacks: (run(x_BTD, stacks, 0, period, scanned), None),
                              x_BTD, in_periods, unroll=min(compute.unroll, n_periods))
    if n_rest:
      left_over = [jax.tree.map(lambda w, n=n: w[n * n_periods:], stack) for stack, n in zip(self.stacks, per_period)]
      x_BTD = run(x_BTD, left_over, n_periods * period, n_rest, False)
    return self.final_norm(x_BTD, config.norm_eps)

  def embed(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT) -> jax.Array:
    """Embeddings [B, T, D] in the compute dtype. The table is gathered over fsdp, not over tensor."""
    table_VD = jax.reshard(self.embed_VD[...].astype(compute.dtype), shard('VD', gathered=True))
    x_BTD = table_VD.at[tokens_BT].get(out_sharding=shard('BTD'))
    return x_BTD * config.embed_scale if config.embed_scale != 1.0 else x_BTD

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

  def extend(self, config: DecoderConfig, compute: ComputeConfig, tokens_BT, segment_ids_BT, positions_BT, caches,
             cached_ids_BM, column) -> tuple[jax.Array, list[Cache]]:
    """Hidden states of T new tokens that continue the cached ones from `column` on, and the caches, one a layer."""
    rows = self._rows(config, segment_ids_BT, positions_BT, compute.kernel)
    x_BTD = self.embed(config, compute, tokens_BT)
    weights = [iter(unstack(stack, count)) for stack, count in zip(self.stacks, stack_sizes(config))]
    new_caches = []
    for layer_spec, stack, cache in zip(config.layers, stack_of_layer(config), caches):
      x_BTD, cache = next(weights[stack]).extend(layer_spec, x_BTD, rows, cache, cached_ids_BM, column)
      new_caches.append(cache)
    return self.final_norm(x_BTD, config.norm_eps), new_caches

  def empty_caches(self, config: DecoderConfig, compute: ComputeConfig, batch: int, length: int) -> list[Cache]:
    """Zeroed caches for `batch` rows of `length` tokens, one a layer."""
    def zeros(a):
      return jnp.zeros((batch, length, a.n_kv_heads, a.head_dim), compute.dtype, out_sharding=shard('BMKH'))
    return [Cache(zeros(layer.attention), zeros(layer.attention)) for layer in config.layers]

  def _rows(self, config, segment_ids_BT, positions_BT, kernel) -> Rows:
    kinds = {(layer.attention.head_dim, layer.attention.rope_theta) for layer in config.pattern}
    tables = {kind: rope_table(positions_BT, *kind) for kind in sorted(kinds, key=str) if kind[1] is not None}
    return Rows(segment_ids_BT, tables, kernel, config.norm_eps)


def remat(function, policy: str, scanned: bool):
  """`function` with a say in what its backward pass keeps. A scan has two loops, forward and backward: no CSE to prevent."""
  if policy == 'none':
    return function
  saved = {'full': jax.checkpoint_policies.nothing_saveable,
           'attention': jax.checkpoint_policies.save_only_these_names('attn_out', 'attn_lse')}[policy]
  return jax.checkpoint(function, policy=saved, prevent_cse=not scanned)


def stack_of_layer(config: DecoderConfig) -> list[int]:
  """For each layer, the stack that holds its weights: one stack for all layers whose weights have the same shapes."""
  shapes, stack_of_spec = [], []
  for layer_spec in config.pattern:
    weights = jax.eval_shape(lambda s=layer_spec: Layer(s, config.d_model, nnx.Rngs(0)))
    shape = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)]
    if shape not in shapes:
      shapes.append(shape)
    stack_of_spec.append(shapes.index(shape))
  return [stack_of_spec[i % len(config.pattern)] for i in range(config.n_layers)]


def stack_sizes(config: DecoderConfig) -> list[int]:
  """Layers in each stack."""
  stack_of = stack_of_layer(config)
  return [stack_of.count(stack) for stack in range(max(stack_of) + 1)]


def unstack(stack: Layer, count: int) -> list[Layer]:
  """The first `count` layers of a stack. A split, whose gradient is one concatenation, not a sum of padded parts."""
  leaves, treedef = jax.tree.flatten(stack)
  split = [[w[0] for w in jax.lax.split(leaf, [1] * count)] if count else [] for leaf in leaves]
  return [treedef.unflatten(parts) for parts in zip(*split)]
