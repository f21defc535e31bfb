"""What both ends of gpu.py train. Needs only Python's standard library, 3.11 or newer: PyTorch has its own interpreter."""

import dataclasses
import json
import sys

# AdamW with decay and clipping, the same for both.
LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP = 3e-4, 0.9, 0.95, 1e-8, 0.1, 1.0
NORM_EPS, ROPE_THETA = 1e-6, 500_000.0


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and a batch. n_experts=0: an MLP of d_ff; else experts of d_ff, of which a token gets k. documents: of a row,
  equally long; with more than one only MaxLM is measured. attention, experts: MaxLM's kernels ('': as it chooses)."""

  name: str
  n_layers: int
  d_model: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  n_experts: int
  k: int
  vocab: int
  seq_len: int
  rows: int
  documents: int = 1
  warm_up: int = 20
  spans: int = 5
  steps: int = 10  # of a span, which is timed as a whole
  compiled: bool = True  # by torch.compile
  attention: str = ''
  experts: str = ''

  @property
  def tokens(self) -> int:
    return self.rows * self.seq_len


DENSE = Case('dense', n_layers=16, d_model=2048, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=8192, n_experts=0, k=0,
             vocab=32_768, seq_len=4096, rows=8)  # 1.14B parameters
MOE = dataclasses.replace(DENSE, name='moe', d_ff=1664, n_experts=16, k=4)  # 0.99B of 2.95B parameters active
CASES = {'dense': DENSE, 'moe': MOE, 'packed': dataclasses.replace(DENSE, name='packed', documents=8)}


def tiny(case: Case) -> Case:
  """The same, small enough for two steps on a CPU."""
  return dataclasses.replace(
    case, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=64 if case.n_experts else 128,
    n_experts=min(case.n_experts, 8), k=min(case.k, 2), vocab=512, seq_len=128, rows=2, warm_up=1, spans=1, steps=1,
    compiled=False)


def case_of_argv() -> Case:
  return Case(**json.loads(sys.argv[1]))


def report(facts: dict) -> None:
  """The worker's last line on stdout."""
  print(json.dumps(facts), flush=True)
