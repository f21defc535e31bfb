"""Maximal-update parametrisation: what is tuned on a small model, the base, holds for a wider and deeper one.

µP (Yang et al. 2022, arXiv 2203.03466) for width and CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1, alpha = 1) for
depth. m is how often a weight's fan-in is that of the base, L how often the number of layers is.

| what | at the base | here |
|---|---|---|
| scores of attention | s | s * head_dim of the base / head_dim |
| what a sublayer adds to the stream | y | y / L |
| logits | z | z / sqrt(m) |
| embeddings that are the head too | x | x * sqrt(m) |
| learning rate of the matrices `w_*` under Adam | lr | lr / m |
| of the head, or of embeddings that are the head too | lr | lr / sqrt(m) |
| of everything else: embeddings, norms, biases, convolutions | lr | lr |
| what a step of weight decay takes | lr * decay | the same |
| Adam's eps | eps | eps / (what the gradient of the weight has become smaller by) |

The first four are factors that models have anyway: `parametrised` sets them, and a checkpoint computes the same wherever it
is loaded. The others are of the optimizer: `in_units_of_base`. Weights are drawn as always, with variance 1 / fan-in.

The papers draw the head with a constant variance, divide logits by m, and leave its learning rate. We draw it with variance
1 / D, so that it computes and learns the same with sqrt(m) in two places: w * c, lr * c and a factor 1 / c on the output are
one program under Adam (Yang & Hu 2021, arXiv 2011.14522, section 5).

Fan-ins are read from shapes, by the letters of a weight's name (`fans`), so that a dimension that a config does not grow
with the model, such as the rank of latent attention, is right too.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from maxlm.digest import named_leaves
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.lightning import LightningSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.models.decoder import Decoder, DecoderConfig, LayerSpec
from maxlm.ops.einsum import in_and_out
from maxlm.sharding import MeshConfig, abstract_mesh

# What may differ from the base. The others have no rule here: another vocabulary, more experts (learning rates transfer,
# says arXiv 2508.09752; not tried here), more dims in a state space (where µP does not hold: Vankadara et al. 2024,
# 'On feature learning in structured state space models').
SIZES = {
  DecoderConfig: ('d_model', 'n_layers', 'embed_scale', 'logits_scale'),
  LayerSpec: ('mixer_scales', 'mlp_scales'),
  AttentionSpec: ('n_heads', 'n_kv_heads', 'head_dim', 'scale'),
  MlaSpec: ('n_heads', 'q_rank', 'kv_rank', 'nope_dim', 'rope_dim', 'v_dim', 'scale'),
  Mamba2Spec: ('n_heads', 'n_groups', 'head_dim'),
  DeltaSpec: ('n_heads', 'n_key_heads', 'head_dim', 'key_dim'),
  LightningSpec: ('n_heads', 'head_dim'),
  ParallelSpec: (),
  MlpSpec: ('d_ff',),
  MoeSpec: ('latent',),
}


def parametrised(model: DecoderConfig, base: DecoderConfig) -> DecoderConfig:
  """The model with the base's factors in its forward pass, as the table above changes them. `OptimConfig.base` has the rest.

  ValueError, in one line, where the two differ in more than their sizes, or in a depth that no rule covers.
  """
  _check_alike(model, base, 'model')
  m, depth = model.d_model / base.d_model, model.n_layers / base.n_layers
  pattern = tuple(_layer(layer, like, depth, f'model.pattern[{i}]')
                  for i, (layer, like) in enumerate(zip(model.pattern, base.pattern)))
  return dataclasses.replace(model, pattern=pattern, logits_scale=base.logits_scale / m**0.5,
                             embed_scale=base.embed_scale * (m**0.5 if base.tied_embeddings else 1.0))


def check(model: DecoderConfig, base: DecoderConfig) -> None:
  """ValueError where the model's factors are not those that `parametrised` gives it."""
  wanted = parametrised(model, base)
  if wanted != model:
    raise ValueError(f'optim.base has width {base.d_model} and {base.n_layers} layers, and the factors of this model, of '
                     f'width {model.d_model} and {model.n_layers} layers, are not those that follow: take '
                     'model=parametrised(model, base) in the config, after the last change of a size')


def _layer(layer: LayerSpec, like: LayerSpec, depth: float, where: str) -> LayerSpec:
  if depth != 1 and (layer.norm == 'carried' or like.mixer_scales[0] != 1 or like.mlp_scales[0] != 1):
    raise ValueError(f'{where}: no rule says how a stream that is carried, or itself scaled, goes with depth: give '
                     'optim.base as many layers')
  scales = {name: (getattr(like, name)[0], getattr(like, name)[1] / depth) for name in ('mixer_scales', 'mlp_scales')}
  return dataclasses.replace(layer, mixer=_mixer(layer.mixer, like.mixer), **scales)


def _mixer(mixer, like):
  """With the base's scale of scores, times what the dims that a score sums over have become fewer by."""
  match mixer:
    case AttentionSpec():
      dims, base_dims = mixer.head_dim, like.head_dim
    case MlaSpec():
      dims, base_dims = mixer.nope_dim + mixer.rope_dim, like.nope_dim + like.rope_dim
    case ParallelSpec():
      return dataclasses.replace(mixer, mixers=tuple(map(_mixer, mixer.mixers, like.mixers)))
    case _:
      return mixer  # linear attention and state spaces: what they give is normalised, or sums over a state of one size
  scale = like.scale if dims == base_dims else like.score_scale * base_dims / dims
  return dataclasses.replace(mixer, scale=scale)


