"""How benchmarks/gpu.py measures: events around each run, ceilings of the machine, launches, waits and memory."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from interleaved import interval


class Clock:
    """Milliseconds of one run. On a GPU by events, after a write of 256 MB that empties the L2 cache; else by the clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def time(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # also keeps the device busy while the host queues the run: launches count only if they lag
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def back_to_back(self, run: Callable[[int], object], times: int = 20) -> float:
        """Milliseconds a run by the host's clock, many in a row: what a training loop sees, launches included."""
        self.wait()
        began = time.perf_counter()
        for number in range(times):
            run(number)
        self.wait()
        return (time.perf_counter() - began) * 1e3 / times

    def wait(self) -> None:
        if self.flush is not None:
            torch.cuda.synchronize(self.device)


def interleave(
    clock: Clock, runs: Mapping[str, Callable[[int], object]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round: all in every round, in random order, until `rounds` or `seconds`."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    warm = 3 if clock.flush is not None else 1
    for number in range(warm + rounds):
        for name in random.sample(list(runs), len(runs)):
            took = clock.time(lambda name=name, number=number: runs[name](number))
            if number >= warm:
                spent[name].append(took)
        if number >= warm + 4 and time.perf_counter() - began > seconds:
            break
    return spent


def summary(spent: list[float], baseline: list[float], floor_ms: float | None) -> dict:
    """Median and spread, how many times as fast as the baseline with a 95 % bootstrap interval, and share of the floor."""
    median = statistics.median(spent)
    tenths = statistics.quantiles(spent, n=10, method="inclusive") if len(spent) > 1 else [median] * 9
    result = {
        "median_ms": round(median, 5),
        "p10_ms": round(tenths[0], 5),
        "p90_ms": round(tenths[-1], 5),
        "rounds": len(spent),
    }
    if baseline:
        result["speed_over_grouped"] = round(statistics.median(baseline) / median, 3)
        result["speed_over_grouped_95"] = [round(ratio, 3) for ratio in interval(baseline, spent)]
    if floor_ms:
        result["percent_of_floor"] = round(100 * floor_ms / median, 1)
    return result


def ceilings(clock: Clock) -> dict[str, float]:
    """Matrix rate in FLOP/s (8192 cubed, bf16, random) and copy rate in bytes/s (read plus write), medians of ten."""
    cuda = clock.flush is not None
    n, numbers = (8192, 1 << 30) if cuda else (128, 1 << 16)
    a, b = (torch.randn(n, n, device=clock.device).bfloat16() for _ in range(2))
    source = torch.randn(numbers // 2, device=clock.device).view(torch.int16)  # numbers of 2 bytes
    target = torch.empty_like(source)

    def median(run: Callable[[], object]) -> float:
        return statistics.median([clock.time(run) for _ in range(13)][3:]) / 1e3

    rates = {
        "matmul_flops": 2 * n**3 / median(lambda: a @ b),
        "copy_bytes": 4 * numbers / median(lambda: target.copy_(source)),
    }
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next tensors will be made of: an output that is not written shows."""
    if device.type == "cuda":
        free = [torch.full((1 << exponent,), float("nan"), device=device) for exponent in range(8, 27)]
        del free


def launches(run: Callable[[], object], clock: Clock) -> int | None:
    """Kernels, copies and fills that one run starts on the device."""
    if clock.flush is None:
        return None
    from torch.profiler import ProfilerActivity, profile

    clock.wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
        clock.wait()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in prof.events())


def waits_for_device(run: Callable[[], object], clock: Clock) -> bool | str | None:
    """Does a run make the host wait? Torch's own check: it raises where an operator of torch would wait."""
    if clock.flush is None:
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        return False
    except RuntimeError as error:
        return str(error)[:120] or True
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_bytes(run: Callable[[], object], clock: Clock) -> int | None:
    """Most memory that one run holds beyond what was there before."""
    if clock.flush is None:
        return None
    clock.wait()
    before = torch.cuda.memory_allocated(clock.device)
    torch.cuda.reset_peak_memory_stats(clock.device)
    run()
    clock.wait()
    return torch.cuda.max_memory_allocated(clock.device) - before
