"""The difference between two arms, seed by seed, with a 95 % interval: what a claim about them may say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sigma_lite.config import nearest, require

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom
NORMAL = 1.96


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
    differences = [values[one][seed] / values[other][seed] - 1 for seed in seeds]
    mean = sum(differences) / len(seeds)
    if len(seeds) == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(seeds) - 1))
    t = T_975[len(seeds) - 2] if len(seeds) - 2 < len(T_975) else NORMAL
    reach = t * deviation / math.sqrt(len(seeds))
    return Difference(mean, mean - reach, mean + reach, len(seeds))
