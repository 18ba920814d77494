"""Bits per byte: the loss in a unit that does not depend on the tokenizer, and that compressors share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from sigma_lite.balance.exact import UNIT, lost, whole


class BitsPerByte(Metric):
    """update(nats, targets, bytes); compute() -> bits_per_byte (all nats / ln 2 / all bytes) and nats_per_token.

    Special tokens count their nats and no bytes, so marking the end of documents is paid for, not hidden.
    """

    full_state_update = False
    nats: Tensor  # in multiples of UNIT: see balance/exact.py
    lost: Tensor  # scored tokens whose cost is no number
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "lost", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> None:
        scored_BS = targets_BS != -100
        nats_BS = torch.where(scored_BS, nats_BS, 0.0)
        self.nats += whole(nats_BS).sum()
        self.lost += lost(nats_BS).sum()
        self.tokens += scored_BS.sum()
        self.bytes += (bytes_BS * scored_BS).sum()

    def compute(self) -> dict[str, float]:
        nats = math.nan if self.lost else int(self.nats) * UNIT  # plain numbers: they have 64 bits on every machine
        return {
            "bits_per_byte": _share(nats / math.log(2), int(self.bytes)),
            "nats_per_token": _share(nats, int(self.tokens)),
        }


def _share(part: float, of: int) -> float:
    return part / of if of else math.nan
