"""What the documentation says is so: its commands run or at least exist, its links lead somewhere, its tables are true.

A ```bash block that opens with the line `# run by the tests` is run, with the others of its page, in order, in a
directory that looks like the root of a clone; `# run by the slow tests` is for what takes more than a minute. Of every
other ```bash block, each `python -m MODULE --flag` and `python FILE --flag` must exist, by its own --help.
docs/style.md tells writers.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm import sharding

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
MARKS = {'# run by the tests': 'fast', '# run by the slow tests': 'slow'}
BLOCK_SECONDS = {'fast': 300, 'slow': 1500}


def blocks(text: str) -> list[tuple[str, str]]:
  """('fast' | 'slow' | 'read', commands) of each ```bash block of a page."""
  found = []
  for body in re.findall(r'^```bash\n(.*?)^```', text, re.MULTILINE | re.DOTALL):
    found.append((MARKS.get(body.split('\n')[0].strip(), 'read'), body))
  return found


def commands(block: str) -> list[list[str]]:
  """The words of each command of a block: continued lines joined, pipes and && taken apart, comments dropped."""
  text = re.sub(r'(^|\s)#.*', '', block, flags=re.MULTILINE).replace('\\\n', ' ').replace('\n', ' ; ')
  lexer = shlex.shlex(text, posix=True, punctuation_chars=';&|()')
  lexer.whitespace_split = True
  lexer.commenters = ''
  found = [[]]
  for word in lexer:
    if word and set(word) <= set(';&|()'):
      found.append([])
    else:
      found[-1].append(word)
  return [words for words in found if words]


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
  shown = subprocess.run([sys.executable, *program, '--help'], cwd=ROOT, capture_output=True, text=True, timeout=120,
                         env=os.environ | {'PYTHONPATH': str(ROOT), 'COLUMNS': '200'})
  return shown.stdout + shown.stderr


def check_command(words: list[str]) -> list[str]:
  """Complaints about a command of ours that does not exist as written; none about anybody else's."""
  while words and re.fullmatch(r'\w+=.*', words[0]):
    words = words[1:]  # VARIABLE=value in front
  if not words or Path(words[0]).name not in ('python', 'python3'):
    return []
  program = tuple(words[1:3]) if words[1:2] == ['-m'] else tuple(words[1:2])
  if program[:1] == ('-m',):
    room, *inner = program[1].split('.')
    if not (ROOT / room).is_dir():
      return []  # pip, venv, pytest …
    if not any((ROOT / room / Path(*inner)).with_suffix(suffix).exists() for suffix in ('.py', '')):
      return [f'python -m {program[1]}: there is no such module']
  elif not program or program[0].startswith('-') or not (ROOT / program[0]).exists():
    return [f'{" ".join(words)}: there is no such file']
  arguments, rest = words[1 + len(program):], []
  if '--' in arguments:  # what follows is for the command that this one starts
    arguments, rest = arguments[:arguments.index('--')], arguments[arguments.index('--') + 1:]
  flags = [word.split('=')[0] for word in arguments if word.startswith('--') and len(word) > 2]
  configs = tuple(word for word in arguments if word.startswith('--config='))
  known = set(re.findall(r'--[\w.\-\[\]]+', help_of((*program, *configs)))) if flags else set()
  unknown = [f'{" ".join(program)}: --help does not know {flag}' for flag in flags
             if flag.replace('--no', '--', 1) not in known and flag not in known]
  return unknown + (check_command(['python', '-m', 'maxlm.train', *configs, *rest]) if rest else [])


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
  complaints = [complaint for kind, block in blocks(page.read_text()) if kind == 'read'
                for words in commands(block) for complaint in check_command(words)]
  assert not complaints, '\n' + '\n'.join(complaints)


def test_a_command_that_does_not_exist_is_found():
  read = '```bash\nX=1 python -m maxlm.trian --a=x && echo done  # don\'t\n  python tests/gone.py \\\n  --b\n```\n'
  (kind, block), = blocks(read)
  assert kind == 'read' and [bool(check_command(words)) for words in commands(block)] == [True, False, True]
  assert check_command(['python', 'tests/benchmarks/cpu.py', '--rounds=2', '--sleep=3']) == [
    'tests/benchmarks/cpu.py: --help does not know --sleep']
  assert check_command(['python', '-m', 'launch.tpu', 'up', '--config=configs/tiny.py', '--', '--config.tokns=1']) == [
    '-m maxlm.train: --help does not know --config.tokns']
  assert check_command(['pip', 'install', '--whatever']) == [] == check_command(['.venv/bin/python', '-m', 'pytest', '--x'])


