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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from sigma_lite import lab, record
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.balance.metrics import entropy
from sigma_lite.data.kinds import KINDS
from sigma_lite.data.rows import Rows, epoch_order
from sigma_lite.data.shards import load
from sigma_lite.lab.experiment import Run, runs_of
from sigma_lite.lab.family import BASE
from sigma_lite.lab.results import is_finished
from sigma_lite.lab.run import RUNS
from sigma_lite.papers.adamoe import true_experts
from sigma_lite.papers.moge import device_loads
from sigma_lite.papers.shinka import LISTING, PRINTED, missing_share
from sigma_lite.scale.traffic import flops_per_token
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import atomic_write
from sigma_lite.train.callbacks.diary import rounded
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
THRESHOLDS = {"printed": PRINTED, "listing": LISTING}


class Seen(NamedTuple):
    """One layer's routing of the held-out text: N batches, E experts, C columns of the router, G kinds of tokens."""

    counts_NE: Tensor  # int64, slots
    devices_NM: Tensor  # int64, slots
    P_C: Tensor  # mean probability
    logits_C: Tensor  # mean logit
    entropy: float  # mean over tokens of each token's, nats
    working_GK: Tensor  # int64, tokens by kind and by number of experts that work for them, 0 .. K


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
        "by_chance": by_chance(net["n_experts"], rows["per_step"] * rows["length"]),
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
    experts = [mean_working(layer.working_GK.sum(0)) for layer in layers]
    columns = sum(len(layer.P_C) - net.n_experts for layer in layers)  # of routers, beyond those of experts
    flops = flops_per_token(net, (1,) * net.n_layers, trained.length).forward
    flops += 2 * net.d_model * (3 * net.d_expert * sum(k - 1 for k in experts) + columns)
    nulls = {"by_kind": [rounded(mean_working(layer.working_GK)) for layer in layers]} if columns else {}
    heldout = [entry for entry in entries if entry["kind"] == "validation"][-1]
    return {
        "bits_per_byte": heldout["bits_per_byte"],
        "tokens": int(layers[0].working_GK.sum()),
        "flops": round(flops),
        "experts": rounded(torch.tensor(experts)),
        "working": [rounded(load_share(layer.working_GK.sum(0))) for layer in layers] if columns else None,
        **nulls,
        "kind_tokens": layers[0].working_GK.sum(1).tolist(),
        "busiest_device": columns_of([busiest(layer.devices_NM) for layer in layers]),
        "entropy": columns_of([entropies(layer, net.n_experts) for layer in layers]),
        "starved": {name: columns_of([starved(one.counts_NE, x) for one in layers]) for name, x in THRESHOLDS.items()},
        "windows": starved_windows([entry["f"] for entry in entries if entry["kind"] == "load"]),
        **({"hinge": hinge(entries)} if run.arm in (SHINKA, BASE) else {}),
        "rows": columns_of([
            rows_and_loads(block.moe.router.weight.detach()[: net.n_experts], layer)
            for block, layer in zip(trained.model.blocks, layers, strict=True)
        ]),
    }  # fmt: skip


@torch.no_grad()
def seen(trained: Trained, rows: Rows, per_step: int) -> list[Seen]:
    """Every layer's routing, of whole batches of `per_step` rows."""
    E, parts = trained.model.config.n_experts, []
    for kinds_T, routings in batches(trained, rows, per_step):
        parts.append([
            Seen(
                counts_NE=expert_counts(r.ids, E)[None],
                devices_NM=device_loads(r.ids, E, DEVICES)[None],
                P_C=r.probs.double().mean(0),
                logits_C=r.logits.double().mean(0),
                entropy=float(entropy(r.probs).double().mean()),
                working_GK=working(kinds_T, r.ids),
            )
            for r in routings
        ])  # fmt: skip
    return [joined(layer) for layer in zip(*parts, strict=True)]


