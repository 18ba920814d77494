"""What the routing of a text says of a router: who works for which kind, busiest devices, starved experts, similar rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.balance.metrics import entropy, rounded
from sigma_lite.data.kinds import KINDS
from sigma_lite.model import Routing
from sigma_lite.papers.adamoe import true_experts
from sigma_lite.papers.moge import device_loads
from sigma_lite.papers.shinka import LISTING, PRINTED, missing_share

THRESHOLDS = {"printed": PRINTED, "listing": LISTING}  # of ShinkaEvolve's paper and of its program, times E


class Seen(NamedTuple):
    """One layer's routing of the held-out text: N batches, E experts, C columns of the router, G kinds of tokens."""

    counts_NE: Tensor  # int64, slots
    devices_NM: Tensor  # int64, slots
    P_C: Tensor  # mean probability
    logits_C: Tensor  # mean logit
    entropy: float  # mean over tokens of each token's, nats
    working_GK: Tensor  # int64, tokens by kind and by number of experts that work for them, 0 .. K


def of(kinds_T: Tensor, routing: Routing, E: int, devices: int) -> Seen:
    """One batch of tokens of these kinds."""
    return Seen(
        counts_NE=expert_counts(routing.ids, E)[None],
        devices_NM=device_loads(routing.ids, E, devices)[None],
        P_C=routing.probs.double().mean(0),
        logits_C=routing.logits.double().mean(0),
        entropy=float(entropy(routing.probs).double().mean()),
        working_GK=working(kinds_T, routing.ids),
    )


def joined(parts: Sequence[Seen]) -> Seen:
    """Batches of the same number of tokens as one."""
    counts_NE, devices_NM, P_NC, logits_NC, entropies_N, working_NGK = zip(*parts, strict=True)
    width = max(w.shape[1] for w in working_NGK)  # a router without a fixed K has batches of several widths
    padded = [F.pad(w, (0, width - w.shape[1])) for w in working_NGK]
    mean_P, mean_logits = (torch.stack(column).mean(0) for column in (P_NC, logits_NC))
    per_token = sum(entropies_N) / len(parts)
    return Seen(torch.cat(counts_NE), torch.cat(devices_NM), mean_P, mean_logits, per_token, sum(padded))


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


def starved_windows(loads: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """The same of the diary's windows of training, which pool many steps: f [N][L][E].

    Returns: share of windows, and starved experts, mean over windows and in the last, of each layer.
    """
    f_NLE = torch.tensor(loads)
    below = {name: f_NLE < threshold / f_NLE.shape[-1] for name, threshold in THRESHOLDS.items()}
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
    with another. short: rows less than a third as long as the longest; short_load: their share of the load.
    by_...: rank correlation over experts, -1 .. 1, of load and: a row's mean cosine with the others, its largest one, its
    norm, its mean logit.
    """
    E, counts_E = len(rows_ED), layer.counts_NE.sum(0).double()
    unit_ED = F.normalize(rows_ED.double(), dim=-1)
    others_EE = (unit_ED @ unit_ED.T)[~torch.eye(E, dtype=torch.bool)].view(E, E - 1)
    own = {
        "cosine": others_EE.mean(1),
        "nearest": others_EE.amax(1).round(decimals=9),  # two that are nearest to each other have the same, and rank alike
        "norm": rows_ED.double().norm(dim=-1),
        "logit": layer.logits_C[:E],
    }
    short_E = own["norm"] < own["norm"].max() / 3
    return {
        "short": float(short_E.sum()),
        "short_load": float(load_share(counts_E)[short_E].sum()),
        "cosine": float(others_EE.mean()),
        "size": float(others_EE.abs().mean()),
        "nearest": float(own["nearest"].mean()),
        **{f"by_{name}": float(spearman_corrcoef(value_E, counts_E)) for name, value_E in own.items()},
    }
