"""The CUDA kernel against torch's grouped_mm on the reader's GPU: first the results, then the time, then the roof.

Never run on a GPU by us so far. `benchmarks/gpu.py` is the careful version: all backends, cold caches, intervals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from torch import Tensor

from sigma_lite.kernels import grouped_swiglu
from sigma_lite.kernels.choose import choose_backend
from sigma_lite.kernels.compile_offline import Layer
from sigma_lite.kernels.compiler import BuildError
from sigma_lite.teach.plots_kernels import roofline

BACKENDS = ("cuda", "grouped")
WRONG = 1e-2  # of ||y - exact|| / ||exact|| in bf16; what is further away is not timed
ROUNDS = 20


class Lap(NamedTuple):
    error: float
    milliseconds: float
    flops: float  # a second


class Machine(NamedTuple):
    peak: float  # FLOP/s of a large matmul in bf16
    bandwidth: float  # bytes/s of a long copy, what is read and what is written together


def obstacle() -> str:
    """Why there is no race here; "" where there can be one."""
    if not torch.cuda.is_available():
        return "no GPU here"
    if (found := torch.cuda.get_device_capability()) < (8, 0):
        return f"this GPU has compute capability {found[0]}.{found[1]}, and the kernel needs 8.0 (A100, L4, H100 or later)"
    return ""


def race(
    T: int = 8192,
    layer: Layer = Layer(),  # noqa: B008
    device: str = "cuda",
    square: int = 8192,
    copied: int = 2**30,
) -> go.Figure | None:
    """Check and time both backends, forward only, on T tokens that chose experts at random; print, and draw the roof.

    Without a GPU for it: a sentence about what it would do, and None.

    Args: `square` and `copied` (bytes) set the matmul and the copy that measure what this machine can do.
    """
    if device == "cuda" and (why := obstacle()):
        print(f"{why}. On a GPU this cell would check both kernels against the float64 loop,")
        print(f"time them on {T} tokens and {layer.E} experts, and draw them under the roof of that GPU")
        return None
    machine, reached = measured(torch.device(device), square, copied), {}
    for name, lap in timed(T, layer, torch.device(device)).items():
        share = lap.flops / min(machine.peak, machine.bandwidth * T / layer.E)
        print(f"{name}: {lap.error:.1e} from the float64 loop, {lap.milliseconds:.3f} ms, {share:.0%} of the roof")
        reached[f"{name}: {lap.milliseconds:.3f} ms"] = lap.flops
    figure = roofline({f"this {device}, bf16": (machine.peak, machine.bandwidth, 2)}, (T // layer.E,))
    for name, flops in reached.items():
        figure.add_scatter(x=[T / layer.E], y=[flops], name=name, mode="markers", marker={"symbol": "x", "size": 11})
    return figure.update_layout(title=f"{T} tokens, {T // layer.E} an expert, forward")


def timed(T: int, layer: Layer, device: torch.device) -> dict[str, Lap]:
    """Each backend that can run here and is right. The others get a printed sentence and no time."""
    inputs, laps = problem(T, layer, device), {}
    exact_TD = grouped_swiglu(*(t.double() if t.is_floating_point() else t for t in inputs), backend="loop")
    for name in BACKENDS:
        try:
            choose_backend(inputs[0], inputs[3], name)
            y_TD = grouped_swiglu(*inputs, backend=name)
        except (ValueError, RuntimeError, BuildError) as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        error = float((y_TD.double() - exact_TD).norm() / exact_TD.norm())
        if not error <= WRONG:
            print(f"{name}: {error:.1e} from the float64 loop, which is wrong, so it is not timed")
            continue
        spent = seconds(lambda name=name: grouped_swiglu(*inputs, backend=name), device)
        laps[name] = Lap(error, 1e3 * spent, 6 * T * layer.D * layer.F / spent)
    return laps


def problem(T: int, layer: Layer, device: torch.device) -> tuple[Tensor, ...]:
    torch.manual_seed(18)
    new = lambda *shape: torch.randn(shape, device=device).bfloat16()  # noqa: E731
    w13, w2 = new(layer.E, 2 * layer.F, layer.D) / layer.D**0.5, new(layer.E, layer.D, layer.F) / layer.F**0.5
    ids_TK = torch.randint(layer.E, (T, 1), device=device)
    return new(T, layer.D), ids_TK, torch.rand(T, 1, device=device), w13, w2


def measured(device: torch.device, square: int, copied: int) -> Machine:
    a = torch.randn(square, square, device=device).bfloat16()
    source = torch.ones(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    peak = 2 * square**3 / seconds(lambda: a @ a, device)
    return Machine(peak, 2 * copied / seconds(lambda: target.copy_(source), device))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, the median of three batches. A GPU works on its own: the clock is read when it says that it is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    batches = []
    for _ in range(4):  # the first warms up
        wait()
        began = time.perf_counter()
        for _ in range(ROUNDS if device.type == "cuda" else 1):
            run()
        wait()
        batches.append((time.perf_counter() - began) / (ROUNDS if device.type == "cuda" else 1))
    return sorted(batches[1:])[1]
