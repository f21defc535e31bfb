"""Tasks of lm-evaluation-harness (extra `eval`), answered by a model of ours.

The harness makes prompts and metrics. `HarnessLM` answers its three kinds of requests, and differs from the harness's own
`HFLM` in two things: a text begins with the token that began documents in training, and in rolling requests that token is
not predicted itself. Its cache of answers is JSON, not pickles.
"""

import collections
import contextlib
import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from maxlm import typed_json
from maxlm.continuations import Scorer, rows_at_a_time
from maxlm.decode import Generator
from maxlm.load import Model
from maxlm.models.decoder import DecoderConfig

MAX_LENGTH, MAX_GEN_TOKS = 2048, 256  # where neither the model nor the task says how many; the harness's own


def run(model: Model, tasks: list[str], *, task_dir: str = '', num_fewshot: int | None = None, limit: int | None = None,
        batch_size: int = 8, max_length: int | None = None, cache: str = '') -> dict[str, Any]:
  """The harness's report on `tasks`, as `lm_eval.simple_evaluate` returns it, without samples.

  task_dir: YAML files of tasks. max_length: see `HarnessLM`. cache: a directory of answers, which a later run takes up.
  """
  manager = task_manager(tasks, task_dir)
  lm = HarnessLM(model, max_length=max_length, batch_size=batch_size, cache=cache)
  with contextlib.redirect_stdout(sys.stderr):
    report = simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False)
  if lm.n_cut:
    print(f'{lm.n_cut} requests were longer than max_length={lm.max_length} and lost their beginning', file=sys.stderr)
  return report


def task_manager(tasks: list[str], task_dir: str) -> TaskManager:
  """One that knows all `tasks`. The harness's own are read where they are needed only: there are 14,000 of them."""
  if task_dir and not Path(task_dir).is_dir():
    raise FileNotFoundError(f'--task_dir={task_dir}: no such directory')
  manager = TaskManager(include_path=task_dir or None, include_defaults=False)
  if not set(tasks) <= set(manager.all_subtasks):  # a group may be one of its own tasks
    manager = TaskManager(include_path=task_dir or None)
  for task in tasks:
    if task not in manager.all_tasks:
      like = ', '.join(difflib.get_close_matches(task, manager.all_tasks, n=3))
      raise ValueError(f'--tasks: the harness has no task {task!r}' + (f'; did you mean {like}?' if like else ''))
  return manager


class HarnessLM(TemplateLM):
  """A model as the harness sees it.

  max_length: tokens that the model is given at most; of longer contexts the end (None: as in training). batch_size: rows
  of 2,048 tokens at a time, or as many tokens in other rows. cache: a directory for answers ('': none).
  """

  def __init__(self, model: Model, *, max_length: int | None = None, batch_size: int = 8, cache: str = ''):
    super().__init__()
    self.model, self.batch_size = model, batch_size
    self.max_length = max_length or model.max_length or MAX_LENGTH
    self.n_cut = 0  # requests that were too long
    self.scorer = Scorer(model.model, model.compute, max_length=self.max_length, batch_size=batch_size)
    self.generators = {}  # (temperature, top_p) -> Generator
    self.answers = Answers(Path(cache) / f'{fingerprint(model, self.max_length)}.jsonl' if cache else None)

  @property
  def eot_token_id(self) -> int:
    return self.model.eos[0] if self.model.eos else self.prefix_token_id

  @property
  def prefix_token_id(self) -> int:
    if self.model.bos is None and not self.model.eos:
      raise ValueError('this model has no token that begins or ends a document: nothing can come before the first token')
    return self.model.eos[0] if self.model.bos is None else self.model.bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    if add_special_tokens is False:
      return self.model.tokenizer.encode(string, add_special_tokens=False).ids
    return self.model.prompt(string)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if not context.strip():  # the harness moves spaces to the continuation, and nothing is left
      return [self.prefix_token_id], self.tok_encode(context + continuation, add_special_tokens=False)
    return super()._encode_pair(context, continuation)

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    for (context, continuation), _, tokens in requests:
      if not tokens:
        raise ValueError(f'{continuation!r} after {context[-40:]!r} has no token of its own')
    self.n_cut += sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
    return self._score([pair for _, *pair in requests])

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    windows = []  # of each text: disjoint ones, each as long as it can be
    for request in requests:
      text = self.tok_encode(request.args[0], add_special_tokens=False)
      windows.append([make_disjoint_window(window) for window in
                      get_rolling_token_windows(text, self.prefix_token_id, self.max_length, context_len=1)])
    answers = iter(self._score([pair for pairs in windows for pair in pairs]))
    return [sum(next(answers)[0] for _ in pairs) for pairs in windows]

  def _score(self, pairs) -> list[tuple[float, bool]]:
    ask = lambda missing: self.scorer(self.model.params, [pair for _, *pair in missing])
    return [tuple(answer) for answer in self.answers.of([('score', *pair) for pair in pairs], ask)]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    asked, times = [], collections.Counter()
    for text, kwargs in (request.args for request in requests):
      how = settings(kwargs)
      room = self.max_length - how['max_tokens']
      if room < 1:
        raise ValueError(f'a task writes {how["max_tokens"]} tokens (max_gen_toks): with max_length={self.max_length} that '
                         'leaves none for its prompt')
      prompt = self.model.prompt(text)
      self.n_cut += len(prompt) > room
      asked.append(('write', prompt[-room:], how, times[text]))
      times[text] += how['temperature'] > 0  # another sample each time
    return self.answers.of(asked, self._write)

  def _write(self, requests) -> Iterator[tuple[int, str]]:
    """Texts, in batches of prompts of like length that are written on in the same way."""
    groups = collections.defaultdict(list)
    for i, (_, _, how, _) in enumerate(requests):
      groups[json.dumps(how)].append(i)
    for group in groups.values():
      group.sort(key=lambda i: len(requests[i][1]), reverse=True)
      how = requests[group[0]][2]
      size = rows_at_a_time(self.batch_size, power_of_two(len(requests[group[0]][1])) + how['max_tokens'])
      for batch in (group[start:start + size] for start in range(0, len(group), size)):
        yield from zip(batch, self._write_batch([requests[i] for i in batch], how, size))

  def _write_batch(self, requests, how: dict[str, Any], size: int) -> list[str]:
    chance = how['temperature'], how['top_p']
    if chance not in self.generators:
      self.generators[chance] = Generator(self.model.model, self.model.compute, eos=self.model.eos, temperature=chance[0],
                                          top_p=chance[1])
    decode = self.model.tokenizer.decode
    prompts = [prompt for _, prompt, *_ in requests]
    filled = prompts + prompts[-1:] * (min(size, power_of_two(len(prompts))) - len(prompts))  # few shapes to compile
    written = self.generators[chance](
      self.model.params, filled, max_tokens=how['max_tokens'], columns=power_of_two(max(map(len, prompts))),
      seed=int(digest(requests)[:7], 16), enough=lambda tokens: any(stop in decode(tokens) for stop in how['until']))
    return [postprocess_generated_text(decode(tokens), how['until'], None) for tokens in written[:len(prompts)]]


