"""Published config.json files of dense families: each key is understood, and the model has as many parameters as its owner
says. They are facts, written as dicts: the keys that are there but for token ids, dtypes and dropout."""

import dataclasses
from typing import Any

import pytest

from maxlm import typed_json
from maxlm.hf import convert, families
from maxlm.hf.mapping import choose
from maxlm.models.decoder import DecoderConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class Published:
  """parameters: of the text model. period: layers in the pattern. facts: some more of the model, by path."""

  config: dict[str, Any]
  parameters: int
  period: int = 1
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def sizes(d: int, heads: int, kv_heads: int, layers: int, d_ff: int, vocab: int, **keys) -> dict[str, Any]:
  return dict(hidden_size=d, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers,
              intermediate_size=d_ff, vocab_size=vocab, initializer_range=0.02, use_cache=True, **keys)


def seeing(model_type: str, vision_type: str, text: dict[str, Any], **keys) -> dict[str, Any]:
  """The config around that of a text model."""
  vision = dict(model_type=vision_type, hidden_size=1152, image_size=896, num_attention_heads=16, num_hidden_layers=27)
  return dict(model_type=model_type, text_config=text, vision_config=vision, **keys)


GEMMA = dict(attention_bias=False, hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6, cache_implementation='hybrid')
GEMMA_2 = dict(model_type='gemma2', hidden_act='gelu_pytorch_tanh', max_position_embeddings=8192, rope_theta=10000.0,
               sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA)
GEMMA_3 = dict(model_type='gemma3_text', attn_logit_softcapping=None, final_logit_softcapping=None, rope_theta=1000000,
               rope_local_base_freq=10000, rope_scaling=None, max_position_embeddings=32768, sliding_window=512,
               head_dim=256, query_pre_attn_scalar=256, **GEMMA)
GEMMA_3_SEEING = dict(boi_token_index=255999, eoi_token_index=256000, image_token_index=262144, mm_tokens_per_image=256)
OLMO = dict(attention_bias=False, hidden_act='silu', rms_norm_eps=1e-6, rope_theta=500000, tie_word_embeddings=False)
OLMO_2 = dict(model_type='olmo2', max_position_embeddings=4096, rope_scaling=None, **OLMO)
PHI = dict(model_type='phi3', auto_map={'AutoConfig': 'configuration_phi3.Phi3Config'}, attention_bias=False,
           hidden_act='silu', rms_norm_eps=1e-5)
GPT_2 = dict(model_type='gpt2', activation_function='gelu_new', initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024,
             n_positions=1024, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
             summary_type='cls_index', summary_use_proj=True, vocab_size=50257,
             task_specific_params={'text-generation': {'do_sample': True, 'max_length': 50}})
MISTRAL_3_SEEING = dict(image_token_index=10, multimodal_projector_bias=False, projector_hidden_act='gelu',
                        spatial_merge_size=2, vision_feature_layer=-1)
YARN_OF_OLMO_3 = {'attention_factor': 1.2079441541679836, 'beta_fast': 32.0, 'beta_slow': 1.0, 'factor': 8.0,
                  'original_max_position_embeddings': 8192, 'rope_type': 'yarn'}
YARN_OF_MINISTRAL_3 = {'beta_fast': 32.0, 'beta_slow': 1.0, 'factor': 16.0, 'llama_4_scaling_beta': 0.1, 'mscale': 1.0,
                       'mscale_all_dim': 1.0, 'original_max_position_embeddings': 16384, 'rope_theta': 1000000.0,
                       'rope_type': 'yarn', 'type': 'yarn'}
