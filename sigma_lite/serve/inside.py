"""Measures on held-out text: what each kind and domain costs, which experts serve them, and what an expert is worth."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sigma_lite.data.kinds import KINDS
from sigma_lite.data.rows import IGNORED
from sigma_lite.serve.ablate import ablated, agreement
from sigma_lite.serve.likelihood import costs_by
from sigma_lite.serve.marked import at_hand, heldout, route
from sigma_lite.serve.specialise import Specialisation, specialisation
from sigma_lite.serve.trained import Trained

TOKENS = {"specialisation": 30_000, "ablation": 4096}
PAIRS = 40  # (expert, label) of a layer that are listed


def costs(trained: Trained, data: str | Path | None, tokens: int | None) -> dict[str, Any]:
    """Held-out bits per byte, as `validate` counts them, and by kind and domain of the token that is to be told.

    Raises: StorageError where the held-out tokens are not at hand.
    """
    marked = heldout(trained, data, tokens)
    nats_T = route(trained, marked).nats_T.double().numpy()
    scored_T = (marked.targets_BS != IGNORED).flatten().numpy()
    nats_T, bytes_T = nats_T[scored_T], marked.bytes_BS.flatten().numpy()[scored_T]
    kinds = [KINDS[kind] for kind in marked.target_kinds_BS.flatten().numpy()[scored_T]]
    domains = [*marked.domains, None]  # -1 is the last
    domains = [domains[place] for place in marked.target_domains_BS.flatten().numpy()[scored_T]]
    return {
        "rows": len(marked.ids_BS),
        "source": marked.source,
        "bits_per_byte": float(nats_T.sum()) / math.log(2) / int(bytes_T.sum()),
        "nats_per_token": float(nats_T.mean()),
        "by": {"kind": costs_by(nats_T, bytes_T, kinds), "domain": costs_by(nats_T, bytes_T, domains)},
    }


def map_of_experts(trained: Trained, data: str | Path | None, tokens: int | None) -> dict[str, Any]:
    """Of each layer, by kind and by domain of the token that is routed: counts [E][G], what is more than chance, bits."""
    marked = at_hand(trained, data, tokens or TOKENS["specialisation"])
    routed, E = route(trained, marked), trained.model.config.n_experts
    layers = []
    for ids_TK in routed.experts:
        width = max(E, int(ids_TK.max()) + 1)
        own = {"kind": specialisation(ids_TK, marked.kinds_BS, width, len(KINDS))}
        if len(marked.domains) > 1:
            own["domain"] = specialisation(ids_TK, marked.domains_BS, width, len(marked.domains))
        layers.append({mark: _entry(found) for mark, found in own.items()})
    found = {"rows": len(marked.ids_BS), "source": marked.source, "layers": layers}
    found["names"] = {"kind": list(KINDS), "domain": list(marked.domains)}
    return found | {f"bits_{mark}": [layer[mark]["bits"] for layer in layers] for mark in layers[0]}


def _entry(found: Specialisation) -> dict[str, Any]:
    pairs = [[int(e), int(g), int(found.counts_EG[e, g]), round(float(found.z_EG[e, g]), 1)] for e, g in found.pairs()]
    return {
        "counts": found.counts_EG.tolist(),
        "bits": round(found.bits, 4),
        "chance": round(found.chance, 4),
        "p": round(found.p, 4),
        "entropy": round(found.entropy, 4),
        "sure": len(pairs),
        "pairs": pairs[:PAIRS],  # expert, label, slots, z
    }


def worth(trained: Trained, data: str | Path | None, tokens: int | None) -> dict[str, Any]:
    """How the loss rises without each expert, and whether the labels that it serves are those that suffer.

    Returns: of each layer and expert `tokens` (scored ones that had chosen it), `rise` of the mean cost in nats, `on_own` of
        its own tokens (None where there are none); of each layer `agreement_kind` and `agreement_domain`, see `agreement`.
    """
    marked = at_hand(trained, data, tokens or TOKENS["ablation"])
    base = route(trained, marked)
    scored_T = (marked.targets_BS != IGNORED).flatten()
    labels = {"kind": (marked.kinds_BS, len(KINDS))}
    labels |= {"domain": (marked.domains_BS, len(marked.domains))} if len(marked.domains) > 1 else {}
    L, E = len(trained.model.blocks), trained.model.config.n_experts
    own_LE, rise_LE, on_own_LE = np.zeros((L, E), int), np.zeros((L, E)), np.full((L, E), np.nan)
    share, suffers = ({mark: np.zeros((L, E, G)) for mark, (_, G) in labels.items()} for _ in range(2))
    steps = ablated(trained, marked, base)
    for layer, expert, rise_T in tqdm(steps, desc="experts left out", disable=not sys.stderr.isatty(), leave=False):
        own_T = (base.experts[layer] == expert).any(1) & scored_T
        own_LE[layer, expert], rise_LE[layer, expert] = int(own_T.sum()), float(rise_T[scored_T].mean())
        on_own_LE[layer, expert] = float(rise_T[own_T].mean())
        for mark, (labels_BS, G) in labels.items():
            share[mark][layer, expert] = mean_by(own_T.double(), labels_BS, scored_T, G)
            suffers[mark][layer, expert] = mean_by(rise_T, labels_BS, scored_T, G)
    agree = {
        f"agreement_{mark}": [_rounded(agreement(share[mark][n], suffers[mark][n], own_LE[n])) for n in range(L)]
        for mark in labels
    }
    return {
        "rows": len(marked.ids_BS),
        "source": marked.source,
        "tokens": own_LE.tolist(),
        "rise": rise_LE.round(6).tolist(),
        "on_own": [[_rounded(x) for x in of_layer] for of_layer in on_own_LE.tolist()],
        **agree,
    }


def mean_by(values_T: Tensor, labels_BS: Tensor, scored_T: Tensor, G: int) -> np.ndarray:
    """Mean over the scored tokens of each label, [G]; NaN where there are none."""
    labels_T = labels_BS.flatten()
    known = scored_T & (labels_T >= 0)
    sums_G = torch.zeros(G, dtype=torch.float64).index_add(0, labels_T[known], values_T[known].double())
    return (sums_G / torch.bincount(labels_T[known], minlength=G)).numpy()


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


INSIDE: dict[str, Callable[[Trained, str | Path | None, int | None], dict[str, Any]]] = {
    "heldout": costs,
    "specialisation": map_of_experts,
    "ablation": worth,
}
