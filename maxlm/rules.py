"""Published rules for learning rate, batch and weight decay: `python -m maxlm.rules --params=1e9 --tokens=2e10`.

Each is a pure function with its source. All batches and lengths of runs are in tokens, learning rates are peak ones of AdamW
unless a rule says otherwise, decay is the weight_decay of `OptimConfig`, whose step takes lr * decay of a weight. A rule was
fitted to somebody's models, data and schedule: where they disagree by a factor of three, that is how much they know. They
say where to begin a sweep. From a tuned small model to a wide or deep one goes `maxlm.parametrisation`.

N parameters without embeddings  D tokens of the run  B tokens of a batch  C FLOPs of the run  TPP tokens a parameter, D / N
"""

import json
import math
from typing import NamedTuple

from maxlm import flags

PARAMS = flags.DEFINE_float('params', None, 'parameters of the model without embeddings')
TOKENS = flags.DEFINE_float('tokens', None, 'tokens of the run')
BATCH = flags.DEFINE_float('batch', None, 'tokens of a batch, for rules that ask for it (default: that of Power Lines)')
WIDTH = flags.DEFINE_integer('width', None, 'd_model, for the rule that asks for it')
AS_JSON = flags.DEFINE_bool('json', False, 'one JSON object instead of a table')

SEQUENCE = 2048  # tokens of a sequence, the unit of Power Lines' batches


class Advice(NamedTuple):
  """What a rule says; None where it says nothing. batch, warmup: tokens."""

  learning_rate: float | None = None
  batch: float | None = None
  decay: float | None = None
  b2: float | None = None
  eps: float | None = None
  warmup: float | None = None


def deepseek(flops: float) -> Advice:
  """DeepSeek LLM (arXiv 2401.02954, section 3.1), of FLOPs without embeddings, 1e17 to 2e19, AdamW, multi-step schedule."""
  return Advice(learning_rate=0.3118 * flops**-0.1250, batch=0.2920 * flops**0.3271)


def step_law(params: float, tokens: float) -> Advice:
  """Step Law (Li et al. 2025, arXiv 2503.04715, equation 1): dense models of 60M to 1B, cosine to a fixed last rate."""
  return Advice(learning_rate=1.79 * params**-0.713 * tokens**0.307, batch=0.58 * tokens**0.571)


def porian(params: float) -> Advice:
  """Porian et al. 2024 (arXiv 2406.19146) at 20 tokens a parameter, as OLMo-core's model ladder uses it, which halves the
  learning rate: b2 is higher where batches are small, and warm-up is as many tokens as there are parameters."""
  scale = params / 108e6
  batch = 2048 * 160 * scale ** (2 / 3)
  b2 = 0.99 if batch < 524_288 else 0.95
  return Advice(learning_rate=0.0047 * scale ** (-1 / 3) / 2, batch=batch, b2=b2, warmup=params)


def power_lines(params: float, tokens: float, learning_rate: float) -> Advice:
  """Power Lines (Bergsma et al. 2025, arXiv 2505.13738): the batch from the tokens, and for it and a learning rate the
  decay from the best timescale. Fitted with µP and a linear decay to zero."""
  batch = 0.0306 * tokens**0.383 * SEQUENCE
  return Advice(batch=batch, decay=decay_for_timescale(best_timescale(params, tokens), learning_rate, batch, tokens))


def best_timescale(params: float, tokens: float) -> float:
  """Share of the run over which AdamW's weights should average their updates (Power Lines, arXiv 2505.13738)."""
  return 1.084 * (tokens / params) ** -0.527


def timescale(learning_rate: float, decay: float, batch: float, tokens: float) -> float:
  """The same as it is: AdamW's weights are an average over the last 1 / (lr * decay) updates, here as a share of the run
  (Wang & Aitchison 2024, arXiv 2405.13698, who keep it while model and data grow)."""
  return batch / (learning_rate * decay * tokens)


def decay_for_timescale(share: float, learning_rate: float, batch: float, tokens: float) -> float:
  """The weight_decay that gives that timescale."""
  return batch / (learning_rate * share * tokens)


def nanochat(tokens: float, base_tokens: float, base_batch: float, base_learning_rate: float, base_decay: float) -> Advice:
  """nanochat (Karpathy, its base_train.py): from a tuned run to a longer one. Batch as D^0.383, to a power of two; learning
  rate as sqrt(B); decay as sqrt(B) / D."""
  batch = 2.0 ** round(math.log2(base_batch * (tokens / base_tokens) ** 0.383))
  grown = (batch / base_batch) ** 0.5
  return Advice(learning_rate=base_learning_rate * grown, batch=batch, decay=base_decay * grown * base_tokens / tokens)


def nanochat_decay(width: float, base_width: float, base_decay: float) -> float:
  """The weight decay that its sweeps found best falls as width^-2 (depth in proportion, tokens too)."""
  return base_decay * (base_width / width) ** 2


def delphi(tokens: float, batch: float) -> Advice:
  """Marin's Delphi (completed AdamH), from one tuned run of 2.5e9 tokens with batches of 64 x 4096. The learning rate
  is of AdamH, which keeps the norms of matrices, not of AdamW; `delphi_adam` is of the rest."""
  return Advice(learning_rate=0.0063 * (batch / DELPHI_BATCH) ** 0.5 * (DELPHI_TOKENS / tokens) ** 0.3, batch=batch,
                b2=min(max(0.9999 ** (batch / DELPHI_BATCH), 0.9), 0.9999), warmup=0.1 * tokens)


