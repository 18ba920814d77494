"""Time variants side by side: every one in each round, in random order, so a drifting machine drifts for all.

The ratio that counts is of CPU seconds of the process, which other programs disturb least; wall seconds stand beside it.
On one thread the two agree on a quiet machine.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import NamedTuple


class Seconds(NamedTuple):
    cpu: float
    wall: float


class Elsewhere:
    """A variant in a process of its own: `make(*arguments)` is called there, and what it returns is run and timed there.

    Variants that share a process share its heap: one that frees large blocks moves malloc's thresholds, and with them the
    page faults, for all. The process ends with the object.
    """

    def __init__(self, make: Callable[..., Callable[[int], object]], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, number: int) -> tuple[Seconds, object]:
        """Seconds of run `number`, and what it returned. Raises EOFError when the process has failed; it has said why."""
        self._pipe.send(number)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[int], object]], arguments: tuple) -> None:
    run = make(*arguments)
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        pipe.send(timed(run, number))


def timed(run: Callable[[int], object], number: int) -> tuple[Seconds, object]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = run(number)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall), result


def interleave(variants: Mapping[str, Callable[[int], tuple[Seconds, object]]], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each variant in each round. A variant is given the round's number, to take its inputs by; 0 warms up."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            spent, _ = variants[name](number)
            seconds[name] += [spent] * (number > 0)
    return seconds


def summary(theirs: list[Seconds], ours: list[Seconds]) -> dict:
    """Medians, and how many times as long as ours: the ratio of medians with a 95 % bootstrap interval over rounds."""
    cpu, our_cpu = [s.cpu for s in theirs], [s.cpu for s in ours]
    wall, our_wall = statistics.median(s.wall for s in theirs), statistics.median(s.wall for s in ours)
    return {
        "median_s": round(statistics.median(cpu), 5),
        "min_s": round(min(cpu), 5),
        "times_ours": round(statistics.median(cpu) / statistics.median(our_cpu), 3),
        "times_ours_95": [round(ratio, 3) for ratio in interval(cpu, our_cpu)],
        "wall_median_s": round(wall, 5),
        "wall_times_ours": round(wall / our_wall, 3),
        "wall_times_ours_95": [round(ratio, 3) for ratio in interval([s.wall for s in theirs], [s.wall for s in ours])],
    }


def interval(theirs: list[float], ours: list[float], draws: int = 2000) -> tuple[float, float]:
    pick = random.Random(0)
    pairs = list(zip(theirs, ours, strict=True))
    ratios = sorted(
        statistics.median(t for t, _ in sample) / statistics.median(o for _, o in sample)
        for sample in (pick.choices(pairs, k=len(pairs)) for _ in range(draws))
    )
    return ratios[int(draws * 0.025)], ratios[int(draws * 0.975)]
