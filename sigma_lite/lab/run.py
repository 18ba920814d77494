"""Run an experiment's arms side by side, each in a process of its own, and collect what they recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sigma_lite.config import ConfigError, require
from sigma_lite.lab.catalogue import EXPERIMENTS
from sigma_lite.lab.experiment import Arm, Experiment, Run, Scale, runs_of
from sigma_lite.lab.inmemory import as_text, copied, identities, taken_apart, warn_if_written_to
from sigma_lite.lab.kept import forget, require_code_in_memory, require_commit, settle
from sigma_lite.lab.results import Results, is_finished, read_results, results_path, write_results
from sigma_lite.record import last_step
from sigma_lite.runfile import load_run
from sigma_lite.storage import atomic_write, writable

RUNS, RESULTS = Path("runs/lab"), Path("results/lab")
WORKER = "from sys import argv; from sigma_lite.lab.worker import main; main(*argv[1:])"


def run_experiment(
    experiment: Experiment,
    scale: Scale,
    *,
    command: str = "",
    runs: str | Path = RUNS,
    results: str | Path = RESULTS,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    workers: int | None = None,
    if_changed: str | None = None,
) -> Path:
    """Train every arm that is not finished, then write RESULTS/NAME-SCALE.json; returns its path.

    Args:
        runs: where runs are kept; a run that was cut off continues, a finished one is not repeated.
        seeds: instead of the scale's; what the file holds of other seeds stays.
        arms: names, instead of all, with those that they branch from; what the file holds of other arms stays.
        workers: processes at a time; default one a core, of one thread each, or one where the scale wants a GPU.
        if_changed: what to do with kept runs that other code has made: "again" or "reuse"; None refuses (see kept.py).

    Raises: ConfigError for an unknown arm, for kept runs of other code, for a recording of code that is in no commit, or
        naming the logs of arms that failed; the others' work is kept.
    """
    require(workers is None or workers >= 1, f"workers={workers}: at least 1 process must run")
    wanted = runs_of(experiment, scale, Path(runs), seeds, arms)
    require_commit(scale, Path(results).resolve() == RESULTS.resolve() and not all(map(is_finished, wanted)))
    settle(wanted, if_changed)
    writable(results)
    _prepare_data(wanted)  # all settings are checked before any work starts
    todo = {run.dir: run for run in wanted if not is_finished(run)}  # two arms with the same settings are one run
    for has_parent in (False, True):
        stage = [run for run in todo.values() if (run.branch is not None) == has_parent]
        _run_all(stage, workers or default_workers(scale), experiment.name)
    path = results_path(results, experiment.name, scale.name)
    write_results(path, experiment, scale, wanted, command)
    return path


def compare(
    arms: Mapping[str, Any],
    scale: Scale,
    *,
    name: str = "mine",
    seeds: Sequence[int] = (0,),
    runs: str | Path = RUNS,
    results: str | Path = RESULTS,
    if_changed: str | None = None,
) -> Results:
    """Train your own arms one after another in this process, for instance from a notebook.

        def flat(routing, f_E):
            return len(f_E) * routing.probs.mean(0).square().sum()

        mine = lab.compare({"LBL": {}, "flat": flat}, lab.scale("quick"))
        mine                                # as the last line of a cell: the table of final numbers
        mine.figure("layer0_deviation")     # any of sigma_lite.figures.OF_RESULTS

    Args:
        arms: name -> nested settings laid over the scale's ({"model": {"balance": {"weight": 0.1}}}), or a balancer: a
            function (routing, f_E) -> scalar or a Balancer object; or a `Parts`, such as Parts(router=Mine). Settings may
            hold these too, as model.custom_balance and model.parts. Runs are kept. One of an object is found again by its
            code: that of its class and what the class inherits, of helpers that it names in the same file or notebook,
            and the values that it reads. So an edit of any of these is a new run; the run before stays in RUNS until you
            delete it. Each run gets a copy of an object, as it is now: what one seed changes in it, the next does not see.
        name: of the results file, RESULTS/NAME-SCALE.json.
        if_changed: what to do with kept runs that another version of this package has made: "again" trains them anew,
            "reuse" takes them as they are.

    Raises: ConfigError, before the first arm trains, for what is no balancer, for settings that cannot be, and for kept
        runs of other code, naming the files that changed.
    """
    from sigma_lite.lab.worker import train

    require(len(arms) > 0, "there is no arm: give at least one, such as {'LBL': {}}")
    require(
        name not in EXPERIMENTS,
        f"name={name!r} is an experiment of the lab, whose results would be replaced: choose another",
    )
    split = {arm: taken_apart(value) for arm, value in arms.items()}  # what is none is refused before the first arm trains
    own = {arm: objects for arm, (_, objects) in split.items() if objects}
    known = {arm: identities(objects) for arm, objects in own.items()}
    made = tuple(Arm(arm, "", patch, own=as_text(known.get(arm, {}))) for arm, (patch, _) in split.items())
    experiment = Experiment(name, "How do these arms compare?", made)
    wanted = runs_of(experiment, scale, Path(runs), seeds)
    require_code_in_memory()
    settle(wanted, if_changed)
    writable(results)
    _prepare_data(wanted)
    for run in wanted:
        if not_told := [what for one in known.get(run.arm, {}).values() for what in one.get("unknown", ())]:
            print(f"{run.arm}: trained anew, nobody can tell whether it is the same: {', '.join(not_told)}", file=sys.stderr)
            forget(run.dir)
        if not is_finished(run):
            train(written_yaml(run), **copied(own.get(run.arm, {}), run.arm, last=len(seeds) == 1))
            if run.arm in own:
                warn_if_written_to(own[run.arm], known[run.arm], run.arm)
    path = results_path(results, experiment.name, scale.name)
    write_results(path, experiment, scale, wanted, "lab.compare")
    return read_results(path)


def default_workers(scale: Scale) -> int:
    """One process a core for one-thread arms; one in all where the scale asks for an accelerator."""
    if scale.settings["trainer"]["accelerator"] != "cpu":  # type: ignore[index]
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def written_yaml(run: Run) -> Path:
    """The run's settings as RUN/run.yaml, which `sigma-lite fit -c` takes as well."""
    path = run.dir / "run.yaml"
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(run.settings, sort_keys=False).encode())
    return path


