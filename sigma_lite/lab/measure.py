"""Measured on held-out text after training: what each layer's router goes by, who works for which domain, what leaks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.information import information, mutual_information
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.balance.metrics import rounded
from sigma_lite.balance.zipf import layer_facts
from sigma_lite.checkpoint import newest_checkpoint, read_settings
from sigma_lite.data.rows import IGNORED, Rows
from sigma_lite.data.shards import load
from sigma_lite.identity import code_digest, identify_named, package_code
from sigma_lite.model import of_experts
from sigma_lite.model.parts import as_parts
from sigma_lite.runfile import load_run
from sigma_lite.serve.generate import joined
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import atomic_write

ROWS = 64  # of one forward pass; the last one takes what is left


class Routed(NamedTuple):
    """What a trained model made of the held-out tokens, T of them."""

    tokens: Tensor  # [T]
    previous: Tensor  # [T], -1 where none is in sight
    positions: Tensor  # [T], place in the row
    domains: Tensor  # [T], -1 for none
    nats: Tensor  # [T], cost of the next token, 0 where none is scored
    scored: Tensor  # [T] bool
    experts: list[Tensor]  # one a layer, [T, K], -1 for an empty slot


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


def family(run: Path) -> dict[str, Any]:
    """What the family's table says of a router beside loads and loss.

    Returns: token_share [L], how much of an expert's entropy the token's id explains, 0 .. 1: specialisation on tokens
        (`information` of the best-scored expert; tokens without one are left out); and leak, in "training" and
        "evaluation": the share of tokens whose experts change when only the last token of a row is another. 0: causal.
    """
    trained, seen = _routed(run)
    shares = []
    for ids_TK in seen.experts:
        works = ids_TK[:, 0] >= 0
        shares.append(information(ids_TK[works, 0].numpy(), [seen.tokens[works].numpy()])["share"] if works.any() else 0.0)
    rows = min(4, len(seen.tokens) // (int(seen.positions.max()) + 1))
    ids_BS = seen.tokens[: rows * (int(seen.positions.max()) + 1)].view(rows, -1)
    return {
        "token_share": shares,
        "leak": {name: leak(trained.model, ids_BS, name == "training") for name in ("training", "evaluation")},
    }


@torch.no_grad()
def leak(model: torch.nn.Module, ids_BS: Tensor, training: bool) -> float:
    """Share of tokens, the last of each row aside, whose experts change in any layer when the last tokens are others."""
    other_BS = ids_BS.clone()
    other_BS[:, -1] = (ids_BS[:, -1] + 1) % model.config.vocab_size
    each = [copy.deepcopy(model).train(training)(ids).routings for ids in (ids_BS, other_BS)]  # some routers keep a state
    changed_T = torch.zeros(ids_BS.numel(), dtype=torch.bool)
    for one, other in zip(*each, strict=True):
        sets = [
            torch.zeros_like(r.probs, dtype=torch.int8).index_put_(_slots(r.ids), torch.ones((), dtype=torch.int8))
            for r in (one, other)
        ]
        changed_T |= (sets[0] != sets[1]).any(1)
    return float(changed_T.view_as(ids_BS)[:, :-1].float().mean())


def _slots(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(token, expert) of every slot that is not empty."""
    kept = ids_TK >= 0
    return kept.nonzero()[:, 0], ids_TK[kept]


MEASURES: dict[str, Callable[[Path], Any]] = {"layers": layers, "domains": domains, "family": family}


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
    trained, settings = _trained(run), read_settings(newest_checkpoint(run))
    prepared = load(settings["corpus"]["dir"])
    copies = prepared.copies(settings["rows"].get("split_above", 1.0))  # runs older than the setting split nothing
    rows = Rows(prepared.heldout, prepared.token_bytes, settings["rows"]["length"], copies=copies)
    parts = [_batch(trained, rows, first) for first in range(0, len(rows), ROWS)]
    columns = [torch.cat(column) for column in list(zip(*parts, strict=True))[:-1]]
    experts = [joined(layer) for layer in zip(*(part.experts for part in parts), strict=True)]
    return trained, Routed(*columns, experts)


def _trained(run: Path) -> Trained:
    """With the parts that the run's yaml names; those of a notebook are in no yaml, and cannot be measured."""
    parts = load_run([run / "run.yaml"]).parts
    return Trained(run, parts=as_parts(parts) if parts else None)


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
        experts=[r.ids for r in of_experts(routings)],
    )