def clone_at(directory: Path) -> dict[str, str]:
  """Makes the directory look like the root of a clone (what commands write there stays there); its environment."""
  for entry in ROOT.iterdir():
    if entry.name not in ('runs', 'corpora') and not entry.name.startswith('.'):
      (directory / entry.name).symlink_to(entry)
  path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  return os.environ | {'PATH': path, 'PYTHONPATH': str(directory)}


def run_blocks(bodies: list[str], directory: Path, seconds: int) -> None:
  environment = clone_at(directory)
  for body in bodies:
    ran = subprocess.run(['bash', '-euo', 'pipefail', '-c', body], cwd=directory, env=environment, timeout=seconds,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, f'exit code {ran.returncode} of\n{body}\n{ran.stdout[-4000:]}'


def pages_with(kind: str) -> list[Path]:
  return [page for page in PAGES if any(found == kind for found, _ in blocks(page.read_text()))]


@pytest.mark.parametrize('page', pages_with('fast'), ids=lambda page: page.name)
def test_commands_run(page, tmp_path):
  run_blocks([body for kind, body in blocks(page.read_text()) if kind == 'fast'], tmp_path, BLOCK_SECONDS['fast'])


@pytest.mark.slow
@pytest.mark.parametrize('page', pages_with('slow'), ids=lambda page: page.name)
def test_long_commands_run(page, tmp_path):
  run_blocks([body for kind, body in blocks(page.read_text()) if kind != 'read'], tmp_path, BLOCK_SECONDS['slow'])


def test_a_command_that_fails_is_found(tmp_path):
  with pytest.raises(AssertionError, match='exit code 3'):
    run_blocks(['false | cat || true\npython -c "import maxlm"\n', '(exit 3) | cat\n'], tmp_path, 60)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  links = re.findall(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)', page.read_text())
  assert [link for link in links if not (page.parent / link).exists()] == []
  named = re.findall(r'`((?:maxlm|data_pipeline|configs|launch|tests|docs)/[\w./-]+)`', page.read_text())
  assert [path for path in named if not (ROOT / path).exists()] == []


def partition(text: str) -> sharding.P:
  """The PartitionSpec that "P(FSDP, None)" writes."""
  return eval(text, {'__builtins__': {}, 'P': sharding.P, 'FSDP': sharding.FSDP})


def test_tables_of_dimensions_are_true():
  text = (ROOT / 'docs' / 'dims.md').read_text()
  letters = {letter: tuple(re.findall('`(\\w+)`', axes)) for letter, axes
             in re.findall(r'^\| `([A-Z])` \|[^|]*\|([^|]*)\|', text, re.MULTILINE)}
  assert {letter: axes for letter, axes in letters.items() if axes} == sharding.RULES
  examples = re.findall(r"`spec\('([A-Z]+)'(, gathered=True)?\)` \| `(P\(.*?\))` \|", text)
  assert len(examples) >= 10
  for dims, gathered, written in examples:
    assert partition(written) == sharding.spec(dims, gathered=bool(gathered)), (dims, gathered)
  axes = re.findall(r'^\| `([a-z]+)` \|', text, re.MULTILINE)
  assert tuple(axes) == sharding.AXES
