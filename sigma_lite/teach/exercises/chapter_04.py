"""The router: the order of softmax and top-k, and what counts as a share."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import ModelConfig
from sigma_lite.model.router import Router
from sigma_lite.teach.exercises.exercise import Exercise


def gates(logits_TE: Tensor, k: int) -> Tensor:
    router = Router(ModelConfig(n_experts=logits_TE.shape[1], d_model=logits_TE.shape[1], top_k=k))
    router.weight = nn.Parameter(torch.eye(logits_TE.shape[1]))  # then the tokens are the logits
    return router(logits_TE).gates


def _after_top_k(logits_TE: Tensor, k: int) -> Tensor:
    return logits_TE.topk(k, dim=-1).values.softmax(-1)


def _logits() -> list:
    logits_TE = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    return [(logits_TE, 1), (logits_TE, 3)]


def share(ids_TK: Tensor, n_experts: int) -> Tensor:
    return load_share(expert_counts(ids_TK, n_experts))


def _per_token(ids_TK: Tensor, n_experts: int) -> Tensor:
    return expert_counts(ids_TK, n_experts) / ids_TK.shape[0]


def _choices() -> list:
    generator = torch.Generator().manual_seed(4)
    return [(torch.rand(9, 12, generator=generator).topk(2).indices, 12), (torch.tensor([[0], [0], [3]]), 5)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="gates",
        chapter=4,
        solution=gates,
        inputs=_logits,
        mistake=_after_top_k,
        says="these gates sum to 1 over the chosen: a softmax over the winners only, whose gradient at K = 1 is zero",
        axes="TK",
    ),
    Exercise(
        name="load_share",
        chapter=4,
        solution=share,
        inputs=_choices,
        mistake=_per_token,
        says="your shares sum to K: divide by the number of slots, not of tokens",
        axes="E",
    ),
)