def _prepare_data(runs: Sequence[Run]) -> None:
    """Tokenizer and shards of every corpus that the runs read; prepared ones are left alone."""
    from sigma_lite.data.shards import prepare

    corpora = {load_run([written_yaml(run)]).corpus for run in runs}
    for corpus in sorted(corpora, key=lambda c: c.dir):
        prepare(corpus)


# ---------------------------------------------------------------------------------------------------------- processes


def _run_all(runs: Sequence[Run], workers: int, name: str) -> None:
    """At most `workers` processes at a time until every run has ended; Ctrl-C or SIGTERM stops them, and nothing is lost.

    One that fails does not stop the others, which may be hours into their work. Raises ConfigError at the end.
    """
    from tqdm.auto import tqdm

    waiting, running, failures = list(runs), {}, []  # running: process -> run
    total, begun = sum(run.steps for run in runs), sum(map(_steps_done, runs))
    bar = tqdm(total=total, initial=begun, unit="step", desc=f"{name}: {len(runs)} runs", disable=not runs)
    handler = _end_on_sigterm()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop(0)
                running[_start(run)] = run
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                failures += _failure(process, running.pop(process))
            if moved := sum(map(_steps_done, runs)) - bar.n:
                bar.set_postfix_str(", ".join(f"{run.arm} #{run.seed}" for run in running.values())[:60], refresh=False)
                bar.update(moved)
    finally:
        bar.close()
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    if failures:
        raise ConfigError("; ".join(failures))


def _end_on_sigterm() -> Any:
    """Let SIGTERM end this process by an exception, so that its workers end with it; returns the handler before."""
    if threading.current_thread() is not threading.main_thread():
        return None  # only the main thread hears signals
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _steps_done(run: Run) -> int:
    return max(last_step(run.dir / "record.jsonl"), run.branch[1] if run.branch else 0)


def _start(run: Run) -> subprocess.Popen:
    parent = [str(run.branch[0]), str(run.branch[1])] if run.branch else []
    with open(run.dir / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(written_yaml(run)), *parent],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )


def _failure(process: subprocess.Popen, run: Run) -> list[str]:
    """A sentence about a process that has ended without finishing its run."""
    if process.returncode == 0 and is_finished(run):
        return []
    log = (run.dir / "log.txt").read_text("utf-8", "replace").replace("\r", "\n").splitlines()
    last = next((line.strip() for line in reversed(log) if line.strip()), "no output")
    return [f"arm {run.arm!r} seed {run.seed} stopped with code {process.returncode}: {last} ({run.dir}/log.txt)"]
