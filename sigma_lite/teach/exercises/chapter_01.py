"""Chapter 1: units and order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigma_lite.data.rows import epoch_order, row_order
from sigma_lite.teach.exercises.exercise import Exercise


def bits_per_byte(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    from sigma_lite.train.bits import BitsPerByte  # here: torchmetrics takes seconds to import

    metric = BitsPerByte()
    metric.update(nats_BS, targets_BS, bytes_BS)
    return float(metric.compute()["bits_per_byte"])


def _losses() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    nats_BS = torch.rand(2, 6, generator=draw) * 5
    bytes_BS = torch.randint(1, 8, (2, 6), generator=draw)
    targets_BS = torch.randint(0, 9, (2, 6), generator=draw)
    padded_BS = targets_BS.clone()
    padded_BS[1, 3:] = -100
    return [(nats_BS, targets_BS, bytes_BS), (nats_BS, padded_BS, bytes_BS)]


def _mean_of_ratios(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    scored_BS = targets_BS != -100
    return (nats_BS / bytes_BS)[scored_BS].mean().item() / math.log(2)


def _unmasked(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    return (nats_BS.sum() / bytes_BS.sum()).item() / math.log(2)


def _in_nats(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    return bits_per_byte(nats_BS, targets_BS, bytes_BS) * math.log(2)


def _same_order_again(seed: int, start: int, count: int, n_rows: int):
    return epoch_order(seed, 0, n_rows)[[(start + i) % n_rows for i in range(count)]]


EXERCISES = (
    Exercise(
        name="bits_per_byte",
        chapter=1,
        solution=bits_per_byte,
        inputs=_losses,
        mistake=_mean_of_ratios,
        says="that is the mean of each token's own ratio: a short token then weighs as much as a long one."
        " Sum the nats, sum the bytes, and divide once",
        others=(
            (
                _unmasked,
                "a target of -100 is counted, too: leave its nats and its bytes out of both sums",
            ),
            (_in_nats, "those are nats per byte: a bit is ln 2 nats, so divide by ln 2 as well"),
        ),
    ),
    Exercise(
        name="row_order",
        chapter=1,
        solution=row_order,
        inputs=lambda: [(1, 0, 4, 10), (1, 7, 6, 10), (3, 25, 8, 10)],
        mistake=_same_order_again,
        says="the first epoch is right, but the second repeats its order: pass the number of the epoch on",
    ),
)
