"""Bits per byte: the loss in a unit that does not depend on the tokenizer, and that compressors share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """update(nats, targets, bytes); compute() -> bits_per_byte (all nats / ln 2 / all bytes) and nats_per_token.

    Special tokens count their nats and no bytes, so marking the end of documents is paid for, not hidden.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> None:
        scored_BS = targets_BS != -100
        self.nats += (nats_BS * scored_BS).double().sum()
        self.tokens += scored_BS.sum()
        self.bytes += (bytes_BS * scored_BS).sum()

    def compute(self) -> dict[str, Tensor]:
        return {
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "nats_per_token": self.nats / self.tokens,
        }
