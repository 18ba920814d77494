"""Many experts: group the slots, count the parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sigma_lite.config import ModelConfig
from sigma_lite.kernels.plan import routing_plan
from sigma_lite.teach.exercises.exercise import Exercise

NET = ModelConfig()


def plan(ids_TK: Tensor, n_experts: int) -> tuple:
    found = routing_plan(ids_TK, n_experts)
    return found.slot_N, found.token_N, found.ends_E


def _rows_are_tokens(ids_TK: Tensor, n_experts: int) -> tuple:
    slot_N, _, ends_E = routing_plan(ids_TK, n_experts)
    return slot_N, slot_N, ends_E


def _choices() -> list:
    generator = torch.Generator().manual_seed(3)
    return [(torch.rand(tokens, E, generator=generator).topk(k).indices, E) for tokens, E, k in ((7, 4, 2), (6, 8, 1))]


def active(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return net.ledger(k_per_layer).active


def _same_k_in_all_layers(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return net.ledger((k_per_layer[-1],) * net.n_layers).active


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="routing_plan",
        chapter=3,
        solution=plan,
        inputs=_choices,
        mistake=_rows_are_tokens,
        says="your rows name slots where tokens are wanted: with K choices a token, slot n belongs to another number",
    ),
    Exercise(
        name="active_parameters",
        chapter=3,
        solution=active,
        inputs=lambda: [(NET, (8, 6, 4, 2)), (NET, (1, 1, 1, 1)), (replace(NET, n_layers=2, d_expert=32), (3, 1))],
        mistake=_same_k_in_all_layers,
        says="every layer seems to use the last layer's K: the list may hold a different number for each",
    ),
)