LLAMA_3_OF_APERTUS = {'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                      'original_max_position_embeddings': 8192, 'rope_type': 'llama3'}
LONGROPE = {'type': 'longrope', 'short_factor': [1.0] * 48, 'long_factor': [1.0 + i for i in range(48)]}  # other numbers

PUBLISHED = {
  'google/gemma-2-2b': Published(
    config=GEMMA_2 | sizes(2304, 8, 4, 26, 9216, 256000, head_dim=256, query_pre_attn_scalar=256),
    parameters=2_614_341_888, period=2, facts={
      'tied_embeddings': True, 'embed_scale': 48.0, 'logits_softcap': 30.0, 'pattern[0].mixer.window': 4096,
      'pattern[1].mixer.window': None, 'pattern[0].mixer.softcap': 50.0, 'pattern[0].mixer.scale': None}),
  'google/gemma-2-27b': Published(
    config=GEMMA_2 | sizes(4608, 32, 16, 46, 36864, 256000, head_dim=128, query_pre_attn_scalar=144,
                           use_bidirectional_attention=None),
    parameters=27_227_128_320, period=2, facts={'pattern[0].mixer.scale': 1 / 12}),
  'google/gemma-3-270m': Published(
    config=GEMMA_3 | sizes(640, 4, 1, 18, 2048, 262144, _sliding_window_pattern=6, use_bidirectional_attention=False,
                           layer_types=(['sliding_attention'] * 5 + ['full_attention']) * 3),
    parameters=268_098_176, period=6, facts={'pattern[5].mixer.rope.theta': 1e6}),
  'google/gemma-3-1b-it': Published(
    config=GEMMA_3 | sizes(1152, 4, 1, 26, 6912, 262144, sliding_window_pattern=6),
    parameters=999_885_952, period=6, facts={
      'logits_softcap': None, 'pattern[4].mixer.window': 512, 'pattern[4].mixer.rope.theta': 1e4,
      'pattern[5].mixer.window': None, 'pattern[5].mixer.rope.theta': 1e6, 'pattern[5].mixer.rope.scaling': None}),
  'google/gemma-3-4b-it': Published(  # of 4,300,079,472: 416,866,032 are in the vision tower, 2,950,272 in the projector
    config=seeing('gemma3', 'siglip_vision_model', initializer_range=0.02, **GEMMA_3_SEEING, text=dict(
      model_type='gemma3_text', hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
      rope_scaling={'factor': 8.0, 'rope_type': 'linear'}, sliding_window=1024)),
    parameters=3_880_263_168, period=6, facts={
      'vocab_size': 262208, 'pattern[0].mixer.n_heads': 8, 'pattern[0].mixer.n_kv_heads': 4, 'pattern[0].mixer.window': 1024,
      'pattern[0].mixer.rope.scaling': None, 'pattern[5].mixer.rope.scaling.factor': 8.0}),
  'google/gemma-3-27b-it': Published(  # of 27,432,406,640: 416,866,032 and 6,194,304 are not text
    config=seeing('gemma3', 'siglip_vision_model', initializer_range=0.02, **GEMMA_3_SEEING, text=dict(
      model_type='gemma3_text', head_dim=128, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
      num_hidden_layers=62, num_key_value_heads=16, query_pre_attn_scalar=168,
      rope_scaling={'factor': 8.0, 'rope_type': 'linear'}, sliding_window=1024)),
    parameters=27_009_346_304, period=6, facts={'pattern[0].mixer.scale': 168**-0.5}),
  'allenai/OLMo-2-0425-1B': Published(
    config=OLMO_2 | sizes(2048, 16, 16, 16, 8192, 100352), parameters=1_484_916_736,
    facts={'pattern[0].norm': 'post', 'pattern[0].mixer.qk_norm': 'all', 'norm.cast': 'after'}),
  'allenai/OLMo-2-1124-7B': Published(config=OLMO_2 | sizes(4096, 32, 32, 32, 11008, 100352), parameters=7_298_617_344),
  'allenai/Olmo-3-7B-Instruct': Published(
    config=OLMO | sizes(4096, 32, 32, 32, 11008, 100278, model_type='olmo3', max_position_embeddings=65536,
                        sliding_window=4096, layer_types=(['sliding_attention'] * 3 + ['full_attention']) * 8,
                        rope_scaling=YARN_OF_OLMO_3),
    parameters=7_298_011_136, period=4, facts={
      'pattern[2].mixer.window': 4096, 'pattern[2].mixer.rope.scaling': None, 'pattern[3].mixer.window': None,
      'pattern[3].mixer.rope.scaling.factor': 8.0, 'pattern[3].mixer.rope.scaling.amplitude': None}),
  'HuggingFaceTB/SmolLM3-3B': Published(
    config=sizes(
      2048, 16, 4, 36, 11008, 128256, model_type='smollm3', attention_bias=False, hidden_act='silu', mlp_bias=False,
      layer_types=['full_attention'] * 36, max_position_embeddings=65536, max_window_layers=28, no_rope_layer_interval=4,
      no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0,
      sliding_window=None, use_sliding_window=False),
    parameters=3_075_098_624, period=4, facts={
      'tied_embeddings': True, 'pattern[2].mixer.rope.theta': 5e6, 'pattern[3].mixer.rope': None}),
  'swiss-ai/Apertus-8B-2509': Published(
    config=sizes(
      4096, 32, 8, 32, 21504, 131072, model_type='apertus', attention_bias=False, hidden_act='xielu', mlp_bias=False,
      max_position_embeddings=65536, post_norm=False, qk_norm=True, rms_norm_eps=1e-5, tie_word_embeddings=False,
      rope_theta=12000000, rope_scaling=LLAMA_3_OF_APERTUS),
    parameters=8_053_338_176, facts={'pattern[0].mlp.gated': False, 'pattern[0].mlp.activation': 'xielu'}),
  'microsoft/Phi-3-mini-4k-instruct': Published(
    config=PHI | sizes(3072, 32, 32, 32, 8192, 32064, max_position_embeddings=4096, original_max_position_embeddings=4096,
                       rope_scaling=None, rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False),
    parameters=3_821_079_552, facts={'pattern[0].mixer.window': 2047, 'pattern[0].mixer.head_dim': 96}),
  'microsoft/phi-4': Published(
    config=PHI | sizes(5120, 40, 10, 40, 17920, 100352, max_position_embeddings=16384, rope_scaling=None,
                       original_max_position_embeddings=16384, rope_theta=250000, sliding_window=None,
                       tie_word_embeddings=False),
    parameters=14_659_507_200, facts={'pattern[0].mixer.rope.theta': 250000.0}),
  'microsoft/Phi-4-mini-instruct': Published(
    config=PHI | sizes(3072, 24, 8, 32, 8192, 200064, max_position_embeddings=131072, original_max_position_embeddings=4096,
                       partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True, full_attn_mod=1,
                       interpolate_factor=1, lm_head_bias=False, mlp_bias=False, rope_theta=10000.0, rope_scaling=LONGROPE),
    parameters=3_836_021_760, facts={
      'pattern[0].mixer.rope.fraction': 0.75, 'pattern[0].mixer.rope.scaling.divisors[47]': 1.0,
      'pattern[0].mixer.rope.scaling.amplitude': 1.1902380714238083}),
  'openai-community/gpt2': Published(
    config=GPT_2 | dict(n_embd=768, n_head=12, n_layer=12), parameters=124_439_808,
    facts={'max_positions': 1024, 'tied_embeddings': True, 'pattern[0].mixer.rope': None, 'norm.kind': 'layer'}),
  'openai-community/gpt2-xl': Published(
    config=GPT_2 | dict(n_embd=1600, n_head=25, n_layer=48), parameters=1_557_611_200, facts={'pattern[0].mlp.d_ff': 6400}),
  'mistralai/Mistral-Small-3.1-24B-Base-2503': Published(
    config=seeing('mistral3', 'pixtral', **MISTRAL_3_SEEING, text=sizes(
      5120, 32, 8, 40, 32768, 131072, model_type='mistral', head_dim=128, hidden_act='silu', rms_norm_eps=1e-5,
      max_position_embeddings=131072, rope_theta=1000000000.0, sliding_window=None)),
    parameters=23_572_403_200, facts={'tied_embeddings': False, 'pattern[0].mixer.rope.theta': 1e9}),
  'mistralai/Ministral-3-3B-Base-2512': Published(  # '3.4B', beside a vision tower of '0.4B'
    config=seeing('mistral3', 'pixtral', **MISTRAL_3_SEEING, text=sizes(
      3072, 32, 8, 26, 9216, 131072, model_type='ministral3', head_dim=128, hidden_act='silu', rms_norm_eps=1e-5,
      max_position_embeddings=262144, sliding_window=None, tie_word_embeddings=True, rope_parameters=YARN_OF_MINISTRAL_3)),
    parameters=3_429_006_336, facts={
      'pattern[0].mixer.query_growth.beta': 0.1, 'pattern[0].mixer.query_growth.length': 16384,
      'pattern[0].mixer.rope.scaling.amplitude': 1.0}),
}
each = pytest.mark.parametrize('published', PUBLISHED.values(), ids=PUBLISHED)


@each
def test_a_published_config_gives_the_model_that_was_published(mesh_of, published):
  family, model, _ = families.read_config(published.config)
  with mesh_of(1):
    like, slots = convert.parameters_of(model)
  convert.bind(choose(family.tensors(model)), slots)
  assert sum(leaf.size for leaf in like.values()) == published.parameters
  assert len(model.pattern) == published.period
  flat = typed_json.flat(typed_json.encode(model, DecoderConfig))
  for path, value in published.facts.items():
    assert flat[path] == (pytest.approx(value) if isinstance(value, float) else value), path


@each
def test_a_published_model_is_written_as_it_is_read(published):
  family, model, _ = families.read_config(published.config)
  written_by, config = families.choose_family(model, family)
  assert written_by is family or published.config['text_config']['model_type'] == 'mistral'
  again = families.read_config({'max_position_embeddings': 2**20} | config)[1]
  assert [path for path in families.differences(model, again) if not path.startswith(families.ROUNDING)] == []


@pytest.mark.parametrize('config, says', [
  (seeing('mistral3', 'pixtral', dict(model_type='mistral4')), "text_config: model_type='mistral4' is not supported"),
  (GEMMA_3 | sizes(640, 4, 1, 18, 2048, 262144, use_bidirectional_attention=True), 'use_bidirectional_attention=True'),
  (GEMMA_2 | sizes(2304, 8, 4, 26, 9216, 256000) | dict(sliding_window=None), 'sliding_window is null, and there'),
  (PHI | sizes(64, 4, 4, 2, 64, 64, rope_scaling=LLAMA_3_OF_APERTUS), 'here it can be longrope'),
  (PHI | sizes(64, 4, 4, 2, 64, 64, full_attn_mod=2), 'full_attn_mod=2 is not supported'),
  (GPT_2 | dict(n_embd=768, n_head=11, n_layer=12), 'n_embd=768 is not a multiple of n_head=11'),
  (GPT_2 | dict(n_embd=768, n_head=12, n_layer=12, scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx'),
  (GPT_2 | dict(n_embd=768, n_head=12, n_layer=12, activation_function='gelu'), "activation_function='gelu' is not"),
  (OLMO_2 | sizes(64, 4, 4, 2, 64, 64, clip_qkv=8.0), 'clip_qkv=8.0'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_cannot_be_honoured_is_refused(config, says):
  with pytest.raises(ValueError, match=says):
    families.read_config(config)
