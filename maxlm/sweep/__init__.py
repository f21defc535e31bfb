"""Many runs as one: `python -m maxlm.sweep --sweep=configs/sweeps/x.py --workdir=DIR` (docs/sweep.md)."""

from maxlm.sweep.runs import Run, member_of

__all__ = ['Run', 'member_of']
