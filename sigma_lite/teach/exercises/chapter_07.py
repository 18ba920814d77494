"""Global-batch balance: counts are added, losses are not averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import load_balancing_loss, load_share
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.teach.exercises.exercise import Exercise


def pooled_shares(counts_ME: Tensor) -> Tensor:
    pooled = PooledCounts()
    return torch.stack([pooled.add(counts_E) for counts_E in counts_ME])


def _mean_of_shares(counts_ME: Tensor) -> Tensor:
    so_far_M = torch.arange(1, len(counts_ME) + 1)[:, None]
    return load_share(counts_ME).cumsum(0) / so_far_M


def global_lbl(probs_MTE: Tensor) -> Tensor:
    probs_TE = probs_MTE.flatten(0, 1)
    return load_balancing_loss(probs_TE, probs_TE.topk(1).indices)


def _mean_of_micro_losses(probs_MTE: Tensor) -> Tensor:
    return torch.stack([load_balancing_loss(probs_TE, probs_TE.topk(1).indices) for probs_TE in probs_MTE]).mean()


def _counts() -> list:
    draw = torch.Generator().manual_seed(7)
    counts_ME = torch.randint(0, 9, (4, 6), generator=draw) * torch.tensor([[1], [5], [2], [1]])
    return [(counts_ME,), (torch.tensor([[2, 0, 0], [1, 4, 5]]),)]


def _probs() -> list:
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(3, 20, 6, generator=draw).softmax(-1),), (torch.randn(2, 5, 8, generator=draw).softmax(-1),)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="pooled_shares",
        chapter=7,
        solution=pooled_shares,
        inputs=_counts,
        mistake=_mean_of_shares,
        says="that is a mean of shares: a small micro-batch weighs as much as a large one. Add counts, then divide",
        axes="ME",
    ),
    Exercise(
        name="global_lbl",
        chapter=7,
        solution=global_lbl,
        inputs=_probs,
        mistake=_mean_of_micro_losses,
        says="that is the mean of the micro losses: each of them counted its own f. Count over the whole step first",
    ),
)
