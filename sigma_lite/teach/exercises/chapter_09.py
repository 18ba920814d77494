"""Loss-free balance: the proportional step, and how far the biases have drifted apart."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step, spread
from sigma_lite.teach.exercises.exercise import Exercise


def proportional(counts_E: Tensor, rate: float) -> Tensor:
    return bias_step(counts_E, "proportional", rate)


def _load_minus_mean(counts_E: Tensor, rate: float) -> Tensor:
    return -proportional(counts_E, rate)


def spreads(counts_NE: Tensor, rate: float) -> Tensor:
    return spread(bias_step(counts_NE, "sign", rate).cumsum(0))


def _largest(counts_NE: Tensor, rate: float) -> Tensor:
    return bias_step(counts_NE, "sign", rate).cumsum(0).abs().amax(-1)


def _loads() -> list:
    return [(torch.tensor([9, 0, 3, 4]), 0.01), (torch.tensor([5, 5, 5]), 0.01), (torch.tensor([0, 0, 0, 0, 7]), 0.5)]


def _histories() -> list:
    draws = torch.randint(6, (12, 40), generator=torch.Generator().manual_seed(9))
    counts_NE = torch.stack([torch.bincount(row, minlength=6) for row in draws])
    return [(counts_NE, 0.01), (torch.tensor([[8, 0, 4], [8, 4, 0]]), 0.1)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="proportional_step",
        chapter=9,
        solution=proportional,
        inputs=_loads,
        mistake=_load_minus_mean,
        says="the sign is the other way round: an expert with too many tokens must lose bias",
        axes="E",
    ),
    Exercise(
        name="bias_spread",
        chapter=9,
        solution=spreads,
        inputs=_histories,
        mistake=_largest,
        says="this is the largest bias; only differences decide, so take largest minus smallest",
        axes="N",
    ),
)