def batches(trained: Trained, rows: Rows, per_step: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """(kind of each token that is read, the layers' routings)."""
    order = epoch_order(0, 0, len(rows))
    S = rows.length
    for picked in order[: len(rows) // per_step * per_step].reshape(-1, per_step):
        ids, kinds = rows.tokens([(int(row) * S, int(row) * S + S + 1) for row in picked])
        batch = rows.batch(ids, kinds, np.ones((per_step, S), bool), picked.tolist())
        _, routings = trained.model.backbone(batch.ids_BS, documents_BS=batch.documents_BS)
        yield torch.from_numpy(kinds[:, :-1].astype(np.int64)).flatten(), routings[: trained.model.config.n_layers]


def joined(parts: Sequence[Seen]) -> Seen:
    counts_NE, devices_NM, P_NC, logits_NC, entropies_N, working_NGK = zip(*parts, strict=True)
    width = max(w.shape[1] for w in working_NGK)  # a router without a fixed K has batches of several widths
    padded = [torch.nn.functional.pad(w, (0, width - w.shape[1])) for w in working_NGK]
    mean_P, mean_logits = (torch.stack(column).mean(0) for column in (P_NC, logits_NC))
    return Seen(
        torch.cat(counts_NE), torch.cat(devices_NM), mean_P, mean_logits, sum(entropies_N) / len(parts), sum(padded)
    )  # fmt: skip


def columns_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """One list a name, with a number a layer."""
    return {name: rounded(torch.tensor([row[name] for row in rows], dtype=torch.float64)) for name in rows[0]}


# ----------------------------------------------------------------------------------------------------------- formulas


def working(kinds_T: Tensor, ids_TK: Tensor) -> Tensor:
    """Tokens of each kind for which 0, 1, .. K experts work, int64 [kinds, K + 1]."""
    width = ids_TK.shape[1] + 1
    cells_T = kinds_T * width + true_experts(ids_TK)
    return torch.bincount(cells_T, minlength=len(KINDS) * width).view(-1, width)


def mean_working(tokens: Tensor) -> Any:
    """Experts per token, of counts [.., K + 1]: along the last axis; 0 for a kind that does not occur."""
    k = torch.arange(tokens.shape[-1], dtype=torch.float64)
    means = (tokens * k).sum(-1) / tokens.sum(-1).clamp(min=1)
    return means if means.dim() else float(means)


def busiest(devices_NM: Tensor) -> dict[str, float]:
    """How much more than its share the busiest device has, 0 .. M - 1: in a step (mean), and over all of the text."""
    share_NM = devices_NM.shape[1] * load_share(devices_NM).double()
    whole = devices_NM.shape[1] * load_share(devices_NM.sum(0)).double()
    return {"step": float(share_NM.amax(1).mean() - 1), "whole": float(whole.max() - 1)}


def entropies(layer: Seen, n_experts: int) -> dict[str, float]:
    """mean: of the mean routing; token: mean of a token's; load: of the loads. dead: experts without a token.

    mean - token is the mutual information of token and expert. Nats, 0 .. log of the router's columns.
    """
    counts_E = layer.counts_NE.sum(0)
    return {
        "mean": float(entropy(layer.P_C)),
        "token": layer.entropy,
        "load": float(entropy(load_share(counts_E).double())),
        "dead": float((counts_E == 0).sum()),
        "max": float(n_experts * load_share(counts_E).double().max() - 1),
        "min": float(n_experts * load_share(counts_E).double().min() - 1),
    }


def starved(counts_NE: Tensor, threshold: float) -> dict[str, float]:
    """steps: share of batches in which some expert has less than threshold / E of the slots, so that ShinkaEvolve's hinge
    acts; experts: how many these are, mean over batches; missing: what the hinge sums up, mean over batches."""
    f_NE = load_share(counts_NE)
    missing_N = torch.stack([missing_share(f_E, threshold) for f_E in f_NE])
    return {
        "steps": float((missing_N > 0).double().mean()),
        "experts": float((f_NE < threshold / f_NE.shape[1]).sum(1).double().mean()),
        "missing": float(missing_N.double().mean()),
    }


def by_chance(n_experts: int, tokens: int, draws: int = 2000) -> dict[str, dict[str, float]]:
    """`starved`, if every token took any expert with the same chance: what a batch's size alone does."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(n_experts, (draws, tokens), generator=generator)
    counts_NE = torch.stack([torch.bincount(one, minlength=n_experts) for one in ids])
    return {name: starved(counts_NE, threshold) for name, threshold in THRESHOLDS.items()}


def starved_windows(f_NLE: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """The same of the diary's windows of training, which pool many steps: share of windows, and experts in the last."""
    f_NLE_ = torch.tensor(f_NLE)
    below = {name: f_NLE_ < threshold / f_NLE_.shape[-1] for name, threshold in THRESHOLDS.items()}
    return {
        name: {
            "windows": rounded(b_NLE.any(-1).double().mean(0)),
            "experts": rounded(b_NLE.sum(-1).double().mean(0)),
            "last": b_NLE[-1].sum(-1).tolist(),
        }
        for name, b_NLE in below.items()
    }


def hinge(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a balance loss adds to the LBL of the same step, mean over layers: ShinkaEvolve's term; 0 for the LBL itself.

    Returns: active, share of the steps in which it is more than rounding; tenths, its mean over tenths of the steps.
    """
    steps = [entry for entry in entries if entry["kind"] == "step"]
    added_N = np.array([entry["terms"]["balance"] - entry["lbl"] for entry in steps])
    tenths = [float(part.mean()) for part in np.array_split(added_N, min(10, len(added_N)))]
    return {"active": float((added_N > 1e-6).mean()), "tenths": rounded(torch.tensor(tenths, dtype=torch.float64), 3)}


def rows_and_loads(rows_ED: Tensor, layer: Seen) -> dict[str, float]:
    """How similar a router's rows are, and whether similar ones have other loads than the rest.

    cosine, size: mean cosine of two rows, and mean of its absolute value; nearest: mean over rows of the largest cosine
    with another. by_...: rank correlation over experts, -1 .. 1, of load and: a row's mean cosine with the others, its
    largest one, its norm, its mean logit.
    """
    E, counts_E = len(rows_ED), layer.counts_NE.sum(0).float()
    unit_ED = torch.nn.functional.normalize(rows_ED.float(), dim=-1)
    others_EE = (unit_ED @ unit_ED.T)[~torch.eye(E, dtype=torch.bool)].view(E, E - 1)
    own = {
        "cosine": others_EE.mean(1),
        "nearest": others_EE.amax(1),
        "norm": rows_ED.float().norm(dim=-1),
        "logit": layer.logits_C[:E].float(),
    }
    return {
        "cosine": float(others_EE.mean()),
        "size": float(others_EE.abs().mean()),
        "nearest": float(own["nearest"].mean()),
        **{f"by_{name}": float(spearman_corrcoef(value_E, counts_E)) for name, value_E in own.items()},
    }


if __name__ == "__main__":
    main()
