"""Measured on held-out text after training: what each layer's router goes by, and who works for which domain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.information import mutual_information
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.balance.zipf import layer_facts
from sigma_lite.checkpoint import newest_checkpoint, read_settings
from sigma_lite.data.rows import IGNORED, Rows
from sigma_lite.data.shards import load
from sigma_lite.identity import code_digest, identify_named, package_code
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import atomic_write
from sigma_lite.train.callbacks.diary import rounded

ROWS = 64  # of one forward pass; the last one takes what is left


class Routed(NamedTuple):
    """What a trained model made of the held-out tokens, T of them."""

    tokens: Tensor  # [T]
    previous: Tensor  # [T], -1 where none is in sight
    positions: Tensor  # [T], place in the row
    domains: Tensor  # [T], -1 for none
    nats: Tensor  # [T], cost of the next token, 0 where none is scored
    scored: Tensor  # [T] bool
    experts: list[Tensor]  # one a layer, [T, K]


def layers(run: Path) -> list[dict[str, Any]]:
    """`balance.zipf.layer_facts` of every layer: the study "Why layer 0?"."""
    trained, seen = _routed(run)
    E = trained.model.config.n_experts
    columns = (seen.tokens.numpy(), seen.previous.numpy(), seen.positions.numpy())
    return [layer_facts(ids.numpy(), *columns, E) for ids in seen.experts]


def domains(run: Path) -> dict[str, Any]:
    """For each domain its loss and, in every layer, its own load shares.

    Returns: names [D], nats_per_token [D], f [L][D][E] (each row sums to 1), and information [L]: nats that a token's
        first expert tells of its domain, 0 (experts shared alike) .. H(domain).
    """
    trained, seen = _routed(run)
    names = load(read_settings(newest_checkpoint(run))["corpus"]["dir"]).heldout.domains.names
    E, groups = trained.model.config.n_experts, [seen.domains == d for d in range(len(names))]
    inside = seen.domains >= 0
    f_LDE = torch.stack([load_share(torch.stack([expert_counts(ids[g], E) for g in groups])) for ids in seen.experts])
    return {
        "names": list(names),
        "nats_per_token": [float(seen.nats[g].sum() / seen.scored[g].sum()) for g in groups],
        "f": rounded(f_LDE),
        "information": [mutual_information(ids[inside, 0].numpy(), [seen.domains[inside].numpy()]) for ids in seen.experts],
    }


MEASURES: dict[str, Callable[[Path], Any]] = {"layers": layers, "domains": domains}


def measured(run: str | Path, what: str) -> Any:
    """A measure by name of a finished run; kept in RUN/WHAT.json, and taken again by other code than took it."""
    path, code = Path(run) / f"{what}.json", code_digest({**package_code(), what: identify_named(f"{__name__}.{what}")})
    kept = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(kept, dict) or kept.get("code") != code:
        kept = {"code": code, "facts": MEASURES[what](Path(run))}
        with atomic_write(path) as file:
            file.write(json.dumps(kept, separators=(",", ":")).encode())
        kept = json.loads(path.read_bytes())  # as the next time
    return kept["facts"]


@torch.no_grad()
def _routed(run: Path) -> tuple[Trained, Routed]:
    trained, settings = Trained(run), read_settings(newest_checkpoint(run))
    prepared = load(settings["corpus"]["dir"])
    copies = prepared.copies(settings["rows"].get("split_above", 1.0))  # runs older than the setting split nothing
    rows = Rows(prepared.heldout, prepared.token_bytes, settings["rows"]["length"], copies=copies)
    parts = [_batch(trained, rows, first) for first in range(0, len(rows), ROWS)]
    columns = [torch.cat(column) for column in list(zip(*parts, strict=True))[:-1]]
    experts = [torch.cat(layer) for layer in zip(*(part.experts for part in parts), strict=True)]
    return trained, Routed(*columns, experts)


def _batch(trained: Trained, rows: Rows, first: int) -> Routed:
    batch = rows.__getitems__(list(range(first, min(first + ROWS, len(rows)))))
    nats_BS, routings = trained.model.nats(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
    previous_BS = torch.full_like(batch.ids_BS, -1)
    same_document = batch.documents_BS[:, 1:] == batch.documents_BS[:, :-1]
    previous_BS[:, 1:] = torch.where(same_document, batch.ids_BS[:, :-1], -1)
    B, S = batch.ids_BS.shape
    return Routed(
        tokens=batch.ids_BS.flatten(),
        previous=previous_BS.flatten(),
        positions=torch.arange(S).repeat(B),
        domains=batch.domains_B.repeat_interleave(S),
        nats=nats_BS.flatten(),
        scored=batch.targets_BS.flatten() != IGNORED,
        experts=[r.ids for r in routings],
    )
