"""A run of three stages at the size of configs/tiny.py, for tests: `--config=tests/staged.py`.

base: a batch that grows. mid: other weights, rows that are one document, another mesh. long: rows twice as long, positions
stretched, a new optimizer.
"""

from configs import tiny
from maxlm.config import Experiment, Ramp, Stage, Stretch
from maxlm.layers.rope import YarnScaling
from maxlm.schedule import Schedule
from maxlm.sharding import MeshConfig

ENDS = {'base': 22, 'mid': 32, 'long': 40}  # steps; those of base are 12 of 8 rows and 10 of 16
N_STEPS = 40


def get_config(arg: str = '') -> Experiment:
  config = tiny.get_config()
  config.name, config.tokens = 'staged', 0
  config.optim.peak_lr, config.optim.schedule, config.optim.warmup_tokens = 0.0, 'wsd', 0
  config.evals.every_steps, config.evals.rows, config.checkpoint.keep_last = 0, 16, 100
  config.stages = (
    Stage(name='base', tokens=(12 * 8 + 10 * 16) * 64, lr=Schedule(peak_lr=3e-3, warmup_tokens=2048),
          ramp=(Ramp(rows=8, until_tokens=12 * 8 * 64),), batch_size=16),
    Stage(name='mid', tokens=10 * 16 * 64, lr=Schedule(peak_lr=3e-3, schedule='linear', end_lr=0.0), batch_size=16,
          mixture={'stories': 1, 'inventories': 3}, mask='row', mesh=MeshConfig(data=-1, fsdp=1)),
    Stage(name='long', tokens=8 * 8 * 128, lr=Schedule(peak_lr=1e-3, schedule='cosine', warmup_tokens=2048), seq_len=128,
          full=Stretch(scaling=YarnScaling(factor=2.0, original_length=64)), sliding=Stretch(window=32), optimizer='fresh'),
  )
  return config
