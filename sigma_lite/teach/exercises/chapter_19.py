"""Experts on several machines: who sends what to whom, and for whom everybody waits."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.teach.exercises.exercise import Exercise
from sigma_lite.teach.plots_scale import makespan, send_matrix


def _receivers_first(ids_TK: Tensor, ranks: int, n_experts: int) -> Tensor:
    return send_matrix(ids_TK, ranks, n_experts).T.contiguous()


def _busiest_expert(f_E: Tensor, ranks: int) -> float:
    return (len(f_E) * f_E.max() / f_E.sum()).item()


def _routings() -> list:
    generator = torch.Generator().manual_seed(14)
    shapes = ((8, 4, 8, 1), (12, 3, 6, 2), (6, 2, 4, 1))
    return [(torch.rand(T, E, generator=generator).topk(k).indices, R, E) for T, R, E, k in shapes]


def _shares() -> list:
    f_E = torch.tensor([5.0, 1, 2, 2, 0, 3, 1, 2]) / 16
    return [(f_E, 4), (f_E, 2), (f_E, 1), (torch.ones(6) / 6, 3)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="send_matrix",
        chapter=19,
        solution=send_matrix,
        inputs=_routings,
        mistake=_receivers_first,
        says="right numbers, mirrored: row r is what rank r sends, column r what it gets",
    ),
    Exercise(
        name="makespan",
        chapter=19,
        solution=makespan,
        inputs=_shares,
        mistake=_busiest_expert,
        says="that is the busiest expert; a rank's work is the sum over the experts that live on it",
    ),
)
