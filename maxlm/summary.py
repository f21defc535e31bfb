"""What a person sees of a run when it has ended: scores beside what they are compared with, and what the model writes."""

import json
from pathlib import Path

import jax
import tokenizers

from data_pipeline import loader
from maxlm import diffusion, lora
from maxlm.config import Experiment
from maxlm.decode import generate
from maxlm.metrics import duration
from maxlm.models.decoder import Decoder
from maxlm.sharding import make_mesh

PROMPTS = ('', 'The ', 'To create a ')  # of a model of documents


def before(workdir: Path) -> dict[str, float]:
  """The held-out loss of what a run started from, by source, as it was recorded before the first step."""
  for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
    record = json.loads(line)
    losses = {name.removeprefix('eval/loss/'): value for name, value in record.items() if name.startswith('eval/loss/')}
    if losses and record['step'] == 0:
      return losses
  return {}


def sample(config: Experiment, corpus: loader.Corpus, params: Decoder) -> str:
  """A few documents that the model makes up; or what it answers in conversations that were held out."""
  tokenizer = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_path))
  params = jax.jit(lora.merge)(params) if config.lora else params  # decoding may use weights otherwise than as matrices
  chats = corpus.chat_template is not None
  prompts = held_out_questions(corpus, len(PROMPTS)) if chats else [
    [corpus.bos, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in PROMPTS]
  how = dict(temperature=0.0) if chats else dict(temperature=0.8, top_p=0.95)
  compute = config.resolved(jax.default_backend())
  mesh = make_mesh(config.mesh.with_whole_rows(jax.device_count()))
  with jax.set_mesh(mesh):
    params = jax.device_put(params, jax.tree.map(lambda w: jax.NamedSharding(mesh, w.sharding.spec), params))
    known = dict(eos=[corpus.eot], max_tokens=64, seed=config.seed)
    if config.model.mask_token is None:
      out = generate(params, config.model, compute, prompts, **known, **how)
    else:
      out = diffusion.sample(params, config.model, compute, prompts, how=diffusion.Sampling(**how), **known)
  texts = [tokenizer.decode(prompt) + tokenizer.decode(ids) for prompt, ids in zip(prompts, out)]
  title = 'What it answers to held-out questions' if chats else 'What it writes (temperature 0.8, top-p 0.95)'
  return '\n'.join([f'{title}:', *(f'  {" ".join(text.split())}' for text in texts)])


def held_out_questions(corpus: loader.Corpus, n: int) -> list[list[int]]:
  """The tokens of n held-out conversations up to the first answer."""
  questions = []
  for source in corpus.sources:
    for batch in loader.validation_batches(corpus, source, 1, n if corpus.table(source, 'validation').masked else 0):
      is_first = batch['segment_ids'][0] == 1
      answers = batch['loss_mask'][0][is_first].tolist()
      questions.append(batch['tokens'][0][is_first][:answers.index(1) + 1].tolist())
  return questions[:n]


def report(workdir: Path, config: Experiment, corpus: loader.Corpus, summary: dict, samples: str) -> str:
  """The summary of DONE and the samples, for people."""
  ask = '--prompt="To create a table"' if corpus.chat_template is None else '--chat="What does a list do?"'
  if config.init_from:
    title, columns = 'held-out loss, nats a token', {'before': summary['before'], 'after': summary['loss']}
  else:
    title, columns = 'held-out bits per byte', {'model': summary['bits_per_byte']} | {
      name: {source: values[kind] for source, values in summary['baselines'].items()}
      for name, kind in (('gzip -9', 'gzip'), ('unigram', 'unigram'))}
  rows = [f'{title:28}' + ''.join(f'{name:>9}' for name in columns)]
  rows += [f'{source:28}' + ''.join(f'{column[source]:9.3f}' for column in columns.values()) for source in summary['loss']]
  return '\n'.join(['', *rows, '', samples, '',
                    f'Finished in {duration(summary["seconds"])}. Its plots: {workdir}/report.html. Try next:',
                    f'  python -m maxlm.generate --checkpoint={workdir} {ask}',
                    f'  python -m maxlm.evaluate --checkpoint={workdir}',
                    '  python -m maxlm.train --help'])
