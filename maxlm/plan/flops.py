"""FLOPs of a step counted from what was traced, before any compiler: products times the lengths of the scans around them.

The second of three counts: the model's formula (`maxlm.flops`), the trace, and the compiled program (`schedule.Span`).
Trace and program must agree; what both have more than the model is recomputation and the masked half of tiles.
"""

import math
from typing import Any

from jax import core
from jax.extend.core import ClosedJaxpr, Jaxpr

from maxlm.plan.hardware import Chip
from maxlm.plan.hlo import Array
from maxlm.plan.kernels import kernel

DTYPES = {'bfloat16': 'bf16', 'float32': 'f32', 'float16': 'f16', 'int32': 's32', 'int8': 's8', 'int16': 's16'}


def traced_flops(jaxpr: Any, chip: Chip, filled: float = 1.0) -> float:
  """Of all devices together. filled: as of `kernels.kernel`."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return sum(_equation(equation, chip, filled) for equation in jaxpr.eqns)


def _equation(equation, chip: Chip, filled: float) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[d] for d in contracted)
  if name in ('ragged_dot', 'ragged_dot_general'):
    left, right = (v.aval.shape for v in equation.invars[:2])
    return 2.0 * math.prod(left) * (right[-1] if len(right) == 3 and len(left) == 2 else equation.outvars[0].aval.shape[-1])
  if name == 'pallas_call':
    return kernel(_pallas_name(params), _arrays(equation.invars), _arrays(equation.outvars),
                  str(params.get('metadata', '')).replace("'", '"'), chip, filled).flops
  if name == 'cond':
    return max(traced_flops(branch, chip, filled) for branch in params['branches'])
  times = 1
  if name == 'scan':
    times = params['length']
  if name == 'while' and 'more_rounds' in str(equation.source_info.name_stack):
    times = 0  # as in `schedule.walk`
  if name == 'shard_map':
    times = math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes'])
  return times * sum(traced_flops(inner, chip, filled) for inner in inner_jaxprs(params))


def inner_jaxprs(params: dict) -> list:
  """The jaxprs that an equation runs. A rule for derivatives is a function, not a jaxpr: what ran is in the trace."""
  values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
  return [value for value in values if isinstance(value, (Jaxpr, ClosedJaxpr))]


def _pallas_name(params: dict) -> str:
  info = params.get('name_and_src_info')
  return getattr(info, 'name', None) or params.get('name') or ''


def _arrays(variables) -> list[Array]:
  avals = [v.aval for v in variables if isinstance(v.aval, core.ShapedArray)]
  return [Array(DTYPES.get(a.dtype.name, 's32'), a.shape) for a in avals]
