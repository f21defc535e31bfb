"""Writes on from a prompt: `python -m maxlm.generate --checkpoint=WORKDIR[@STEP] --prompt=TEXT`."""

import json

from maxlm import flags
from maxlm.decode import generate
from maxlm.load import load

CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'WORKDIR of a run (its newest checkpoint) or WORKDIR@STEP')
PROMPT = flags.DEFINE_string('prompt', '', 'the beginning of a document; empty: the model begins by itself')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 200, 'at most so many new tokens; a document that ends earlier ends there')
SAMPLES = flags.DEFINE_integer('samples', 1, 'how many continuations')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token; 1 samples from the model as it is')
TOP_P = flags.DEFINE_float('top_p', 0.95, 'sample from the likeliest tokens that have this much probability together')
SEED = flags.DEFINE_integer('seed', 0, 'the same seed gives the same text on the same devices')
AS_JSON = flags.DEFINE_bool('json', False, 'one JSON object a sample, with its token ids, instead of text')


def main() -> int:
  if not CHECKPOINT.value:
    raise ValueError('give --checkpoint=WORKDIR of a run, such as --checkpoint=runs/quickstart')
  if SAMPLES.value < 1:
    raise ValueError(f'--samples={SAMPLES.value} must be at least 1')
  model = load(CHECKPOINT.value)
  prompt = model.prompt(PROMPT.value)
  samples = generate(model.params, model.model, model.compute, [prompt] * SAMPLES.value, eos=model.eos,
                     max_tokens=MAX_TOKENS.value, temperature=TEMPERATURE.value, top_p=TOP_P.value, seed=SEED.value)
  for i, ids in enumerate(samples):
    text = PROMPT.value + model.tokenizer.decode(ids)
    if AS_JSON.value:
      print(json.dumps({'text': text, 'prompt_tokens': prompt, 'tokens': ids, 'step': model.step}))
    else:
      print(f'--- {i + 1}\n{text}' if SAMPLES.value > 1 else text)
  return 0


if __name__ == '__main__':
  flags.run(main)
