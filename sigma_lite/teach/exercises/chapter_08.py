"""Top-1 LBL: what is pooled before it is divided, and the gradient that reaches the router."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import top1_load_balancing_loss
from sigma_lite.teach.exercises.exercise import Exercise


def pooled(logits_MTE: Tensor, k: int) -> Tensor:
    logits_TE = logits_MTE.flatten(0, 1)
    return top1_load_balancing_loss(logits_TE, logits_TE.topk(k).indices)


def _mean_of_losses(logits_MTE: Tensor, k: int) -> Tensor:
    return torch.stack([pooled(logits_TE[None], k) for logits_TE in logits_MTE]).mean()


def _mean_of_chosen(logits_MTE: Tensor, k: int) -> Tensor:
    return k * pooled(logits_MTE, k)


def gradient(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return torch.func.grad(top1_load_balancing_loss)(logits_TE, ids_TK, temperature)


def _without_temperature(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return temperature * gradient(logits_TE, ids_TK, temperature)


def _gradient_of_mean(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return ids_TK.shape[1] * gradient(logits_TE, ids_TK, temperature)


def _batches() -> list:
    generator = torch.Generator().manual_seed(8)
    shapes = ((3, 10, 5, 1), (1, 6, 4, 1), (2, 8, 6, 3))
    return [(torch.randn(*shape, generator=generator), k) for *shape, k in shapes]


def _logits() -> list:
    generator = torch.Generator().manual_seed(8)
    cases = [(torch.randn(7, 5, generator=generator), k, temperature) for k, temperature in ((1, 1.0), (1, 0.5), (2, 0.5))]
    return [(logits_TE, logits_TE.topk(k).indices, temperature) for logits_TE, k, temperature in cases]


PER_TOKEN = "right for K = 1; with more, add up the K chosen probabilities of a token before you take the mean over tokens"


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="top1_pooled",
        chapter=8,
        solution=pooled,
        inputs=_batches,
        mistake=_mean_of_losses,
        says="this is the mean of the micro-batches' losses: pool fhat and pbar first, then square and divide",
        others=((_mean_of_chosen, PER_TOKEN),),
    ),
    Exercise(
        name="top1_gradient",
        chapter=8,
        solution=gradient,
        inputs=_logits,
        mistake=_without_temperature,
        says="right up to the factor 1 / temperature: the softmax sees logits / temperature, so the chain rule divides",
        others=((_gradient_of_mean, PER_TOKEN),),
        axes="TE",
    ),
)
