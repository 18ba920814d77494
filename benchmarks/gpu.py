"""The grouped expert matmul on this GPU: is every backend right, and how fast is it? One command of under ten minutes.

All variants get the same routing, weights, inputs and upstream gradient, on memory poisoned with NaN; one whose output or
gradients differ from the float64 loop by more than 1e-5 (fp32) or 1e-2 (bf16) is refused, not timed. Variants take turns
in random order within each round. The router is left out; sorting, gathering and combining are in. Writes
results/bench/gpu-NAME.json after every step, so that a run that is cut short keeps what it has.

    python benchmarks/gpu.py [--minutes 9] [--out FILE]
    python benchmarks/gpu.py --dry-run             tiny shapes on the CPU: exercises this script, measures nothing
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import expert_cases as cases
import gpu_facts
import gpu_measure as measure
import torch
from expert_cases import NAMES, TOLERANCE, Problem, Shape

from sigma_lite.kernels.loop import grouped_swiglu_loop
from sigma_lite.storage import write_json

ROOT = Path(__file__).parents[1]


class Bench:
    """The device, the time that is left, and the record so far."""

    def __init__(self, options: argparse.Namespace):
        self.dry = options.dry_run
        self.device = torch.device("cpu" if self.dry else "cuda:0")
        self.began, self.seconds = time.perf_counter(), options.minutes * 60
        self.clock = measure.Clock(self.device)
        self.facts: dict = {**about(self.device), "dry_run": self.dry, "steps_not_run": []}
        name = re.sub(r"\W+", "-", self.facts["device"]).strip("-").lower()
        self.out = options.out or ROOT / "results" / "bench" / f"gpu-{name}.json"
        self.rates: dict[str, float] | None = None

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def step(self, name: str, run: Callable[[], object], keep: float = 0.0) -> None:
        """Run one step if time is left beyond `keep` seconds, record what it returns or why it failed, and save."""
        if self.left() < keep:
            self.facts["steps_not_run"].append(f"{name}: {self.left():.0f} s left")
        else:
            began = time.perf_counter()
            try:
                self.facts[name] = run()
            except Exception as error:  # a step that breaks must not take the others' results along
                self.facts[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            print(f"[{time.perf_counter() - self.began:5.0f} s] {name}: {time.perf_counter() - began:.1f} s", flush=True)
        self.facts["seconds"] = round(time.perf_counter() - self.began, 1)
        write_json(self.out, self.facts)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="start nothing new after that (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of a model, the slowest step")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to test this script")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures a GPU; `make bench` measures a CPU, --dry-run only tests the script")
    bench = Bench(options)
    torch.backends.cuda.matmul.allow_tf32 = False
    bench.step("checks", lambda: checks(bench))
    bench.step("ceilings", lambda: ceilings(bench))
    shapes, growth = (cases.DRY, cases.DRY[:1]) if bench.dry else (cases.SHAPES, cases.GROWTH)
    for number, shape in enumerate(shapes):
        if number == 1:  # after the first result: what costs little and says much
            bench.step("facts", lambda: gpu_facts.facts(bench), keep=30)
            for grown in growth:
                bench.step(f"growth {grown}", lambda grown=grown: compare(bench, grown, slow=True), keep=30)
        bench.step(str(shape), lambda shape=shape, slow=number == 0: compare(bench, shape, slow), keep=40)
    if not options.no_compile:
        bench.step("torch.compile", lambda: gpu_facts.compiled_model(bench), keep=90)
    print(f"written to {bench.out}" + "".join(f"\nnot run: {step}" for step in bench.facts["steps_not_run"]))


def ceilings(bench: Bench) -> dict:
    bench.rates = measure.ceilings(bench.clock)
    return bench.rates


def checks(bench: Bench) -> dict:
    """Every backend against the float64 loop on small shapes, before anything is timed. Builds what must be built."""
    results: dict = {}
    small = Shape(8, 200, 128, 64, 2)
    trials = (small, small._replace(K=1, routing="one expert"), Shape(16, 1001, 64, 192, 1, "zipf"))
    for dtype in (torch.float32, torch.bfloat16):
        for shape in trials[:1] if bench.dry else trials:
            began = time.perf_counter()
            problem = Problem(shape, bench.device, dtype)
            runs, reasons = cases.variants(problem, bench.device, slow=True)
            exact = exact_results(problem)
            verdicts = {name: verdict(bench, problem, run, exact) for name, run in runs.items()}
            results[f"{shape}, {str(dtype)[6:]}"] = {
                "differs_by": verdicts, "not_run": reasons, "seconds": round(time.perf_counter() - began, 1)
            }  # fmt: skip
    return results


def exact_results(problem: Problem) -> tuple[torch.Tensor, ...]:
    return problem.both(grouped_swiglu_loop, 0, torch.float64)


def verdict(bench: Bench, problem: Problem, run: Callable, exact: tuple[torch.Tensor, ...]) -> float | str:
    """The largest relative error over output and gradients, or what was wrong."""
    measure.poison(bench.device)
    try:
        results = problem.both(run, 0)
        bench.clock.wait()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    worst = 0.0
    for name, ours, right in zip(NAMES, results, exact, strict=True):
        error = ((ours.double() - right).norm() / right.norm()).item()
        if not error <= TOLERANCE[problem.dtype]:  # NaN fails too
            return f"refused: {name} differs from the float64 loop by {error:.1e}"
        worst = max(worst, error)
    return float(f"{worst:.2e}")


def compare(bench: Bench, shape: Shape, slow: bool) -> dict:
    """Verdicts, then times of forward and of forward + backward, launches, waits and memory of each right variant."""
    problem = Problem(shape, bench.device, torch.float32 if bench.dry else torch.bfloat16)
    runs, reasons = cases.variants(problem, bench.device, slow)
    exact = exact_results(problem)
    verdicts = {name: verdict(bench, problem, run, exact) for name, run in runs.items()}
    del exact
    right = {name: runs[name] for name, said in verdicts.items() if isinstance(said, float)}
    result: dict = {"differs_by": verdicts, "not_run": reasons}
    for what, backward in (("forward", False), ("forward_backward", True)):
        method = problem.both if backward else problem.forward
        calls = {name: functools.partial(method, run) for name, run in right.items()}
        spent = measure.interleave(bench.clock, calls, 3 if bench.dry else 40, seconds=8)
        floor = None
        if bench.rates:
            floor = 1e3 * cases.floor_seconds(shape, bench.rates["matmul_flops"], bench.rates["copy_bytes"], backward)
        result[what] = {"floor_ms": floor and round(floor, 4)}
        for name, call in calls.items():
            entry = measure.summary(spent[name], spent.get("grouped", []), floor)
            entry["back_to_back_ms"] = round(bench.clock.back_to_back(call, 3 if bench.dry or name in SLOW else 20), 4)
            entry["launches"] = measure.launches(lambda call=call: call(0), bench.clock)
            entry["waits_for_device"] = measure.waits_for_device(lambda call=call: call(0), bench.clock)
            entry["peak_bytes"] = measure.peak_bytes(lambda call=call: call(0), bench.clock)
            result[what][name] = entry
            print(f"    {shape} {what:16s} {name:24s} {line(entry)}", flush=True)
    return result


SLOW = ("naive", "loop", "transformers eager")


def line(entry: dict) -> str:
    low, high = entry.get("speed_over_grouped_95", (float("nan"),) * 2)
    return (
        f"{entry['median_ms']:9.3f} ms  {entry.get('speed_over_grouped', float('nan')):6.2f} ({low:.2f} to {high:.2f})"
        f" x grouped  {entry.get('percent_of_floor', float('nan')):5.1f} % of floor  {entry['launches']} launches"
    )


def about(device: torch.device) -> dict:
    def said(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for module in ("triton", "transformers"):
        try:
            versions[module] = __import__(module).__version__
        except ImportError:
            versions[module] = None
    return {
        "what": "grouped_swiglu on one GPU; milliseconds between events, L2 emptied before; bf16 unless a check says else",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions,
        "commit": said("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