def settings(kwargs: dict[str, Any]) -> dict[str, Any]:
  """How a task wants its texts written. ValueError for what we cannot do."""
  kwargs = dict(normalize_gen_kwargs(kwargs, MAX_GEN_TOKS))
  how = {'until': [stop for stop in kwargs.pop('until') if stop], 'max_tokens': kwargs.pop('max_gen_toks'),
         'temperature': 0.0, 'top_p': 1.0}
  sampling = {'temperature': float(kwargs.pop('temperature', 1.0)), 'top_p': float(kwargs.pop('top_p', 1.0))}
  if kwargs.pop('do_sample'):
    how |= sampling
  for name, value in kwargs.items():
    if (name, value) != ('num_beams', 1) and not (name in ('top_k', 'min_p') and how['temperature'] == 0):
      raise ValueError(f'a task asks for {name}={value} in its generation_kwargs, which we cannot do')
  return how


class Answers:
  """Known answers: in memory, and in a file that gets a line [digest of the request, answer] for each at once."""

  def __init__(self, path: Path | None):
    self.known, self.file = {}, None
    if path is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      self.file = open(path, 'a+', buffering=1, encoding='utf-8')
      self.file.seek(0)
      lines = self.file.read()
      whole = lines[:lines.rfind('\n') + 1]  # a kill may have left half a line
      self.file.truncate(len(whole.encode()))
      self.known = dict(map(json.loads, whole.splitlines()))

  def of(self, requests: list, ask: Callable[[list], Iterable[tuple[int, Any]]]) -> list:
    """Answers to all requests. `ask` is given those without one, each once, and yields (index among them, answer)."""
    keys = [digest(request) for request in requests]
    missing = {key: request for key, request in zip(keys, requests) if key not in self.known}
    names = list(missing)
    for i, answer in ask(list(missing.values())) if missing else ():
      self.known[names[i]] = answer
      if self.file is not None:
        self.file.write(json.dumps((names[i], answer)) + '\n')
    return [self.known[key] for key in keys]


def fingerprint(model: Model, max_length: int) -> str:
  """Of all that answers depend on: weights, architecture, tokenizer, dtype, what is cut off."""
  weights = jax.jit(lambda params: [bits_sum(leaf) for leaf in jax.tree.leaves(params)])(model.params)
  return digest([list(map(int, weights)), typed_json.encode(model.model, DecoderConfig), model.tokenizer_text, model.bos,
                 model.begins, model.eos, model.compute.dtype, max_length])[:16]


def bits_sum(leaf: jax.Array) -> jax.Array:
  """A hash of an array, the same on any mesh: the sum, modulo 2^32, of each element's bits mixed with its place."""
  bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
  place = jnp.uint32(0)
  for dim, size in enumerate(leaf.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim, out_sharding=jax.typeof(leaf).sharding.spec)
    place = place * jnp.uint32(size) + index
  mixed = (bits ^ place * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
  return jnp.sum((mixed ^ mixed >> 15) * jnp.uint32(0xC2B2AE35), dtype=jnp.uint32)


def digest(value) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def power_of_two(n: int) -> int:
  """The least that is at least n."""
  return 1 << (n - 1).bit_length()
