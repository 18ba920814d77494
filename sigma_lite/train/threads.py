"""How many threads a run computes with on a CPU: measured when it begins, recorded, and kept when it goes on.

Small matrices gain little from more threads, large ones much, and on a machine that does other work two may be slower than
one, so nobody knows but a clock. A sum over two threads rounds otherwise than over one: a run that goes on with another
number of them is another run in the last digits, from then on.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sigma_lite.config import RowsConfig
from sigma_lite.model import Transformer

SECONDS = 2.0  # of measuring, where a step is short
WITHIN = 1.05  # times the shortest step: the smallest number of threads that is so near is chosen


class Threads(NamedTuple):
    number: int
    why: str
    seconds: dict[int, float] = {}  # of a step, by each number that was tried


def threads_for(asked: int | str | None, before: Mapping[str, Any] | None, measured: Callable[[], Threads]) -> Threads:
    """The number for a run, which is not set yet.

    Args:
        asked: the setting `threads`.
        before: the `run` entry of the diary where the run began, if it goes on.
        measured: tries some numbers.
    """
    if isinstance(asked, int):
        return Threads(asked, "asked for by threads")
    environment = os.environ.get("OMP_NUM_THREADS")
    if asked is None or environment:
        why = f"asked for by OMP_NUM_THREADS={environment}" if environment else "torch's own choice"
        return Threads(torch.get_num_threads(), why)
    return measured() if before is None else Threads(recorded(before), "as the run began")


def recorded(entry: Mapping[str, Any]) -> int:
    """The threads that a `run` entry of a diary tells of, older ones in the name of the device only."""
    own = entry.get("threads", {}).get("number")
    found = re.search(r"(\d+) thread", entry["device"])
    return own or (int(found[1]) if found else torch.get_num_threads())


def candidates(cores: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    return sorted({*(2**n for n in range(cores.bit_length()) if 2**n <= cores), cores})


def cores() -> int:
    """Those that this process may use; of two threads of one core both count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(step: Callable[[], object], numbers: Sequence[int], clock: Callable[[], float] = time.perf_counter) -> Threads:
    """Time a step with each number in turn, SECONDS long and each once at least; torch is left with the last one."""
    spent: dict[int, list[float]] = {number: [] for number in numbers}
    for number in numbers:  # threads start, caches fill, kernels are compiled
        torch.set_num_threads(number)
        step()
    end = clock() + SECONDS
    while clock() < end or not all(spent.values()):
        for number in numbers:
            torch.set_num_threads(number)
            begun = clock()
            step()
            spent[number].append(clock() - begun)
    seconds = {number: statistics.median(times) for number, times in spent.items()}
    chosen = next(number for number in numbers if seconds[number] <= WITHIN * min(seconds.values()))
    listed = ", ".join(f"{number}: {took:.3g} s" for number, took in seconds.items())
    why = "the smallest number within 5 % of the shortest step" if len(numbers) > 1 else "there is one core"
    return Threads(chosen, f"{why} ({listed})", seconds)


def trial_step(module: Any, rows: RowsConfig) -> Callable[[], object]:
    """Forward and backward of a model like the module's, on rows of the run's own shape. The run's random numbers stay."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(module.net, module.parts)
        model.set_k(module.k_at(0))
        ids_BS = torch.randint(module.net.vocab_size, (rows.per_micro, rows.length + 1))

    def step() -> None:
        with torch.random.fork_rng(devices=[]):
            model.loss(ids_BS[:, :-1], ids_BS[:, 1:])[0].backward()
        model.zero_grad()

    return step
