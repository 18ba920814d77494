"""One training of one expression, and many side by side in processes that import the package once."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sigma_lite import record
from sigma_lite.config import ConfigError, require
from sigma_lite.lab.experiment import Arm, Run, Scale, settings_of
from sigma_lite.lab.run import written_yaml
from sigma_lite.storage import StorageError

CLASS = "sigma_lite.lab.expressions.Candidate"
NET = {
    "vocab_size": 512,
    "n_layers": 3,
    "d_model": 48,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 24,
    "n_experts": 32,
    "d_expert": 24,
    "top_k": 1,
}
CORPORA = {"stdlib": 300, "domains": 200, "programs": 200}  # documents: a small model reads few, and is measured soon


class Trial(NamedTuple):
    text: str
    seed: int


class Found(NamedTuple):
    """What a training ended with on held-out text."""

    bits: float  # per byte
    deviation: float  # sum_e |f_e - 1 / E|, mean over layers: 0 .. 2
    busiest: float  # E f - 1 of layer 0's busiest expert
    seconds: float
    failed: str = ""


def search_scale(steps: int, corpus: str = "stdlib", seeds: Sequence[int] = (0,)) -> Scale:
    """Three layers of 32 experts, one active; 1,024 tokens a step."""
    require(corpus in CORPORA, f"corpus {corpus!r}: choose {', '.join(CORPORA)}")
    settings = {
        "seed_everything": 0,
        "model": {
            "net": NET,
            "balance": {"loss": "global", "weight": 0.02, "z_weight": 1e-4, "window_tokens": 50_000},
            "optim": {"lr": 4e-3, "warmup_steps": min(20, steps // 2), "decay_fraction": 0.3},
        },
        "data": {
            "corpus": {"source": corpus, "dir": f"data/search-{corpus}", "max_documents": CORPORA[corpus]},
            "rows": {"length": 64, "per_step": 16, "per_micro": 16},
        },
        "save": {"every": steps},
        "trainer": {"max_steps": steps, "accelerator": "cpu", "devices": 1},
    }
    description = "200 steps took 8 to 14 s on one core, beside other work; a search of 640 expressions trains 1,290 times"
    return Scale(f"search-{corpus}", description, settings, tuple(seeds))


def arm_of_text(text: str, name: str = "") -> Arm:
    """An arm of the lab that trains with an expression."""
    return Arm(name or text, text, {"model": {"custom_balance": {"class_path": CLASS, "init_args": {"expression": text}}}})


class Trials:
    """Trains expressions, each in a folder below OUT/runs that is deleted when its numbers are known.

    A folder that a kill has left behind holds a run that goes on.
    """

    def __init__(self, scale: Scale, out: str | Path, workers: int = 1):
        require(workers >= 1, f"workers={workers}: at least 1 process must train")
        self.scale, self.out, self.workers = scale, Path(out).resolve(), workers
        self._pool = None

    def all(self, trials: Sequence[Trial]) -> Iterator[Found]:
        """Their results, in their order; each as soon as it and those before it are known."""
        if trials and self._pool is None:
            self._pool = self._begin()
        waiting = [self._pool.submit(train_one, trial, self.scale, self.out / "runs") for trial in trials]
        return self._in_order(waiting)

    def _in_order(self, waiting: Sequence) -> Iterator[Found]:
        from concurrent.futures.process import BrokenProcessPool

        for future in waiting:
            try:
                yield future.result()
            except BrokenProcessPool:
                raise ConfigError(
                    f"a process that trained has ended, killed or out of memory (see {self.out}/log.txt); the same command"
                    " goes on"
                ) from None

    def _begin(self):
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        from sigma_lite.data.shards import prepare
        from sigma_lite.runfile import load_run

        prepare(load_run([], dict(self.scale.settings)).corpus)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process one thread; it must be set before they import torch
        arguments = (os.getpid(), str(self.out / "log.txt"))
        return ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_in_worker, initargs=arguments)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _in_worker(parent: int, log: str) -> None:
    """Its output goes to a file, and it ends when the process that started it has."""
    out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def train_one(trial: Trial, scale: Scale, folder: Path) -> Found:
    """Train one expression with one seed, measure it, and delete what is left of it."""
    from sigma_lite.lab.worker import train

    began = time.perf_counter()
    arm = arm_of_text(trial.text)
    place = folder / f"{hashlib.blake2b(trial.text.encode(), digest_size=6).hexdigest()}-{trial.seed}"
    settings = settings_of(arm, scale, trial.seed)
    settings = {**settings, "trainer": {**settings["trainer"], "default_root_dir": str(place)}}
    run = Run(arm.name, trial.seed, settings, place)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            train(written_yaml(run))
        loads = record.read(place / "record.jsonl", "validation")[-1]
        require(math.isfinite(loads["bits_per_byte"]), "its loss is not a number")
    except (StorageError, OSError, MemoryError):  # the machine's fault: the search ends, and the same command goes on
        raise
    except Exception as error:  # what an expression can do to a training: it counts as no good, the search goes on
        return Found(0.0, 0.0, 0.0, time.perf_counter() - began, f"{type(error).__name__}: {error}"[:200])
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Found(loads["bits_per_byte"], deviation(loads["f"]), busiest(loads["f"]), time.perf_counter() - began)


def deviation(f_LE: Sequence[Sequence[float]]) -> float:
    """sum_e |f_e - 1 / E|, mean over layers. Even: 0; one expert has all: 2 (1 - 1 / E)."""
    return sum(sum(abs(f - 1 / len(f_E)) for f in f_E) for f_E in f_LE) / len(f_LE)


def busiest(f_LE: Sequence[Sequence[float]]) -> float:
    """E f - 1 of layer 0's busiest expert."""
    return len(f_LE[0]) * max(f_LE[0]) - 1
