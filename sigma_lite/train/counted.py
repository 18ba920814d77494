"""How much a micro-batch weighs in its step, where they differ: a step must not depend on how its rows are cut.

Lightning averages over micro-batches and ranks. A mean of means is the mean over all tokens only if each has as many, which
answers of conversations and those that rewards keep have not. So sums are divided by the mean number of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sigma_lite.balance.pooled import sum_over_ranks
from sigma_lite.data.rows import IGNORED, Batch


class Counted(NamedTuple):
    """Of one micro-batch, or the mean over those of a step, which need not be whole."""

    scored: float  # tokens that the main loss is of
    read: float  # tokens that the routers' losses are of: those that fill rows up are not


def counted(batch: Batch) -> Counted:
    """Of conversations or text."""
    scored = int((batch.targets_BS != IGNORED).sum())
    return Counted(scored, batch.ids_BS.numel() if batch.own_BS is None else int(batch.own_BS.sum()))


def mean_counted(micros: Sequence[Counted], ranks: int = 1, device: torch.device | None = None) -> Counted | None:
    """The mean over a step's micro-batches, which are `micros` on this rank; all ranks must call this.

    None where each of them has as many: then their means may be averaged as they are.
    """
    own = torch.tensor(micros, dtype=torch.int64, device=device)
    total, squares = sum_over_ranks(torch.stack([own.sum(0), own.square().sum(0)])).tolist()
    parts = len(micros) * ranks
    if all(parts * square == number**2 for number, square in zip(total, squares, strict=True)):
        return None
    return Counted(*(number / parts for number in total))
