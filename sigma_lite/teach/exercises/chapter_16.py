"""The grouped matmul: slots sorted by expert, and what its last tile wastes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigma_lite.kernels.plan import routing_plan
from sigma_lite.teach.exercises.exercise import Exercise
from sigma_lite.teach.plots_kernels import useful_rows as useful_rows_of


def sorted_slots(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(slot_N, ends_E), both int64: the slots in the order of their experts, and the row behind each expert's last."""
    plan = routing_plan(ids_TK, n_experts)
    return plan.slot_N, plan.ends_E.long()


def _starts(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    slot_N, ends_E = sorted_slots(ids_TK, n_experts)
    return slot_N, ends_E.roll(1).index_fill(0, torch.tensor([0]), 0)


def useful_rows(counts_E: Tensor, rows: int) -> float:
    """Share of the rows of all tiles that hold a token, when no tile serves two experts."""
    return useful_rows_of(counts_E.numpy(), rows)


def _across_experts(counts_E: Tensor, rows: int) -> float:
    total = int(counts_E.sum())
    return total / (math.ceil(total / rows) * rows)


def _routings() -> list:
    generator = torch.Generator().manual_seed(12)
    some = [torch.rand(T, E, generator=generator).topk(K).indices for T, K, E in ((6, 1, 4), (5, 2, 3))]
    return [(some[0], 4), (some[1], 3), (torch.tensor([[2], [0], [2]]), 4)]  # in the last one nobody asks for 1 and 3


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="sorted_slots",
        chapter=16,
        solution=sorted_slots,
        inputs=_routings,
        mistake=_starts,
        says="those are the rows at which experts begin; an end is the row behind the last one, and the last end is T K",
        axes="N",
    ),
    Exercise(
        name="useful_rows",
        chapter=16,
        solution=useful_rows,
        inputs=lambda: [(torch.tensor([5, 3, 1]), 4), (torch.tensor([16, 0, 17]), 16)],
        mistake=_across_experts,
        says="so it would be if a tile could serve two experts; each expert fills up its own last tile",
    ),
)
