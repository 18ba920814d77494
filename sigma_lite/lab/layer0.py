"""What trained routers go by, layer by layer, measured on held-out text: the study "Why layer 0?"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigma_lite.balance.zipf import layer_facts
from sigma_lite.checkpoint import newest_checkpoint, read_settings
from sigma_lite.data.rows import Rows
from sigma_lite.data.shards import load
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import atomic_write

FILE = "layers.json"
ROWS = 64  # a batch of the measurement; changes no result


def measured_layers(run: str | Path) -> list[dict[str, Any]]:
    """`balance.zipf.layer_facts` of every layer of a finished run; kept in RUN/layers.json once measured."""
    path = Path(run) / FILE
    if not path.is_file():
        facts = _measure(Path(run))
        with atomic_write(path) as file:
            file.write(json.dumps(facts, separators=(",", ":")).encode())
    return json.loads(path.read_bytes())


def _measure(run: Path) -> list[dict[str, Any]]:
    trained = Trained(run)
    settings = read_settings(newest_checkpoint(run))
    prepared = load(settings["corpus"]["dir"])
    rows = Rows(prepared.heldout, prepared.token_bytes, settings["rows"]["length"])
    seen = [_routed(trained, rows, first) for first in range(0, len(rows) - ROWS + 1, ROWS)]
    tokens_T, previous_T, positions_T = (torch.cat(part).numpy() for part in list(zip(*seen, strict=True))[:3])
    layers = zip(*(part[3] for part in seen), strict=True)  # K may differ between layers
    E = trained.model.config.n_experts
    return [layer_facts(torch.cat(ids).numpy(), tokens_T, previous_T, positions_T, E) for ids in layers]


@torch.no_grad()
def _routed(trained: Trained, rows: Rows, first: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Token, the one before it (-1: none in sight), place in the row, and the experts [T, K] of each layer."""
    batch = rows.__getitems__(list(range(first, first + ROWS)))
    _, routings = trained.model.backbone(batch.ids_BS, documents_BS=batch.documents_BS)
    ids_BS = batch.ids_BS
    previous_BS = torch.full_like(ids_BS, -1)
    same = batch.documents_BS[:, 1:] == batch.documents_BS[:, :-1]
    previous_BS[:, 1:] = torch.where(same, ids_BS[:, :-1], -1)
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    return ids_BS.flatten(), previous_BS.flatten(), positions_BS.flatten(), [r.ids for r in routings]
