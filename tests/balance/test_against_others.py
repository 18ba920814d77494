"""The same losses by other hands: transformers, finite differences, gradients derived on paper.

transformers divides counts by T, not by K * T: its loss is K times ours, so K at balance.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.losses import (
    expert_counts,
    load_balancing_loss,
    load_share,
    sequence_load_balancing_loss,
    top1_load_balancing_loss,
    z_loss,
)

EACH_K = pytest.mark.parametrize("K", [1, 2, 8])
T, E = 96, 16


def inputs(K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a gradient, their softmax, and the chosen experts; the columns are not equally liked."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, E, generator=generator) + torch.linspace(0, 2, E)).requires_grad_()
    probs = logits.softmax(-1)
    return logits, probs, probs.topk(K).indices


def same(ours: Tensor, theirs: Tensor, source: Tensor) -> None:
    """Value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss, source, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    assert gradients[0].abs().max() > 1e-6, "a gradient of 0 would agree with anything"


# ------------------------------------------------------------------------------------------------------ transformers


@EACH_K
@pytest.mark.parametrize("seed", range(5))
def test_transformers_loss_is_K_times_ours(K, seed):
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits, probs, ids = inputs(K, seed)
    same(K * load_balancing_loss(probs, ids), qwen.load_balancing_loss_func((logits,), E, K), logits)


# ----------------------------------------------------------------------------------------------- derived, and measured


def through_softmax(to_probs: Tensor, probs: Tensor) -> Tensor:
    """dL/dz from dL/dp: p_e (g_e - sum p g)."""
    return probs * (to_probs - (probs * to_probs).sum(1, keepdim=True))


@EACH_K
def test_gradients_derived_on_paper(K):
    logits, probs, ids = inputs(K)
    f = load_share(expert_counts(ids, E))
    lse, p = logits.logsumexp(1, keepdim=True), probs.detach()
    fhat, pbar = p.mean(0), p.gather(1, ids).sum(1).mean()
    chosen = torch.zeros(T, E).scatter_(1, ids, 1.0)
    to_top1 = 2 * E * fhat / (T * pbar) - E * fhat.square().sum() / pbar**2 * chosen / T
    derived = {
        "lbl": (load_balancing_loss(probs, ids), through_softmax((E * f / T).expand(T, E), p)),
        "top1": (top1_load_balancing_loss(logits, ids), through_softmax(to_top1, p)),
        "z": (z_loss(logits), (2 * lse * p / T).detach()),
    }
    for name, (loss, expected) in derived.items():
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@EACH_K
def test_gradients_measured_by_finite_differences(K):
    """The choice is held fixed, as it is in the loss: moving one logit a little moves f by nothing."""
    logits, _, ids = inputs(K)
    losses = {
        "lbl": lambda z: load_balancing_loss(z.softmax(-1), ids),
        "sequence": lambda z: sequence_load_balancing_loss(z.softmax(-1), ids, 4),
        "top1": lambda z: top1_load_balancing_loss(z, ids, 0.5),
        "z": z_loss,
    }
    direction = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slopes = {
            name: (loss(logits + 1e-2 * direction) - loss(logits - 1e-2 * direction)) / 2e-2 for name, loss in losses.items()
        }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        assert (gradient * direction).sum().item() == pytest.approx(slopes[name].item(), rel=2e-3, abs=2e-5), name
