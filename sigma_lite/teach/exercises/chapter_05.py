"""Collapse: the two numbers that show it."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import load_share
from sigma_lite.balance.metrics import load_deviation
from sigma_lite.figures import series
from sigma_lite.teach.exercises.exercise import Exercise


def dead(counts_WE: Tensor) -> float:
    return float(series.dead(load_share(counts_WE.sum(0)).numpy()))


def _mean_of_batches(counts_WE: Tensor) -> float:
    return (counts_WE == 0).sum(1).float().mean().item()


def _flattened(f_LE: Tensor) -> tuple[Tensor, Tensor]:
    relative = f_LE.numel() / len(f_LE) * f_LE - 1
    return relative.max(), relative.min()


def _shares() -> list:
    counts_LE = torch.randint(0, 9, (3, 8), generator=torch.Generator().manual_seed(5))
    return [(load_share(counts_LE),), (load_share(counts_LE[:1, :5]),)]


def _counts() -> list:
    draw = torch.Generator().manual_seed(5)
    counts_WE = torch.poisson(torch.full((6, 12), 0.4), generator=draw).long()
    return [(counts_WE,), (torch.tensor([[2, 0, 0], [0, 3, 0]]),)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="load_deviation",
        chapter=5,
        solution=load_deviation,
        inputs=_shares,
        mistake=_flattened,
        says="one number for all layers: a layer that collapses then hides behind the others. Work along the last axis",
        axes="L",
    ),
    Exercise(
        name="dead_experts",
        chapter=5,
        solution=dead,
        inputs=_counts,
        mistake=_mean_of_batches,
        says="that is the mean over batches: it calls an expert dead that only rested. Add the counts first",
    ),
)
