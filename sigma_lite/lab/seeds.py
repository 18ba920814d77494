"""What a few seeds can show: the interval of a mean of paired differences, the pairs that an effect needs, Student's t."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from sigma_lite.config import nearest, require

# 97.5 % quantiles of Student's t for n - 1 = 1, 2, ... 29 degrees of freedom: 95 % lie between minus and plus this
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip


def over_seeds(differences: Sequence[float]) -> Difference:
    """Their mean with its interval; a single one has none."""
    if len(differences) == 1:
        return Difference(differences[0], -math.inf, math.inf, 1)
    middle, reach = interval(differences)
    return Difference(middle, middle - reach, middle + reach, len(differences))


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) of paired differences, at most 30 of them.

    With three pairs the half-width is 4.3 standard errors: so little do three numbers tell of their own spread.
    Raises ValueError for fewer than 2 or more than 30.
    """
    n = len(differences)
    if not 2 <= n <= len(T95) + 1:
        raise ValueError(f"{n} differences: an interval needs 2 to {len(T95) + 1}")
    return mean(differences), T95[n - 2] * stdev(differences) / n**0.5


def student(tail: float, freedom: int) -> float:
    """What Student's t exceeds with probability `tail`, 0 .. 0.5, at `freedom` degrees of freedom.

    With t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1), added up here in 200,000 parts.
    """
    angle = np.linspace(0, math.pi / 2, 200_001)
    inside = np.concatenate([[0], np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (freedom - 1))])
    return freedom**0.5 * math.tan(np.interp(0.5 - tail, inside / inside[-1] / 2, angle))


def pairs_needed(spread: float, effect: float) -> int | None:
    """Fewest pairs whose 95 % interval is narrower than `effect` on either side, if differences have the standard deviation
    `spread`; None when 30 are too few."""
    return next((n for n in range(2, len(T95) + 2) if T95[n - 2] * spread / n**0.5 <= effect), None)


class Difference(NamedTuple):
    """Mean over seeds of one arm minus another, relative to the other, and the ends of its 95 % interval; fractions."""

    mean: float
    low: float  # -inf for a single seed, which says nothing about other seeds
    high: float
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        text = f"{100 * self.mean:+.1f} %"
        if self.seeds > 1:
            text += f" (95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f} %, {self.seeds} seeds)"
        else:
            text += " (one seed, so no interval)"
        return text.replace("-", "\u2212")


def bits_per_byte(run: Mapping) -> float:
    """What `paired` compares unless told otherwise: held-out bits per byte at the end."""
    return run["heldout"]["bits_per_byte"]


def paired(results: Mapping, one: str, other: str, what: Callable[[Mapping], float] = bits_per_byte) -> Difference:
    """How much `one` differs from `other` in a number of a run, over the seeds that both have.

    Seeds are paired because a seed fixes the order of the rows and the initial weights of what both arms share: the noise
    that both see cancels. The interval is Student's, and takes the differences as normal.

    Raises: ConfigError for an arm that is not there, or when the two have no seed in common.
    """
    values = {}
    for name in (one, other):
        require(name in results["arms"], f"{results['experiment']} has no arm {name!r}; {nearest(name, results['arms'])}")
        values[name] = {run["seed"]: what(run) for run in results["runs"] if run["arm"] == name}
    seeds = sorted(values[one].keys() & values[other].keys())
    require(bool(seeds), f"{one!r} and {other!r} have no seed in common: record one that both have")
    return over_seeds([values[one][seed] / values[other][seed] - 1 for seed in seeds])
