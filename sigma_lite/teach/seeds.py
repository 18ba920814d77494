"""What a few seeds can show: the interval of a mean of paired differences, and how many pairs an effect needs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

# 97.5 % quantiles of Student's t for n - 1 = 1, 2, ... 29 degrees of freedom: 95 % lie between minus and plus this
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) of paired differences, at most 30 of them.

    With three pairs the half-width is 4.3 standard errors: so little do three numbers tell of their own spread.
    Raises ValueError for fewer than 2 or more than 30.
    """
    n = len(differences)
    if not 2 <= n <= len(T95) + 1:
        raise ValueError(f"{n} differences: an interval needs 2 to {len(T95) + 1}")
    return mean(differences), T95[n - 2] * stdev(differences) / n**0.5


def pairs_needed(spread: float, effect: float) -> int | None:
    """Fewest pairs whose 95 % interval is narrower than `effect` on either side, if differences have the standard deviation
    `spread`; None when 30 are too few."""
    return next((n for n in range(2, len(T95) + 2) if T95[n - 2] * spread / n**0.5 <= effect), None)
