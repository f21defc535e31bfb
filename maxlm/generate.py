"""Writes on from a prompt: `python -m maxlm.generate --checkpoint=WORKDIR[@STEP] --prompt=TEXT`, or `--chat=TEXT` to ask."""

import json

from data_pipeline import chat, tokenizer
from maxlm import diffusion, flags
from maxlm.checkpoint import parse
from maxlm.decode import generate
from maxlm.load import Model, load

CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'WORKDIR of a run (its newest checkpoint) or WORKDIR@STEP')
PROMPT = flags.DEFINE_string('prompt', '', 'the beginning of a document; empty: the model begins by itself')
CHAT = flags.DEFINE_string('chat', '', 'a question, written as the conversations were that the model was fine-tuned on')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 200, 'at most so many new tokens; a document that ends earlier ends there')
SAMPLES = flags.DEFINE_integer('samples', 1, 'how many continuations')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token; 1 samples from the model as it is')
TOP_P = flags.DEFINE_float('top_p', 0.95, 'sample from the likeliest tokens that have this much probability together')
SEED = flags.DEFINE_integer('seed', 0, 'the same seed gives the same text on the same devices')
STEPS = flags.DEFINE_integer('steps', None, 'of a diffusion model: passes in which its tokens are filled in (default: one a '
                             'token)')
BLOCK = flags.DEFINE_integer('block', None, 'of a diffusion model: tokens that are filled in before those after them '
                             '(default: all at once)')
ORDER = flags.DEFINE_enum('order', 'confidence', ['confidence', 'random'], 'of a diffusion model: which tokens come first')
AS_JSON = flags.DEFINE_bool('json', False, 'one JSON object a sample, with its token ids, instead of text')


def main() -> int:
  if not CHECKPOINT.value:
    raise ValueError('give --checkpoint=WORKDIR of a run, such as --checkpoint=runs/quickstart')
  if SAMPLES.value < 1:
    raise ValueError(f'--samples={SAMPLES.value} must be at least 1')
  if PROMPT.value and CHAT.value:
    raise ValueError('give --prompt or --chat, not both')
  model = load(CHECKPOINT.value)
  prompt = question(model) if CHAT.value else model.prompt(PROMPT.value)
  samples = write(model, [prompt] * SAMPLES.value)
  for i, ids in enumerate(samples):
    text = PROMPT.value + model.tokenizer.decode(ids)
    if AS_JSON.value:
      print(json.dumps({'text': text, 'prompt_tokens': prompt, 'tokens': ids, 'step': model.step}))
    else:
      print(f'--- {i + 1}\n{text}' if SAMPLES.value > 1 else text)
  return 0


def write(model: Model, prompts: list[list[int]]) -> list[list[int]]:
  """As the flags say, token after token, or by filling in masked tokens if the model is made for that."""
  common = dict(eos=model.eos, max_tokens=MAX_TOKENS.value, seed=SEED.value)
  how = dict(temperature=TEMPERATURE.value, top_p=TOP_P.value)
  if model.model.mask_token is None:
    for flag in (STEPS, BLOCK, ORDER):
      if flag.value != flag.default:
        raise ValueError(f'--{flag.name}={flag.value} is for models of masked diffusion, and this one predicts next tokens')
    return generate(model.params, model.model, model.compute, prompts, **common, **how)
  sampling = diffusion.Sampling(steps=STEPS.value, block=BLOCK.value, order=ORDER.value, **how)
  return diffusion.sample(model.params, model.model, model.compute, prompts, how=sampling, **common)


def question(model: Model) -> list[int]:
  """The tokens of --chat in the chat template of the workdir, or in ours where it has none, up to the answer."""
  _, facts = tokenizer.facts_of(parse(CHECKPOINT.value)[0])
  template = chat.Template(facts['chat_template'], facts['bos'], facts['eot'])
  text = template.render([{'role': 'user', 'content': CHAT.value}], ask=True)
  return model.tokenizer.encode(text, add_special_tokens=False).ids


if __name__ == '__main__':
  flags.run(main)
