"""Where experts compute, by loads that were recorded: balance, staleness, seconds of planning, and a search's three winners.

Loads of results/toy.jsonl (96 experts, 4 layers, window by window) and of the last windows in results/lab/. Writes
results/bench/placement-MACHINE.json. Placements are exact; seconds are this machine's, of its CPU. Some 20 seconds.

    python benchmarks/placement.py [--ranks 8] [--spots 112] [--generations 300] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sigma_lite import record
from sigma_lite.papers import eplb
from sigma_lite.papers.barbarians import (
    VERIFIERS,
    Program,
    Task,
    measured,
    problem,
    rank_balance,
    search,
    spot_balance,
)
from sigma_lite.scale.placement import identity, waiting
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit

RESULTS = Path(__file__).parents[1] / "results"


def hierarchical(loads_LE: np.ndarray, ranks: int, spots: int) -> np.ndarray:
    """8 groups on 2 nodes."""
    return np.stack([eplb.balanced(loads_E, spots, ranks, groups=8, nodes=2) for loads_E in loads_LE])


PLANNERS: dict[str, Callable] = {
    "where stored": identity,
    "replicate only": eplb.replicate_only,
    "EPLB, global": eplb.plan,
    "EPLB, 8 groups on 2 nodes": hierarchical,
    "snake": eplb.snake,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--spots", type=int, default=112)
    parser.add_argument("--generations", type=int, default=300)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    ranks, spots = options.ranks, options.spots
    entries = list(record.read(RESULTS / "toy.jsonl", "load"))
    windows = [np.array(entry["f"]) for entry in entries]
    task = Task(windows, ranks, spots, measured)
    found = winners(task, options.generations)
    planners = PLANNERS | {"EPLB, all layers at once": Program()}
    planners["found by our search"] = Program(**found["search by ranks"]["program"])
    facts: dict[str, Any] = {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/placement.py --ranks {ranks} --spots {spots} --generations {options.generations}",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "unit": "rows of the fullest rank over an even share, summed over layers; 1 is even",
        "ranks": ranks,
        "spots": spots,
        "at_the_switch": at_the_switch(windows, entries, ranks, spots),
        "staleness": staleness(planners, windows, [entry["k"] for entry in entries], ranks, spots),
        "planning_ms": {name: round(1000 * measured(planner, task, rounds=30), 4) for name, planner in planners.items()},
        "fifty_eight_layers": large(),
        "lab": lab(ranks, spots),
        "search": found,
    }
    for name in ("at_the_switch", "staleness", "planning_ms", "fifty_eight_layers", "lab", "search"):
        print(name, json.dumps(facts[name], indent=1))
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    write_json(options.out or RESULTS / "bench" / f"placement-{machine}.json", facts)


def staleness(
    planners: dict[str, Callable], windows: list[np.ndarray], ks: list[list[int]], ranks: int, spots: int
) -> dict[str, Any]:
    """A plan of window t, scored on t and on t + 1, by where the switch of sparsity lies."""
    found: dict[str, Any] = {}
    for name, planner in planners.items():
        stages: dict[str, list] = {"before the switch": [], "across it": [], "after it": []}
        for t in range(len(windows) - 1):
            stage = "across it" if ks[t] != ks[t + 1] else "after it" if ks[t][0] == 1 else "before the switch"
            placed = planner(windows[t], ranks, spots)
            stages[stage].append([waiting(placed, windows[t + later], ranks) for later in (0, 1)])
        rows = {stage: np.mean(values, axis=0).round(4).tolist() for stage, values in stages.items()}
        found[name] = {stage: {"same window": same, "next": later} for stage, (same, later) in rows.items()}
    return found


def at_the_switch(windows: list[np.ndarray], entries: list[dict], ranks: int, spots: int) -> dict[str, Any]:
    """EPLB of the window before, of one step's tokens and of all of the first window with the new K, on it and on the next.

    The step is drawn from the window's shares, token by token, 20 times over: a real step's neighbours choose alike, so it
    says a little less.
    """
    first = next(n for n, entry in enumerate(entries) if entry["k"] != entries[0]["k"])
    before, now, later = windows[first - 1 : first + 2]
    rng, tokens = np.random.default_rng(0), entries[0]["tokens"] // entries[0]["step"]
    draws = [np.stack([rng.multinomial(tokens, f_E / f_E.sum()) for f_E in now]) for _ in range(20)]
    plans = {"the window before": [before], f"one step of {tokens} tokens": draws, "the whole window": [now]}

    def scored(loads: list[np.ndarray], on: np.ndarray) -> float:
        return round(float(np.mean([waiting(eplb.plan(of, ranks, spots), on, ranks) for of in loads])), 4)

    return {name: {"same window": scored(of, now), "next": scored(of, later)} for name, of in plans.items()}


def large() -> dict[str, Any]:
    """58 layers, 256 experts, 288 spots, 32 ranks, lognormal(0, 1) loads: the size of DeepSeek-V3."""
    loads = np.random.default_rng(0).lognormal(0, 1, (58, 256))
    programs = {"EPLB, all layers at once": Program(), "threshold and snake": Program("threshold", "snake")}
    found = {}
    for name, planner in {**PLANNERS, **programs}.items():
        if "groups" not in name:
            begun = time.process_time()
            placed = planner(loads, 32, 288)
            took = time.process_time() - begun
            found[name] = {"average over fullest": round(1 / waiting(placed, loads, 32), 4), "ms": round(1000 * took, 1)}
    return found


def lab(ranks: int, spots: int) -> dict[str, Any]:
    """Runs of 96 experts, seed 0, after training: held-out text on plans by its own loads and by training's last window."""
    found = {}
    for name in ("fig2", "fig3", "balancers"):
        for run in json.loads((RESULTS / "lab" / f"{name}-cpu.json").read_text("utf-8"))["runs"]:
            last, heldout = (np.array(run[when]["f"]) for when in ("last", "heldout"))
            if run["seed"] == 0 and last.shape[1] == 96:
                found[f"{name}: {run['arm']}"] = {
                    "where stored": round(waiting(identity(heldout, ranks, 96), heldout, ranks), 4),
                    "EPLB of these loads": round(waiting(eplb.plan(heldout, ranks, spots), heldout, ranks), 4),
                    "EPLB of the last window": round(waiting(eplb.plan(last, ranks, spots), heldout, ranks), 4),
                    "snake of the last window": round(waiting(eplb.snake(last, ranks, spots), heldout, ranks), 4),
                }
    return found


def winners(task: Task, generations: int) -> dict[str, Any]:
    """What 300 mutations find under each verifier, and EPLB itself, all judged by balance over ranks and time."""
    scores = {name: make(task) for name, make in VERIFIERS.items()}
    kept = {name: functools.cache(score) for name, score in scores.items()}
    candidates: dict[str, Callable] = {"EPLB, layer by layer": eplb.plan, "snake": eplb.snake, "EPLB, all layers": Program()}
    candidates |= {f"search by {name}": search(score, generations, seed=1) for name, score in kept.items()}
    found = {}
    for name, program in candidates.items():
        placed = task.plans(program)
        found[name] = {
            "program": program.__dict__ if isinstance(program, Program) else program.__name__,
            "balance over ranks, next window": round(rank_balance(program, task), 4),
            "balance over spots": round(float(np.mean([spot_balance(*pair) for pair in placed])), 4),
            "ms": round(1000 * measured(program, task, rounds=10), 3),
            "problem": problem(program, task),
            **{f"score: {verifier}": round(score(program), 4) for verifier, score in scores.items()},
        }
    return found


if __name__ == "__main__":
    main()
