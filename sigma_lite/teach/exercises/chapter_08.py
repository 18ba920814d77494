"""Top-1 LBL: what is pooled before it is divided, and the gradient that reaches the router."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import top1_load_balancing_loss
from sigma_lite.teach.exercises.exercise import Exercise


def pooled(logits_MTE: Tensor) -> Tensor:
    logits_TE = logits_MTE.flatten(0, 1)
    return top1_load_balancing_loss(logits_TE, logits_TE.topk(1).indices)


def _mean_of_losses(logits_MTE: Tensor) -> Tensor:
    return torch.stack([pooled(logits_TE[None]) for logits_TE in logits_MTE]).mean()


def gradient(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return torch.func.grad(top1_load_balancing_loss)(logits_TE, ids_TK, temperature)


def _without_temperature(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return temperature * gradient(logits_TE, ids_TK, temperature)


def _batches() -> list:
    generator = torch.Generator().manual_seed(8)
    return [(torch.randn(3, 10, 5, generator=generator),), (torch.randn(1, 6, 4, generator=generator),)]


def _logits() -> list:
    generator = torch.Generator().manual_seed(8)
    cases = [(torch.randn(7, 5, generator=generator), temperature) for temperature in (1.0, 0.5)]
    return [(logits_TE, logits_TE.topk(1).indices, temperature) for logits_TE, temperature in cases]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="top1_pooled",
        chapter=8,
        solution=pooled,
        inputs=_batches,
        mistake=_mean_of_losses,
        says="this is the mean of the micro-batches' losses: pool fhat and pbar first, then square and divide",
    ),
    Exercise(
        name="top1_gradient",
        chapter=8,
        solution=gradient,
        inputs=_logits,
        mistake=_without_temperature,
        says="right up to the factor 1 / temperature: the softmax sees logits / temperature, so the chain rule divides",
        axes="TE",
    ),
)
