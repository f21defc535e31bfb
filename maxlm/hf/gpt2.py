"""GPT-2: learned positions, norms with means and biases, matrices stored (in, out)."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Copy, Either, Entry, LeftOut, Tensor, within
from maxlm.hf.tables import layers, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('gpt2',)

EMBEDDINGS = (
  Tensor('wte.weight', 'V D', 'embed_VD'),
  Tensor('wpe.weight', 'P D', 'positions_PD'),
  Tensor('ln_f.weight', 'D', 'final_norm.scale_D'),
  Tensor('ln_f.bias', 'D', 'final_norm.bias_D'),
)
LAYER = (
  Tensor('ln_1.weight', 'D', 'mixer_pre_norm.scale_D'),
  Tensor('ln_1.bias', 'D', 'mixer_pre_norm.bias_D'),
  Tensor('attn.c_attn.weight', 'D (NH|KH|KH)', 'mixer.w_q_DNH | mixer.w_k_DKH | mixer.w_v_DKH'),
  Tensor('attn.c_attn.bias', '(NH|KH|KH)', 'mixer.b_q_NH | mixer.b_k_KH | mixer.b_v_KH'),
  Tensor('attn.c_proj.weight', 'NH D', 'mixer.w_o_NHD'),
  Tensor('attn.c_proj.bias', 'D', 'mixer.b_o_D'),
  LeftOut(r'attn\.(masked_)?bias', 'the causal mask'),
  Tensor('ln_2.weight', 'D', 'mlp_pre_norm.scale_D'),
  Tensor('ln_2.bias', 'D', 'mlp_pre_norm.bias_D'),
  Tensor('mlp.c_fc.weight', 'D F', 'mlp.w_up_DF'),
  Tensor('mlp.c_fc.bias', 'F', 'mlp.b_up_F'),
  Tensor('mlp.c_proj.weight', 'F D', 'mlp.w_down_FD'),
  Tensor('mlp.c_proj.bias', 'D', 'mlp.b_down_D'),
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_positions = keys.size('n_embd', 768), keys.size('n_head', 12), keys.size('n_positions', 1024)
  if d_model % n_heads:
    raise ValueError(f'{keys.where}: n_embd={d_model} is not a multiple of n_head={n_heads}')
  keys.fixed('n_ctx', n_positions)
  keys.fixed('scale_attn_weights', True)
  keys.inert('reorder_and_upcast_attn', 'summary_type', 'summary_use_proj', 'summary_activation', 'summary_first_dropout',
             'summary_proj_to_labels')
  attention = AttentionSpec(n_heads=n_heads, n_kv_heads=n_heads, head_dim=d_model // n_heads, rope=None, qkv_bias=True,
                            out_bias=True)
  mlp = MlpSpec(d_ff=keys.size('n_inner', 4 * d_model), activation=keys.activation('activation_function', 'gelu_new'),
                gated=False, bias=True)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 50257), d_model=d_model, n_layers=keys.layers('n_layer'), max_positions=n_positions,
    pattern=(LayerSpec(mixer=attention, mlp=mlp),), tied_embeddings=keys.bool('tie_word_embeddings', True),
    norm=NormSpec(kind='layer', eps=keys.float('layer_norm_epsilon', 1e-5)))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlp = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MlpSpec)[0]
  return {
    'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'vocab_size': model.vocab_size, 'n_embd': model.d_model,
    'n_layer': model.n_layers, 'n_head': attention.n_heads, 'n_inner': mlp.d_ff, 'activation_function': 'gelu_new',
    'n_positions': model.max_positions, 'max_position_embeddings': model.max_positions,
    'layer_norm_epsilon': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  """The first checkpoints have no 'transformer.' before the names."""
  own = [*EMBEDDINGS, *layers(model, LAYER, theirs='h.')]
  yield Either(*([*within(prefix, '', own),
                  Copy('lm_head.weight', of=f'{prefix}wte.weight') if model.tied_embeddings else
                  Tensor('lm_head.weight', 'V D', 'unembed_DV')] for prefix in ('transformer.', '')))
