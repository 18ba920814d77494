"""The grouped expert matmul, forward and backward, against transformers' expert implementations, on one CPU thread.

Same routing, weights, input and upstream gradient for all. A variant whose output or gradients differ from the float64
loop by more than 1e-5 is refused, not timed. The router is left out; sorting, gathering and combining are in. Four
inputs in turn, random and never zero. Writes results/bench/experts-MACHINE.json.

    python benchmarks/experts.py [--rounds 15] [--instructions avx2] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from expert_cases import NAMES, TOLERANCE, Problem, Shape, transformers_experts
from interleaved import interleave, summary, timed
from torch import Tensor

from sigma_lite.kernels import choose_backend, explain_backend, grouped_swiglu
from sigma_lite.kernels.cpu.binding import lanes
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit

ROOT = Path(__file__).parents[1]
NARROWER = {  # what keeps torch, its libraries and our compiler to fewer instructions than the machine has
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "SIGMA_LITE_MARCH": "x86-64-v3",
    }
}
OTHERS = ("scattermoe", "megablocks", "sonicmoe")  # need a GPU: named in the record, so that nobody takes them for beaten


MAIN = Shape(96, 4096, 128, 128)
CASES = (
    MAIN,
    MAIN._replace(routing="balanced"),
    MAIN._replace(routing="zipf"),
    Shape(96, 2048, 128, 64),
    Shape(96, 2048, 128, 64, 8),
)
GROWTH = tuple(MAIN._replace(E=E) for E in (8, 32, 96, 192))


def ours(backend: str) -> Callable:
    return lambda x, ids, gates, w13, w2: grouped_swiglu(x, ids, gates, w13, w2, backend=backend)


def compare(shape: Shape, rounds: int, baselines: tuple[str, ...]) -> dict:
    cpu = torch.device("cpu")
    problem = Problem(shape, cpu, torch.float32)
    runs = {
        "ours": ours("auto"),
        **{f"ours, {name}": ours(name) for name in baselines if name in ("loop", "naive", "padded")},
    }
    others = [f"transformers {name}" for name in baselines if name in ("eager", "grouped_mm")]
    runs |= {name: transformers_experts(shape, name, cpu) for name in others}
    exact = problem.both(ours("loop"), 0, torch.float64)
    for name, run in runs.items():
        check(name, problem.both(run, 0), exact)
    seconds = interleave(
        {name: lambda n, run=run: timed(lambda number: problem.both(run, number), n) for name, run in runs.items()}, rounds
    )
    return {name: summary(spent, seconds["ours"]) for name, spent in seconds.items()}


def check(name: str, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for what, a, b in zip(NAMES, results, exact, strict=True):
        error = ((a.detach().double() - b).norm() / b.norm()).item()
        if not error <= TOLERANCE[torch.float32]:  # NaN fails too
            raise SystemExit(f"{name}: {what} differs from the float64 loop by {error:.1e}; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--instructions", choices=NARROWER, help="all variants with these only (default: what is here)")
    options = parser.parse_args()
    narrower = NARROWER.get(options.instructions, {})
    if not narrower.items() <= os.environ.items():  # torch has read them already
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | narrower)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = {}
    for shape in CASES:
        show(
            str(shape),
            results.setdefault(str(shape), compare(shape, options.rounds, ("loop", "padded", "grouped_mm", "eager"))),
        )
    growth = {}
    for shape in GROWTH:
        show(str(shape), growth.setdefault(str(shape.E), compare(shape, max(3, options.rounds // 3), ("naive", "eager"))))
    x, w13 = torch.empty(1, MAIN.D), torch.empty(MAIN.E, 2 * MAIN.F, MAIN.D)
    facts = {
        "what": "grouped_swiglu forward + backward, fp32; median_s is CPU seconds of the process, wall_ is by the clock",
        "backend": explain_backend(x, w13),
        "machine": device_name(torch.device("cpu")),
        "floats_in_a_register": lanes(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": git_commit(),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "results": results,
        "growth_in_E": {"results": growth, "times_from_8_to_192": growth_of(growth)},
        "not_run": {name: "needs a GPU" if importlib.util.find_spec(name) else "not installed" for name in OTHERS},
    }
    out = (
        options.out
        or ROOT / "results" / "bench" / f"experts-{options.instructions or platform.machine()}-{os.cpu_count()}cpu.json"
    )
    write_json(out, facts)
    print(f"{choose_backend(x, w13)[0]}, E 8 to 192: {facts['growth_in_E']['times_from_8_to_192']}\nwritten to {out}")


def growth_of(growth: dict[str, dict]) -> dict[str, float]:
    return {name: round(growth["192"][name]["median_s"] / growth["8"][name]["median_s"], 2) for name in growth["8"]}


def show(title: str, result: dict) -> None:
    print(title)
    for name, r in result.items():
        low, high = r["times_ours_95"]
        print(
            f"  {name:26s} {r['median_s'] * 1e3:8.1f} ms   {r['times_ours']:6.2f} ({low:.2f} to {high:.2f}) times ours",
            end="",
        )
        print(f"   by the clock {r['wall_times_ours']:.2f}", flush=True)


if __name__ == "__main__":
    main()
