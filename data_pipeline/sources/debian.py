"""A source that any Debian or Ubuntu machine can fetch by name, with no account and no root: the pages of a package."""

import dataclasses
import fnmatch
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterator

from data_pipeline.recipe import Input, Limits, Raw, SourceUnavailable, Unreadable
from data_pipeline.sources.text import html_to_text

_TIMEOUT = 300  # seconds for each command


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class DebianPackage:
  """The HTML pages of Debian packages, in the order that they have there. packages: the one of the source's name if none."""

  name: str
  packages: tuple[str, ...] = ()
  pages: str = '*/html/*.html'  # which members
  limits: Limits = Limits()  # of a page

  def state(self) -> str:
    return ''  # the version that the machine's package lists name is taken, and recorded as the documents' lineage

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    """`apt-get download` into scratch; where the package lists are missing or stale, `apt-get update` into scratch first."""
    return [_download(package, scratch) for package in self.packages or (self.name,)]

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    """Streams the members of the package; nothing is unpacked to disk and no name in it is trusted."""
    damaged = f'{unit.lineage} is damaged: dpkg-deb cannot unpack it; run the build again to fetch it anew'
    command = ['dpkg-deb', '--fsys-tarfile', *unit.paths]
    package = unit.lineage.partition('_')[0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacker:
      try:
        with tarfile.open(fileobj=unpacker.stdout, mode='r|') as members:
          for member in members:
            if member.isreg() and fnmatch.fnmatchcase(member.name, self.pages):
              url = f'deb:{package}/{member.name.removeprefix("./")}'
              yield (Raw(url, members.extractfile(member).read()) if member.size <= self.limits.max_bytes else
                     Unreadable(url, 'too large', member.size))
      except tarfile.TarError as error:
        raise ValueError(damaged) from error
      unpacker.stdout.read()
    if unpacker.returncode:
      raise ValueError(damaged)

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    return html_to_text(raw.content), {}


def _download(package: str, scratch: pathlib.Path) -> Input:
  if not (shutil.which('apt-get') and shutil.which('dpkg-deb')):
    raise SourceUnavailable(f'the package {package} needs apt-get and dpkg-deb, which this machine does not have')
  folder, lists = scratch / package, scratch / 'lists'
  folder.mkdir(parents=True, exist_ok=True)
  (lists / 'partial').mkdir(parents=True, exist_ok=True)
  if _apt(['download', package], folder):
    own = ['-o', f'Dir::State::Lists={lists}', '-o', f'Dir::Cache={scratch}']
    update_error = _apt([*own, '-o', 'APT::Update::Error-Mode=any', 'update'], folder)
    if error := _apt([*own, 'download', package], folder):
      raise SourceUnavailable(f'apt-get cannot download the package {package}: {update_error or error}')
  path, = folder.glob('*.deb')
  return Input(paths=(str(path),), lineage=path.name.replace('%3a', ':'))


def _apt(arguments: list[str], folder: pathlib.Path) -> str:
  """Runs apt-get in a folder; '' if it worked, else an error of its own on one line."""
  options = ['-q', '-o', 'APT::Sandbox::User=', '-o', 'Acquire::Retries=1', '-o', 'Acquire::http::Timeout=20']
  try:
    done = subprocess.run(['apt-get', *options, *arguments], cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT,
                          check=False)
  except subprocess.TimeoutExpired:
    return f'no answer in {_TIMEOUT} seconds'
  if done.returncode == 0:
    return ''
  errors = [line for line in done.stderr.splitlines() if line.startswith('E: ')]
  return (errors or done.stderr.splitlines() or ['it failed without a message'])[0].removeprefix('E: ')
