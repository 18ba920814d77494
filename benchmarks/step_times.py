"""Seconds of one training step of each model of the experiment `worth`, side by side on one core.

Forward, the whole objective, backward, clipping and fused AdamW on rows with documents, as `sigma-lite fit` makes them;
the mixture once before its switch and once after it. Each variant runs in a process of its own; all are timed in each
round, in random order, so a drifting machine drifts for all. What counts is CPU seconds. Writes
results/bench/step_times-MACHINE.json, which gives the experiment's figures their axis of seconds, and
`lab.catalogue.DENSE_STEPS`: how many steps the dense twin makes in the time of the mixture's run.

    python benchmarks/step_times.py [--rounds 30] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import Elsewhere, interleave, summary

from sigma_lite.balance.objective import objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.kernels import explain_backend
from sigma_lite.lab.catalogue import WORTH
from sigma_lite.lab.experiment import settings_of
from sigma_lite.lab.scales import scale
from sigma_lite.model import Transformer
from sigma_lite.runfile import load_run
from sigma_lite.storage import write_json
from sigma_lite.train.memory import keep_freed_memory
from sigma_lite.train.optim import adamw, clip_gradients, total_norm
from sigma_lite.train.provenance import device_name, git_commit

ROOT = Path(__file__).parents[1]
BEFORE = ", before its switch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    arms = [arm.name for arm in WORTH if "time" not in arm.name]
    names = [f"{arms[0]}{BEFORE}", *arms]
    steps = {name: Elsewhere(variant, name) for name in names}
    for step in steps.values():
        step(0)  # compile and warm up
    seconds = interleave(steps, options.rounds)
    for step in steps.values():
        step.close()
    results = {name: summary(spent, seconds[arms[-2]]) for name, spent in seconds.items()}
    toy = load(arms[0])
    share = toy.sparsity.switch_step / toy.trainer["max_steps"]
    mixture = share * results[names[0]]["median_s"] + (1 - share) * results[arms[0]]["median_s"]
    facts = {
        "what": "one optimizer step of each arm of `worth` at the toy scale, CPU seconds; times_ours: of the dense twin's",
        "dense_steps_in_the_time_of_one_of_the_mixture": round(mixture / results[arms[-2]]["median_s"], 3),
        "backend": explain_backend(torch.empty(1, toy.net.d_model), torch.empty(1, 2 * toy.net.d_expert, toy.net.d_model)),
        "machine": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "results": results,
    }
    out = options.out or ROOT / "results" / "bench" / f"step_times-{platform.machine()}-{os.cpu_count()}cpu.json"
    write_json(out, facts)
    print(json.dumps(facts, indent=1), f"\nwritten to {out}")


def load(name: str):
    arm = next(arm for arm in WORTH if arm.name == name.removesuffix(BEFORE))
    return load_run([], dict(settings_of(arm, scale("toy"), seed=0)))


def variant(name: str) -> Callable[[int], float]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as `sigma-lite fit` does
    torch.manual_seed(0)
    run = load(name)
    model, whole = Transformer(run.net), objective(run.balance, run.net.n_layers)
    first = 0 if name.endswith(BEFORE) else run.sparsity.switch_step
    head = {"head": run.sparsity.head, "target": run.net.top_k, "n_layers": run.net.n_layers}
    model.set_k(k_per_layer(first, switch_step=run.sparsity.switch_step, **head))
    optimizer = adamw(model, run.optim)
    rows = torch.randint(0, run.net.vocab_size, (4, run.rows.per_step, run.rows.length + 1))
    documents = (torch.rand(4, run.rows.per_step, run.rows.length) < 0.001).cumsum(-1)

    def step(number: int) -> float:
        ids = rows[number % len(rows)]
        lm, routings = model.loss(ids[:, :-1], ids[:, 1:], documents_BS=documents[number % len(rows)])
        whole(lm, routings, PooledCounts(), len(ids)).total.backward()
        clip_gradients(model.parameters(), total_norm(p.grad for p in model.parameters() if p.grad is not None), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return lm.item()

    return step


if __name__ == "__main__":
    main()
