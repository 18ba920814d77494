"""The learning rate as a pure function of the step: a resumed run needs no state of it, a longer one can be compared.

Each returns a factor on the peak rate, 0..1, of optimizer step `step` (from 0) of `total_steps`. One of your own is a
function of the same arguments, or a class whose objects are called with them: `model.optim.schedule: mine.schedule`.
"""

from __future__ import annotations

import math
from typing import Protocol

from sigma_lite.config import OptimConfig


class Schedule(Protocol):
    def __call__(self, step: int, *, total_steps: int, optim: OptimConfig) -> float: ...


def wsd(step: int, *, total_steps: int, optim: OptimConfig) -> float:
    """Warmup-stable-decay (MiniCPM, 2404.06395): the one whose plateau can be made longer, and left several times.

    Rises over `warmup_steps` (step 0 already moves), stays 1, then falls linearly over the last `decay_fraction` of
    `total_steps`: towards 0, but not below `final_lr_ratio`.
    """
    decay_steps = optim.decay_fraction * total_steps
    left = (total_steps - step) / decay_steps if decay_steps else 1.0
    return _warmup(step, optim) * max(optim.final_lr_ratio, min(1.0, left))


def cosine(step: int, *, total_steps: int, optim: OptimConfig) -> float:
    """Half a cosine from 1 at the end of the warmup to `final_lr_ratio` at `total_steps` (SGDR, 1608.03983)."""
    fall = 0.5 * (1 - math.cos(math.pi * _done(step, total_steps, optim)))
    return _warmup(step, optim) * (1 - (1 - optim.final_lr_ratio) * fall)


def linear(step: int, *, total_steps: int, optim: OptimConfig) -> float:
    """A straight line from 1 at the end of the warmup towards 0 at `total_steps`, but not below `final_lr_ratio`."""
    return _warmup(step, optim) * max(optim.final_lr_ratio, 1 - _done(step, total_steps, optim))


def _warmup(step: int, optim: OptimConfig) -> float:
    return min(1.0, (step + 1) / max(optim.warmup_steps, 1))


def _done(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Share of what follows the warmup that lies behind, 0..1."""
    return min(1.0, max(0, step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