def delphi_adam(tokens: float, batch: float) -> Advice:
  """Of Delphi's embeddings, norms and head, which Adam trains: by the share that a batch is of the run."""
  grown = (batch / tokens) / (DELPHI_BATCH / DELPHI_TOKENS)
  return Advice(learning_rate=6.56e-4 * grown**0.5, batch=batch, eps=1.85e-8 * grown**-0.5, warmup=0.1 * tokens)


DELPHI_BATCH, DELPHI_TOKENS = 64 * 4096, 2.5e9


def marin_moe(tokens: float, batch: float, width: float) -> Advice:
  """Marin's mixtures of experts (issue 5951 of marin-community/marin)."""
  return Advice(learning_rate=0.06602 * tokens**-0.395 * width**-0.150 * batch**0.5, batch=batch)


# -- batches


def critical_batch_of_loss(loss: float) -> float:
  """Kaplan et al. 2020 (arXiv 2001.08361, section 5.1), from the loss in nats a token on their data: 2e8 / L^(1 / 0.21)."""
  return 2e8 / loss ** (1 / 0.21)


def critical_batch(tokens: float) -> float:
  """Power Lines (arXiv 2505.13738): 0.0471 * D^0.462 sequences. That it grows with data and not with the model is also what
  Zhang et al. 2024 (arXiv 2410.21676) find."""
  return 0.0471 * tokens**0.462 * SEQUENCE


def steps_and_tokens(batch: float, critical: float, least_steps: float) -> tuple[float, float]:
  """(steps, tokens) to one loss with that batch: (S / S_min - 1) (E / E_min - 1) = 1 (McCandlish et al. 2018, arXiv
  1812.06162, equation 2.11). least_steps: with an endless batch; the fewest tokens are least_steps * critical."""
  return least_steps * (1 + critical / batch), least_steps * critical * (1 + batch / critical)


def noise_scale(small: float, square_norm_small: float, big: float, square_norm_big: float) -> tuple[float, float, float]:
  """(tr(Sigma) / |G|^2 in the unit of the batches, |G|^2, tr(Sigma)): the batch at which the gradient's noise is as large as
  the gradient, from the mean squared norms of gradients of a small and of a big batch (arXiv 1812.06162, appendix A.1).

  Both estimates are without bias, and their quotient is not: average |G|^2 and tr(Sigma) over steps first. ValueError for
  batches that are not small and big.
  """
  if not 0 < small < big:
    raise ValueError(f'noise_scale takes a small batch and a bigger one, not {small} and {big}')
  square_norm = (big * square_norm_big - small * square_norm_small) / (big - small)
  trace = (square_norm_small - square_norm_big) / (1 / small - 1 / big)
  return trace / square_norm, square_norm, trace


# -- the command


def main() -> int:
  for flag in (PARAMS, TOKENS):
    if flag.value is None or flag.value < 1:
      raise ValueError(f'give --{flag.name}=1e9 or so, of the model and run that the rules are asked about')
  for flag in (BATCH, WIDTH):
    if flag.value is not None and flag.value < 1:
      raise ValueError(f'--{flag.name}={flag.value} must be at least 1')
  found = rules(PARAMS.value, TOKENS.value, BATCH.value, WIDTH.value)
  if AS_JSON.value:
    print(json.dumps({name: {key: value for key, value in advice._asdict().items() if value is not None}
                      for name, advice in found.items()}))
    return 0
  print(f'{PARAMS.value:.3g} parameters, {TOKENS.value:.3g} tokens: {TOKENS.value / PARAMS.value:.3g} a parameter, '
        f'{6 * PARAMS.value * TOKENS.value:.3g} FLOPs (6 N D)\n')
  print(f'{"rule":28}{"learning rate":>14}{"batch, tokens":>15}{"decay":>9}{"b2":>8}{"eps":>9}{"warm-up":>10}')
  for name, advice in found.items():
    rate, batch, *others = advice
    shown = [f'{rate:14.3g}' if rate else f'{"":14}', f'{batch:15,.0f}' if batch else f'{"":15}']
    shown += [f'{value:{width}.3g}' if value else ' ' * width for value, width in zip(others, (9, 8, 9, 10))]
    print(f'{name:28}{"".join(shown)}'.rstrip())
  given = 'as given' if BATCH.value else 'of Power Lines'
  print(f'\nDelphi{" and Marin MoE" if WIDTH.value else ""}: for the batch {given}. Power Lines: the decay for its batch '
        f'and the learning rate of Step Law.\ncritical batch {critical_batch(TOKENS.value):,.0f} tokens, best timescale of '
        f'AdamW {best_timescale(PARAMS.value, TOKENS.value):.3g} of the run (Power Lines)')
  return 0


def rules(params: float, tokens: float, batch: float | None = None, width: float | None = None) -> dict[str, Advice]:
  """What each rule says that can be asked with these. batch: None is that of Power Lines."""
  lines = power_lines(params, tokens, step_law(params, tokens).learning_rate)
  batch = batch or lines.batch
  found = {'DeepSeek': deepseek(6 * params * tokens), 'Step Law': step_law(params, tokens),
           'Porian, OLMo-core': porian(params), 'Power Lines': lines, 'Delphi, matrices (AdamH)': delphi(tokens, batch),
           'Delphi, the rest (Adam)': delphi_adam(tokens, batch)}
  return found | ({'Marin MoE': marin_moe(tokens, batch, width)} if width else {})


if __name__ == '__main__':
  flags.run(main)
