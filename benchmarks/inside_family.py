"""Inside the family's routers: null experts by kind of token, busiest devices, a hinge, sure tokens, similar rows.

RUNS is where `sigma-lite lab run family --scale cpu` keeps its runs (--runs). Each finished run of ARMS is opened once, and
only read; the same command again adds those that have finished since. Held-out rows are routed in an order of chance, as
many at a time as a training step has, so that a batch here is what a step would see. Takes some 10 s a run on one thread.
Writes results/bench/inside-family.json.

    python benchmarks/inside_family.py [RUNS] [--data DIR] [--arms NAME ...] [--scale cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import routed
import torch
from torch import Tensor

from sigma_lite import lab, record
from sigma_lite.balance.losses import load_share
from sigma_lite.balance.metrics import rounded
from sigma_lite.data.kinds import KINDS
from sigma_lite.data.rows import Rows, epoch_order
from sigma_lite.data.shards import load
from sigma_lite.lab.experiment import Run, runs_of
from sigma_lite.lab.family import BASE
from sigma_lite.lab.results import is_finished
from sigma_lite.lab.run import RUNS
from sigma_lite.scale.traffic import flops_per_token
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import atomic_write
from sigma_lite.train.provenance import device_name, git_commit

ROOT = Path(__file__).parents[1]
SHINKA, DEVICES = "ShinkaEvolve's LBL", 4
ARMS = (
    BASE,
    "nothing",
    "Top-1 LBL, temperature 0.1",
    SHINKA,
    "mutual information",
    "scale-free LBL, temperature 0.3",
    "K = 4 of 96",
    "frozen router",
    "grouped experts, K = 4 in 4 groups",
    "null experts, K = 2 of 96 + 96",
    "SimBal",
    "online K-means",
)


def main(args: Sequence[str] | None = None) -> None:
    options = parsed(args)
    torch.set_num_threads(1)
    scale = lab.scale(options.scale)
    wanted = runs_of(lab.experiment("family"), scale, options.RUNS, arms=options.arms)
    found = json.loads(options.out.read_bytes())["runs"] if options.out.is_file() else []
    for run in filter(is_finished, wanted):
        start = record.read(run.dir / "record.jsonl", "run")[-1]
        if any(known(entry, run) and entry["time"] == start["time"] for entry in found):
            continue
        told = {"arm": run.arm, "seed": run.seed, **{key: start[key] for key in ("time", "commit", "device")}}
        found = [entry for entry in found if not known(entry, run)] + [{**told, **inside(run, options.data)}]
        found.sort(key=lambda entry: (ARMS.index(entry["arm"]), entry["seed"]))
        write(options, scale, found)
        print(run.arm, run.seed, flush=True)
    missing = [f"{run.arm} #{run.seed}" for run in wanted if not is_finished(run)]
    print(f"{options.out}; not finished, run this again later: {', '.join(missing) or 'none'}")


def parsed(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("RUNS", type=Path, nargs="?", default=RUNS, help="the lab's folder of runs (%(default)s)")
    parser.add_argument("--data", type=Path, help="where the folder of the runs' text is (default: where they found it)")
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS, metavar="NAME", help="; ".join(ARMS))
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "inside-family.json")
    return parser.parse_args(args)


def known(entry: Mapping[str, Any], run: Run) -> bool:
    return (entry["arm"], entry["seed"]) == (run.arm, run.seed)


def write(options: argparse.Namespace, scale: lab.Scale, found: Sequence[Mapping[str, Any]]) -> None:
    net, rows = scale.settings["model"]["net"], scale.settings["data"]["rows"]  # type: ignore[index]
    facts = {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/inside_family.py --scale {options.scale}",
        "measured": {"device": device_name(torch.device("cpu")), "commit": git_commit()},
        "unit": "one number a layer unless said; nats; loads of held-out text; flops of a token's forward pass",
        "kinds": KINDS,
        "devices": DEVICES,
        "by_chance": routed.by_chance(net["n_experts"], rows["per_step"] * rows["length"]),
        "runs": found,
    }
    with atomic_write(options.out) as file:
        file.write(json.dumps(facts, separators=(",", ":")).replace('{"arm":', '\n{"arm":').encode() + b"\n")


# ------------------------------------------------------------------------------------------------------------ one run


def inside(run: Run, data: Path | None) -> dict[str, Any]:
    """Everything that is measured of a run: from its diary, its last weights and one pass over its held-out text."""
    entries, trained = record.read(run.dir / "record.jsonl"), Trained(run.dir)
    folder = Path(trained.settings["corpus"]["dir"])
    prepared = load(data / folder.name if data else folder, splits=("heldout",))
    rows = Rows(prepared.heldout, prepared.token_bytes, trained.length)
    layers = seen(trained, rows, trained.settings["rows"]["per_step"])
    net = trained.model.config
    experts = [routed.mean_working(layer.working_GK.sum(0)) for layer in layers]
    columns = sum(len(layer.P_C) - net.n_experts for layer in layers)  # of routers, beyond those of experts
    flops = flops_per_token(net, (1,) * net.n_layers, trained.length).forward
    flops += 2 * net.d_model * (3 * net.d_expert * sum(k - 1 for k in experts) + columns)
    nulls = {
        "working": [rounded(load_share(layer.working_GK.sum(0))) for layer in layers],
        "by_kind": [rounded(routed.mean_working(layer.working_GK)) for layer in layers],
    }
    heldout = [entry for entry in entries if entry["kind"] == "validation"][-1]
    return {
        "bits_per_byte": heldout["bits_per_byte"],
        "tokens": int(layers[0].working_GK.sum()),
        "flops": round(flops),
        "experts": rounded(torch.tensor(experts)),
        **(nulls if columns else {}),
        "kind_tokens": layers[0].working_GK.sum(1).tolist(),
        "busiest_device": columns_of([routed.busiest(layer.devices_NM) for layer in layers]),
        "entropy": columns_of([routed.entropies(layer, net.n_experts) for layer in layers]),
        "starved": {
            name: columns_of([routed.starved(layer.counts_NE, threshold) for layer in layers])
            for name, threshold in routed.THRESHOLDS.items()
        },
        "windows": routed.starved_windows([entry["f"] for entry in entries if entry["kind"] == "load"]),
        **({"hinge": routed.hinge(entries)} if run.arm in (SHINKA, BASE) else {}),
        "rows": columns_of([
            routed.rows_and_loads(block.moe.router.weight.detach()[: net.n_experts], layer)
            for block, layer in zip(trained.model.blocks, layers, strict=True)
        ]),
    }  # fmt: skip


@torch.no_grad()
def seen(trained: Trained, rows: Rows, per_step: int) -> list[routed.Seen]:
    """Every layer's routing, of whole batches of `per_step` rows."""
    E, parts = trained.model.config.n_experts, []
    for kinds_T, routings in batches(trained, rows, per_step):
        parts.append([routed.of(kinds_T, routing, E, DEVICES) for routing in routings])
    return [routed.joined(layer) for layer in zip(*parts, strict=True)]


def batches(trained: Trained, rows: Rows, per_step: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """(kind of each token that is read, the layers' routings)."""
    order = epoch_order(0, 0, len(rows))
    S = rows.length
    for picked in order[: len(rows) // per_step * per_step].reshape(-1, per_step):
        ids, kinds = rows.tokens([(int(row) * S, int(row) * S + S + 1) for row in picked])
        batch = rows.batch(ids, kinds, np.ones((per_step, S), bool), picked.tolist())
        _, routings = trained.model.backbone(batch.ids_BS, documents_BS=batch.documents_BS)
        yield torch.from_numpy(kinds[:, :-1].astype(np.int64)).flatten(), routings[: trained.model.config.n_layers]


def columns_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """One list a name, with a number a layer."""
    return {name: rounded(torch.tensor([row[name] for row in rows], dtype=torch.float64)) for name in rows[0]}


if __name__ == "__main__":
    main()
