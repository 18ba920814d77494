"""The load-balancing loss: where its gradient goes, and what it measures."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share
from sigma_lite.teach.exercises.exercise import Exercise


def gradient(logits_TE: Tensor) -> Tensor:
    z_TE = logits_TE.detach().requires_grad_()
    probs_TE = z_TE.softmax(-1)
    return torch.autograd.grad(load_balancing_loss(probs_TE, z_TE.topk(1).indices), z_TE)[0]


def _on_the_probabilities(logits_TE: Tensor) -> Tensor:
    T, E = logits_TE.shape
    return (E / T * load_share(expert_counts(logits_TE.detach().topk(1).indices, E))).expand(T, E)


def lbl(f_E: Tensor, P_E: Tensor) -> Tensor:
    # detached: a covariance does not notice a constant, so its gradient differs from the product's by one, rightly
    return load_balancing_loss(P_E[None], torch.zeros(1, 1, dtype=torch.int64), f_E).detach()


def _unbiased(f_E: Tensor, P_E: Tensor) -> Tensor:
    return 1 + len(f_E) ** 2 * torch.cov(torch.stack((f_E, P_E)))[0, 1]


def _logits() -> list:
    draw = torch.Generator().manual_seed(6)
    return [(torch.randn(7, 5, generator=draw),), (3 * torch.randn(4, 8, generator=draw),)]


def _shares() -> list:
    draw = torch.Generator().manual_seed(6)
    return [tuple(torch.rand(2, E, generator=draw).softmax(-1)) for E in (4, 12)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="lbl_gradient",
        chapter=6,
        solution=gradient,
        inputs=_logits,
        mistake=_on_the_probabilities,
        says="that is the gradient on the probabilities, which depend on all logits: go on through the softmax",
        axes="TE",
    ),
    Exercise(
        name="lbl_covariance",
        chapter=6,
        solution=lbl,
        inputs=_shares,
        mistake=_unbiased,
        says="torch.cov divides by E - 1, as an estimate from a sample would. These are all experts: divide by E",
    ),
)
