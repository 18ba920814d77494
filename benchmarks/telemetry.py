"""What it costs to watch a run: CPU seconds of everything that is measured and told, as a share of the training steps.

Trains the toy's model for 100 steps with `sigma-lite fit` on source of this package, as its config sets it, with a
logger (CSV) at Lightning's usual interval; each function of the telemetry is timed where it is called, inner calls counted
once. Steps are timed in the same process, so a busy machine slows both. Writes results/bench/telemetry-MACHINE.json.

    python benchmarks/telemetry.py [--steps 100] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from sigma_lite import cli
from sigma_lite.storage import write_json
from sigma_lite.train.callbacks import load_recorder, names
from sigma_lite.train.callbacks.telemetry import Telemetry
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.memory import Peak
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.provenance import device_name, git_commit

ROOT = Path(__file__).parents[1]
TIMED = {  # what is added to a step: the functions that do it
    "router logits": [(load_recorder, "largest_logits")],
    "clock and FLOPs": [
        (Throughput, "on_train_batch_start"),
        (Throughput, "on_train_batch_end"),
        (Throughput, "since_last"),
    ],
    "peak of memory": [(Peak, "bytes")],
    "each expert's gradient": [(Telemetry, "on_before_optimizer_step"), (Telemetry, "on_train_batch_end")],
    "names and logger": [(names, "publish"), (names, "of_step"), (names, "of_load"), (names, "of_experts")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    spent, steps = dict.fromkeys(TIMED, 0.0), {"steps": 0.0}
    running: list[str] = []
    for what, functions in TIMED.items():
        for owner, name in functions:
            setattr(owner, name, timed(getattr(owner, name), what, spent, running))
    names.OF |= {kind: getattr(names, f"of_{kind}") for kind in names.OF}
    SigmaLit.optimizer_step = timed(SigmaLit.optimizer_step, "steps", steps, [])  # forward and backward are in its closure
    train(options.steps)
    each = {what: round(1e3 * seconds / options.steps, 4) for what, seconds in spent.items()}
    facts = {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/telemetry.py --steps {options.steps}",
        "machine": device_name(torch.device("cpu")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": git_commit(),
        "load_average": os.getloadavg(),
        "step_ms": round(1e3 * steps["steps"] / options.steps, 2),
        "telemetry_ms": each,
        "share_of_a_step": round(sum(spent.values()) / steps["steps"], 5),
    }
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    write_json(options.out or ROOT / "results" / "bench" / f"telemetry-{machine}.json", facts)
    print(facts)


def timed(function, what: str, spent: dict[str, float], running: list[str]):
    """The function, its CPU seconds added to `spent[what]` unless another timed one has called it."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        if running:
            return function(*args, **kwargs)
        running.append(what)
        begun = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[what] += time.process_time() - begun
            running.pop()

    return run


def train(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = {"source": "files", "path": ROOT / "sigma_lite" / "kernels", "dir": f"{folder}/data", "heldout": 0.05}
        keys = {f"data.corpus.{name}": value for name, value in data.items()}
        config = ["-c", str(ROOT / "scaled_configs" / "toy.yaml"), *(f"--{name}={value}" for name, value in keys.items())]
        cli.main(["prepare", *config])
        run = {"max_steps": steps, "default_root_dir": f"{folder}/run", "val_check_interval": steps, "logger": "CSVLogger"}
        switch = [
            "--model.sparsity.switch_step",
            str(steps * 3 // 5),
            f"--save.every={steps}",
            "--model.optim.warmup_steps=10",
        ]
        cli.main(["fit", *config, *(f"--trainer.{name}={value}" for name, value in run.items()), *switch])


if __name__ == "__main__":
    main()
