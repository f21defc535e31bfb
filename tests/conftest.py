"""What every test process starts with: the CPU, eight fake devices, a compile cache, and meshes for the asking.

The eight devices exist in the test processes alone. A command that a test starts sees one device, as a user's would; it
inherits the platform and the compile cache.
"""

import contextlib
import os
from pathlib import Path

# Before the first import of jax, here and in whatever a test starts.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(Path(__file__).parents[1] / '.cache' / 'jax'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
# With a limit, jax takes a file lock around each read and write; without one, a test worker may read an entry that the
# other has half written.
os.environ['JAX_COMPILATION_CACHE_MAX_SIZE'] = str(4 << 30)

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)

from maxlm.sharding import MeshConfig, make_mesh


@pytest.fixture(scope='session')
def mesh_of():
  """mesh_of(n_devices, tensor=2, …): a context in which that mesh is the current one; it yields the mesh.

  fsdp takes the devices that the named axes leave, unless it is named too. mesh_of(1): one device, nothing is split.
  """

  @contextlib.contextmanager
  def mesh(n_devices: int, **sizes: int):
    devices = make_mesh(MeshConfig(**sizes), jax.devices()[:n_devices])
    with jax.set_mesh(devices):
      yield devices

  return mesh
