"""A balance loss of your own: a loss that does not see the size of the logits, and how strongly the usual one does."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.scale_free import scale_free_load_balancing_loss
from sigma_lite.teach.exercises.exercise import Exercise


def loss(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    return scale_free_load_balancing_loss(logits_TE, f_E, temperature).detach()  # either gradient is right


def _spread_with_the_shift(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    spread = logits_TE.square().mean().sqrt()
    return len(f_E) * (f_E * (logits_TE / (temperature * spread)).softmax(-1).mean(0)).sum()


def _estimated_spread(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    z_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    return len(f_E) * (f_E * (z_TE / (temperature * z_TE.std())).softmax(-1).mean(0)).sum()


def _spread_of_each_token(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    z_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    spread_T = z_TE.square().mean(-1, keepdim=True).sqrt()
    return len(f_E) * (f_E * (z_TE / (temperature * spread_T)).softmax(-1).mean(0)).sum()


def slope(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    """E mean_t cov_{p_t}(f, z_t): the slope of the usual loss along the logits."""
    p_TE = logits_TE.softmax(-1)
    leaning_TE = p_TE * (logits_TE - (p_TE * logits_TE).sum(-1, keepdim=True))
    return (len(f_E) * (f_E * leaning_TE.mean(0)).sum()).detach()  # asked for as a value


def _without_the_mean(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    return len(f_E) * (f_E * (logits_TE.softmax(-1) * logits_TE).mean(0)).sum()


def _layers() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(16)
    logits = [shift + torch.randn(9, 5, generator=generator) for shift in (0.0, 3.0)]
    return [(logits_TE, torch.rand(5, generator=generator).softmax(-1)) for logits_TE in logits]


def _with_temperature() -> list:
    return [(*layer, temperature) for layer, temperature in zip(_layers(), (0.3, 1.0), strict=True)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="scale_free_loss",
        chapter=13,
        solution=loss,
        inputs=_with_temperature,
        mistake=_spread_with_the_shift,
        says="your spread grows when all logits of a token are shifted: subtract each token's mean before you square",
        others=(
            (
                _estimated_spread,
                "almost: std() divides by n - 1, as an estimate from a sample would, with n = T E. These are all logits:"
                " std(correction=0), or the root of the mean square",
            ),
            (_spread_of_each_token, "that is a spread for each token; the loss measures all of a layer's in one unit"),
        ),
    ),
    Exercise(
        name="size_slope",
        chapter=13,
        solution=slope,
        inputs=_layers,
        mistake=_without_the_mean,
        says="a softmax's derivative has a second term: subtract the mean of z under p, or a common shift would count",
    ),
)
