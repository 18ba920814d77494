"""A trained dense model, split into a shared expert and routed ones: rankings of units, experts per token, training.

The model is a finished run of one expert, such as `make dense`'s. Held-out bits per byte right after the split (the shared
expert alone, and with routed ones behind a router that knows nothing yet) and after distillation; the curve over experts
per token; upcycled copies beside it. Seeds draw the random ranking, the router and the calibration rows; the dense model
is one. Writes results/bench/dense2moe-NAME.json.

    python benchmarks/dense2moe.py --model NAME_OR_RUN [--seeds 3] [--steps 60] [--rows 160] [--heldout 128] [--copies 1]

With 3 seeds, 12 steps, 48 rows and 16 held-out ones it took 23 core-minutes for 4 layers of width 128 (on one thread, in
company); the defaults do five times as many steps and eight times as many held-out rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from chosen import RESULTS, add_model, opened, said

from sigma_lite.convert.distil import distil
from sigma_lite.data.rows import Batch
from sigma_lite.model import Transformer
from sigma_lite.papers.dense2moe import ORDERS, Dense2MoE, TaylorSplit, Upcycle, set_k
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit

LEARNING_RATE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of distillation: a third of them of the shared experts alone")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--heldout", type=int, default=128, help="rows, spread over the held-out text")
    parser.add_argument("--copies", type=int, default=1, help="seeds for which upcycled copies are trained too")
    options = parser.parse_args()
    begun = time.perf_counter()
    model, rows_of, measure = opened(options.model, options.data, options.rows, options.heldout)
    facts: dict[str, Any] = {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/dense2moe.py --model {said(options.model)} --seeds {options.seeds}"
        f" --steps {options.steps} --rows {options.rows} --heldout {options.heldout} --copies {options.copies}",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "unit": f"bits per byte of {options.heldout} held-out rows",
        "net": dataclasses.asdict(model.config),
        "dense": measure(model),
        "splits": [],
        "copies": [],
    }
    for seed in range(options.seeds):
        rows = rows_of(seed)
        for by in ORDERS:
            facts["splits"].append(one_split(model, rows, measure, by, seed, options.steps))
            print(facts["splits"][-1], flush=True)
        for fresh in (0.0, 0.5) if seed < options.copies else ():
            facts["copies"].append(copies(model, rows, measure, fresh, seed, options.steps))
            print(facts["copies"][-1], flush=True)
    facts["seconds"] = round(time.perf_counter() - begun)
    write_json(options.out or RESULTS / "bench" / f"dense2moe-{options.model.name}.json", facts)


def one_split(model: Transformer, rows: Sequence[Batch], measure, by: str, seed: int, steps: int) -> dict[str, Any]:
    """Right after the split and after distillation, by experts per token."""
    entry: dict[str, Any] = {"by": by, "seed": seed}
    split = TaylorSplit(by=by, seed=seed)(model, rows)
    entry["after the split"] = sweep(split, measure, (0, 2, 12))
    first = steps // 3
    stages = {"shared_steps": first, "routed_steps": steps - first, "lr": LEARNING_RATE}
    taught = Dense2MoE(by=by, seed=seed, **stages)(model, rows)
    every = by == "taylor" and seed == 0
    entry["after distillation"] = sweep(taught, measure, range(13) if every else (0, 2, 12))
    return entry


def sweep(model: Transformer, measure, ks: Sequence[int]) -> dict[str, float]:
    """By experts per token; the model is left with as many as it had."""
    had, found = model.config.top_k, {}
    for k in ks:
        set_k(model, k)
        found[str(k)] = measure(model)
    set_k(model, had)
    return found


def copies(model: Transformer, rows: Sequence[Batch], measure, fresh: float, seed: int, steps: int) -> dict[str, Any]:
    """8 copies of the whole layer, 2 for each token: after the same distillation, and how unlike they are."""
    many = Upcycle(fresh=fresh, seed=seed)(model, rows)
    entry: dict[str, Any] = {"fresh": fresh, "seed": seed, "after copying": measure(many)}
    learns = [w for b in many.blocks for w in (*b.moe.experts.parameters(), *b.moe.router.parameters())]
    distil(many, model, rows, steps, learns=learns, lr=LEARNING_RATE, balance=1e-2)
    spread = [
        b.moe.experts.w2.detach().std(0).square().mean() / b.moe.experts.w2.detach().square().mean() for b in many.blocks
    ]
    return {
        **entry,
        "after distillation": measure(many),
        "experts differ by": round(math.sqrt(sum(spread) / len(spread)), 4),
    }


if __name__ == "__main__":
    main()
