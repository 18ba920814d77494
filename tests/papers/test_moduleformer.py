"""Mutual information of token and expert: closed forms, and gradients derived on paper."""

from __future__ import annotations

import math

import pytest
import torch
from samples import routing, skewed, sure

from sigma_lite.papers.moduleformer import MutualInformation, mutual_information_loss
from sigma_lite.papers.shinka import Shinka


@pytest.mark.parametrize("E", [4, 96])
def test_mutual_information_closed_forms(E):
    """-log E: sure and even. 0: flat, or one expert for all. Between: -log 2 when two experts share all tokens."""
    even = torch.eye(E).repeat(3, 1)
    assert mutual_information_loss(even).item() == pytest.approx(-math.log(E), rel=1e-5)
    assert mutual_information_loss(torch.full((9, E), 1 / E)).item() == pytest.approx(0, abs=1e-5)
    assert mutual_information_loss(torch.eye(E)[:1].repeat(9, 1)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information_loss(torch.eye(E)[:2].repeat(9, 1)).item() == pytest.approx(-math.log(2), rel=1e-5)


def test_mutual_information_of_token_and_expert_written_out():
    """sum over pairs of p(t, e) log p(t, e) / (p(t) p(e)), with p(t) = 1 / T."""
    p = skewed(5, 7).detach().softmax(-1).double()
    joint, marginal = p / 7, p.mean(0)
    information = sum(float(q * (q / (m / 7)).log()) for row in joint for q, m in zip(row, marginal, strict=True))
    assert mutual_information_loss(p).item() == pytest.approx(-information, rel=1e-9)


def test_gradient_of_mutual_information():
    """d/dp_te = (log P_e - log p_te) / T: nothing is counted, so tokens are pushed apart directly."""
    probs = skewed().softmax(-1)
    (gradient,) = torch.autograd.grad(mutual_information_loss(probs), probs)
    torch.testing.assert_close(gradient, (probs.mean(0).log() - probs.log()).detach() / 200, rtol=1e-4, atol=1e-8)


def test_probabilities_that_underflow_have_a_finite_gradient():
    for own in (MutualInformation(), Shinka()):
        logits = sure(torch.zeros(9, dtype=torch.int64), 4).float().requires_grad_()
        (gradient,) = torch.autograd.grad(own.loss(*routing(logits)), logits)
        assert gradient.isfinite().all()


def test_minimising_it_makes_tokens_sure_and_experts_even():
    """Not perfectly even: a token that is sure has no gradient left, whoever has too many."""
    torch.manual_seed(0)
    logits = (0.1 * torch.randn(64, 8) + torch.linspace(0, 1, 8)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = mutual_information_loss(logits.softmax(-1))
        loss.backward()
        optimizer.step()
    assert logits.softmax(-1).amax(1).min() > 0.95
    assert -math.log(8) <= loss.item() < 0.97 * -math.log(8)