def _check_alike(value: Any, like: Any, where: str) -> None:
  """ValueError for the first field in which two parts of models differ, and that is no size."""
  if type(value) is not type(like):
    raise ValueError(f'{where} is {type(value).__name__}, and in optim.base {type(like).__name__}: only sizes may differ')
  if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
    if len(value) != len(like):
      raise ValueError(f'{where} has {len(value)} parts, and in optim.base {len(like)}: only sizes may differ; a pattern '
                       'that repeats serves every depth')
    for i, pair in enumerate(zip(value, like)):
      _check_alike(*pair, f'{where}[{i}]')
  elif type(value) in SIZES:
    for field in dataclasses.fields(value):
      if field.name not in SIZES[type(value)]:
        _check_alike(getattr(value, field.name), getattr(like, field.name), f'{where}.{field.name}')
  elif value != like:
    raise ValueError(f'{where}={value}, and in optim.base it is {like}: no rule covers that; only sizes may differ')


# -- the optimizer's part


class Factors(NamedTuple):
  """Of one weight. adam: on updates of unit size in each element, such as Adam's and AdEMAMix's. muon: on an orthogonal
  update that was scaled by sqrt(max(rows, columns)) to have Adam's RMS (Moonlight). eps: on Adam's eps."""

  adam: float
  muon: float
  eps: float


def in_units_of_base(inner: optax.GradientTransformation, base: DecoderConfig,
                     orthogonal: Callable[[str], bool] = lambda name: False) -> optax.GradientTransformation:
  """An optimizer of dicts of weights by name that works as if each weight had its size at the base: its eps meets gradients
  as large as they are there, and its updates are scaled by `Factors.adam`, or, of weights whose updates are orthogonal, by
  `Factors.muon`. Where a factor is 1 the program is the same."""
  def update(grads, state, weights):
    of = factors(base, weights)
    grads = {name: g if of[name].eps == 1 else g / of[name].eps for name, g in grads.items()}
    updates, state = inner.update(grads, state, weights)
    scales = {name: of[name].muon if orthogonal(name) else of[name].adam for name in updates}
    return {name: u if scales[name] == 1 else u * scales[name] for name, u in updates.items()}, state

  return optax.GradientTransformation(inner.init, update)


def factors(base: DecoderConfig, weights: dict[str, Any]) -> dict[str, Factors]:
  """Of each of the model's weights (or their shapes) by its dotted name; layers are stacked along a first dimension.

  ValueError for a weight that the base does not have.
  """
  base_weights = shapes(base)
  depth = sum({name.split('.')[1]: w.shape[0] for name, w in weights.items() if name.startswith('stacks.')}.values())
  depth /= base.n_layers
  found = {}
  for name, w in weights.items():
    if name not in base_weights:
      raise ValueError(f'optim.base has no weight {name}: it must be the same model in all but its sizes')
    ins, outs = fans(name, w.shape)
    base_ins, base_outs = fans(name, base_weights[name].shape)
    m, wider = ins / base_ins, outs / base_outs
    found[name] = Factors(adam=1.0, muon=1.0, eps=1 / wider)
    if name == 'unembed_DV':
      found[name] = Factors(adam=m**-0.5, muon=1.0, eps=m**-0.5)
    elif name == 'embed_VD' and base.tied_embeddings:
      found[name] = Factors(adam=wider**-0.5, muon=1.0, eps=wider**-0.5)
    elif is_matrix(name):
      spectral = (wider / m) ** 0.5 / math.sqrt(max(ins, outs) / max(base_ins, base_outs))
      found[name] = Factors(adam=1 / m, muon=spectral, eps=1 / wider)
    if name.startswith('stacks.'):
      found[name] = found[name]._replace(eps=found[name].eps / depth)
  return found


def is_matrix(name: str) -> bool:
  """The weights `w_*`, from one width or rank to another: what µP calls hidden."""
  return name.rpartition('.')[2].startswith('w_')


def fans(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """(inputs that a product with the weight sums over, outputs that it makes), of one layer and one expert.

  By the letters of the name: 'w_q_DNH' has D and N * H, 'w_o_NHD' N * H and D, 'w_down_EFD' F and D. What is no matrix has
  1 and its size.
  """
  letters = name.rpartition('_')[2] if name.rpartition('.')[2].rpartition('_')[2].isupper() else ''
  sizes = dict(zip(reversed(letters), reversed(shape)))
  size = lambda letters: math.prod(sizes[letter] for letter in letters)
  if letters.startswith('E') and len(letters) > 1:
    letters = letters[1:]
  if len(letters) == 1:
    return (size(letters), 1) if is_matrix(name) else (1, size(letters))
  if not is_matrix(name) and name not in ('embed_VD', 'unembed_DV', 'positions_PD'):
    return 1, size(letters)
  return tuple(map(size, in_and_out(letters)))


def shapes(model: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Of all weights, by dotted names."""
  n = max(1, jax.sharding.get_abstract_mesh().size)  # its mesh splits no weight: a base may be too small for the current one
  with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(data=n, fsdp=1), n)):
    params = jax.eval_shape(lambda: Decoder(model, jax.random.key(0)))
  return named_leaves(params)
