"""Which rows an optimizer step takes: a function of settings and step, without state, of one source or of several.

A run draws from one endless sequence a source: its rows in a shuffled order, then again in another, and so on. Where there
are several sources their sequences are merged by weight. Step s takes the next rows of what comes out, so a resumed run and
a run on another number of devices see the same rows in the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sigma_lite.config import RowsConfig
from sigma_lite.data.domains import Stretches
from sigma_lite.data.rows import epoch_order, row_order

Stages = Sequence[tuple[int, Sequence[float]]]
"""(first step, share of each source), the first of step 0. Shares add up to 1."""


# ----------------------------------------------------------------------------------------------------------- merging


def merged(shares: Sequence[float], start: int, count: int) -> np.ndarray:
    """The sources of places start..start+count-1 of a merged sequence, int64 [count].

    Row k of a source with share w stands at time (k + 1/2) / w, and rows are taken in the order of their times (stride
    scheduling: Waldspurger and Weihl 1995). Of any first n places a source with share w has n w, give or take
    (1 + w S) / 2 with S sources: nothing is drawn, so nothing fluctuates.
    """
    taken_S = merged_before(shares, start)
    times, sources = _times(shares, taken_S, count)
    return sources[np.lexsort((sources, times))[:count]]


def merged_before(shares: Sequence[float], n: int) -> np.ndarray:
    """How many of the first n places are of each source, int64 [S]."""
    early = max(0, n - len(shares))  # a time by which all that has come is certainly among them
    taken_S = np.array([max(0, math.ceil(share * early - 0.5)) for share in shares], np.int64)
    more = n - int(taken_S.sum())
    times, sources = _times(shares, taken_S, more)
    return taken_S + np.bincount(sources[np.lexsort((sources, times))[:more]], minlength=len(shares))


def _times(shares: Sequence[float], taken_S: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Times and sources of enough rows behind those taken that the next `count` are among them."""
    times, sources = [np.empty(0)], [np.empty(0, np.int64)]
    for source, share in enumerate(shares):
        enough = math.ceil(share * (count + 2 * len(shares))) + 2 if share > 0 else 0
        if enough:
            times.append((np.arange(taken_S[source], taken_S[source] + enough) + 0.5) / share)
        sources.append(np.full(enough, source, np.int64))
    return np.concatenate(times), np.concatenate(sources)


# ------------------------------------------------------------------------------------------------------------- steps


class Begun(NamedTuple):
    """Where a branch went on: its parent had read so many rows of each source before this step."""

    step: int
    taken: tuple[int, ...]


class Origin(NamedTuple):
    """Where the rows of a step come from, in the order in which ranks and micro-batches share them out. All int64 [rows]."""

    sources: np.ndarray  # place of the source
    epochs: np.ndarray  # how often that source was read as a whole before
    rows: np.ndarray  # number of the row in its source


class Order:
    """The rows of every step.

    Args:
        n_rows: training rows of each source.
        config: rows per step, ramp and seed.
        stages: shares of the sources from a step on; default: of the only one.
        stretches: how the rows of the only source are regrouped.
        begun: of a branch. From that step on each source goes on behind what was taken of it.
    """

    def __init__(
        self,
        n_rows: Sequence[int],
        config: RowsConfig,
        stages: Stages = ((0, (1.0,)),),
        stretches: Stretches | None = None,
        begun: Begun | None = None,
    ):
        self.n_rows, self.config, self.stretches = tuple(n_rows), config, stretches
        self.per_epoch = (stretches.n_rows,) if stretches else self.n_rows
        self.first_S = np.cumsum([0, *self.n_rows[:-1]])  # of each source, where rows are numbered through
        self.begun = begun or Begun(0, (0,) * len(self.n_rows))
        self._orders = [lru_cache(maxsize=2)(epoch_order.__wrapped__) for _ in self.n_rows]  # each is in its own epoch
        now = [shares for step, shares in stages if step <= self.begun.step][-1]
        self.stages = [(self.begun.step, now), *((step, shares) for step, shares in stages if step > self.begun.step)]
        self._taken = [np.array(self.begun.taken, np.int64)]  # before each stage
        for (first, shares), (end, _) in zip(self.stages, self.stages[1:], strict=False):
            self._taken.append(self._taken[-1] + merged_before(shares, config.before(end) - config.before(first)))

    def shares(self, step: int) -> Sequence[float]:
        """The share of each source at a step."""
        return self.stages[self._stage(step)][1]

    def taken(self, step: int) -> np.ndarray:
        """Rows that all steps before this one took of each source, int64 [S]."""
        stage = self._stage(step)
        first, shares = self.stages[stage]
        return self._taken[stage] + merged_before(shares, self.config.before(step) - self.config.before(first))

    def passes(self, step: int) -> np.ndarray:
        """How often the steps before this one read each source, float [S]; 1.5 is in the middle of the second epoch."""
        return self.taken(step) / np.array(self.per_epoch)

    def origin(self, step: int) -> Origin:
        """Source, epoch and number of each row of a step."""
        first, shares = self.stages[self._stage(step)]
        sources_N = merged(shares, self.config.before(step) - self.config.before(first), self.config.at(step))
        places_N, rows_N = np.empty_like(sources_N), np.empty_like(sources_N)
        for source, start in enumerate(self.taken(step).tolist()):
            own_N = sources_N == source
            count = int(own_N.sum())
            places_N[own_N] = start + np.arange(count)
            drawn = (self.config.seed, start, count, self.n_rows[source], self.stretches, self._orders[source])
            rows_N[own_N] = row_order(*drawn)
        return Origin(sources_N, places_N // np.array(self.per_epoch)[sources_N], rows_N)

    def rows(self, step: int) -> np.ndarray:
        """The rows of a step, numbered through source after source, int64 [rows]."""
        found = self.origin(step)
        return self.first_S[found.sources] + found.rows

    def _stage(self, step: int) -> int:
        """Place of a step's stage. Raises IndexError for a step before a branch: that is its parent's."""
        if step < self.begun.step:
            raise IndexError(f"step {step} is before step {self.begun.step}, from which on this order is known")
        return max(place for place, (first, _) in enumerate(self.stages) if first <= step)
