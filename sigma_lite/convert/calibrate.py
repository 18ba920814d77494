"""What a surgery may look at: rows of the training text, what reaches each layer's experts, and the held-out score."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sigma_lite.balance.bits import BitsPerByte
from sigma_lite.balance.metrics import ExpertLoad, rounded
from sigma_lite.config import require
from sigma_lite.data.of_run import RunData
from sigma_lite.data.rows import IGNORED, Batch
from sigma_lite.model import Routing, Transformer, of_experts, of_tokens


def training_rows(data: RunData, count: int, per_batch: int = 8) -> list[Batch]:
    """The first `count` rows of the run's endless sequence, in batches. Raises ConfigError where the text has none."""
    parts = data.parts("train")
    for name, part in parts.items():
        where = data.prepared.sources[name].dir
        require(len(part) > 0, f"{where} has no row of {data.rows.length} tokens to calibrate on")
    rows, order = data.together([*parts.values()]), data.order([*parts.values()])
    steps = next(step for step in itertools.count(1) if data.rows.before(step) >= count)
    first = np.concatenate([order.rows(step) for step in range(steps)])[:count]
    return [rows.__getitems__(first[at : at + per_batch].tolist()) for at in range(0, count, per_batch)]


def heldout_rows(data: RunData, per_batch: int = 16) -> list[Batch]:
    """All held-out rows, in order."""
    rows = data.together([*data.parts("heldout").values()])
    n = len(rows)
    return [rows.__getitems__(list(range(first, min(first + per_batch, n)))) for first in range(0, n, per_batch)]


@torch.no_grad()
def expert_inputs(model: Transformer, rows: Sequence[Batch]) -> Iterator[list[tuple[Tensor, Routing]]]:
    """Of each batch, one entry a layer: what its mixture of experts reads, [T, D], and how its router decided.

    Tokens that fill rows of conversations up are left out.
    """
    seen: list[tuple[Tensor, Routing]] = []

    def keep(module: nn.Module, given: tuple, found: tuple[Tensor, Routing]) -> None:
        seen.append((given[0].flatten(0, 1), found[1]))

    hooks = [block.moe.register_forward_hook(keep) for block in model.blocks]
    try:
        for batch in rows:
            seen.clear()
            model.backbone(batch.ids_BS, documents_BS=batch.documents_BS)
            own_T = slice(None) if batch.own_T is None else batch.own_T
            yield [(x_TD[own_T], *of_tokens([routing], batch.own_T)) for x_TD, routing in seen]
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def heldout(model: Transformer, rows: Sequence[Batch]) -> dict[str, Any]:
    """bits_per_byte and nats_per_token of these rows, and each layer's f, P [L, E] and lbl [L]: a `validation` entry."""
    bits, load = BitsPerByte(), ExpertLoad(model.config.n_layers, model.config.n_experts)
    for batch in rows:
        nats_BS, routings = model.nats(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
        bits.update(nats_BS, batch.targets_BS, batch.bytes_BS)
        load.update(of_tokens(of_experts(routings), batch.targets_BS.flatten() != IGNORED))
    require(int(bits.tokens) > 0, "there is no held-out text to measure on")
    found = load.load()
    return {**bits.compute(), **{name: rounded(found[name]) for name in ("f", "P", "lbl")}}


def expert_bytes(model: Transformer) -> int:
    """Bytes that all experts take as they are stored, with scales, tables and factors; routers and the rest left out."""
    return sum(_bytes(block.moe.experts) for block in model.blocks)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
