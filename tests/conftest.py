"""What every test process starts with: the CPU, eight fake devices, a compile cache, and meshes for the asking.

The eight devices exist in the test processes alone. A command that a test starts sees one device, as a user's would; it
inherits the platform and the compile cache.
"""

import contextlib
import math
import os
import time
from pathlib import Path

# Before the first import of jax, here and in whatever a test starts.
os.environ['JAX_PLATFORMS'] = 'cpu'
# A cache for each test worker: where several write, jax needs a limit and a file lock, and then looks at every entry that
# there is before it adds one, which with thousands of them took as long as the tests.
CACHE = Path(__file__).parents[1] / '.cache' / 'jax' / os.environ.get('PYTEST_XDIST_WORKER', 'main')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.05'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

# Tests compile much and run little, and so do the commands they start: without optimisation both take half the time.
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0',
                                    '--xla_llvm_disable_expensive_passes=true'])

import jax
import pytest
from filelock import FileLock

jax.config.update('jax_num_cpu_devices', 8)

from maxlm.sharding import MeshConfig, make_mesh
from tests.make_corpus import make_corpus

BEGAN = time.monotonic()


def pytest_addoption(parser):
  parser.addoption('--minutes', type=float, default=math.inf, help='tests that have not begun after so long are skipped')


def pytest_runtest_setup(item):
  if time.monotonic() - BEGAN > 60 * item.config.getoption('--minutes'):
    pytest.skip('did not fit into --minutes')


@pytest.fixture(scope='module', autouse=True)
def no_mesh_is_left():
  """A mesh that a module's tests set for good, as commands do, is gone after them: others begin without one."""
  with jax.set_mesh(jax.sharding.get_mesh()):
    yield


@pytest.fixture(scope='session')
def mesh_of():
  """A context in which a mesh of fake devices is the current one; it yields the mesh.

  mesh_of(data=2, tensor=2): four devices, as many as the sizes say. mesh_of(8, tensor=2): eight, the rest along fsdp.
  mesh_of(1): one device, nothing is split.
  """

  @contextlib.contextmanager
  def mesh(n_devices: int | None = None, **sizes: int):
    devices = jax.devices()[:math.prod(sizes.values()) if n_devices is None else n_devices]
    current = make_mesh(MeshConfig(**sizes), devices)
    with jax.set_mesh(current):
      yield current

  return mesh


@pytest.fixture(scope='session')
def shared(tmp_path_factory) -> Path:
  """A directory that the processes of this test session have in common."""
  own = tmp_path_factory.getbasetemp()
  return own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own


@pytest.fixture(scope='session')
def corpus(shared) -> Path:
  """The directory of the small corpus that configs/tiny.py is for."""
  with FileLock(shared / 'corpus.lock'):
    if not (shared / 'corpus' / 'manifest.json').exists():
      make_corpus(shared / 'corpus')
  return shared / 'corpus'
