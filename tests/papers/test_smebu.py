"""SMEBU: one step by hand, what it keeps, and that it settles where the sign rule cycles."""

from __future__ import annotations

import math

import pytest
import torch

from sigma_lite.balance.bias import bias_step
from sigma_lite.balance.dual import choose
from sigma_lite.config import ConfigError
from sigma_lite.papers.smebu import SMEBU


def test_two_steps_by_hand():
    """Loads 6, 2, 1, 3 of mean 3: v = -1, 1/3, 2/3, 0."""
    own, pooled = SMEBU(), torch.tensor([[6, 2, 1, 3]])
    soft = [5e-4 * math.tanh(2 * v) for v in (-1, 1 / 3, 2 / 3, 0)]
    d = torch.tensor([[x - sum(soft) / 4 for x in soft]])
    first = own.next_bias(torch.zeros(1, 4), pooled, 0)
    torch.testing.assert_close(first, 0.5 * d)
    torch.testing.assert_close(own.next_bias(first, pooled, 1), 0.5 * d + 0.75 * d)


def test_no_step_exceeds_the_rate_and_the_mean_stays():
    own, bias = SMEBU(rate=1e-3), torch.zeros(2, 96)
    for step in range(20):
        moved = own.next_bias(bias, torch.randint(0, 900, (2, 96)), step)
        assert (moved - bias).abs().max() <= 2e-3 and moved.mean(-1).abs().max() < 1e-7
        bias = moved
    again = SMEBU(rate=1e-3)
    again.load_state_dict(own.state_dict())
    pooled = torch.randint(0, 900, (2, 96))
    assert torch.equal(own.next_bias(bias, pooled, 0), again.next_bias(bias, pooled, 0))
    with pytest.raises(ConfigError, match="bias of another balancer"):
        again.load_state_dict({"bias": bias})


@pytest.mark.parametrize(("rate", "ours", "sign"), [(5e-4, (0, 4), (0, 5)), (2e-2, (6, 12), (15, 30))])
def test_its_cycle_on_frozen_scores_is_narrower_than_the_sign_rules_at_a_large_rate(rate, ours, sign):
    """960 tokens, 96 experts, K = 1, sigmoid scores: the largest |load - 10| over the last 100 of 1200 steps."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(960, 96, generator=generator) + torch.randn(96, generator=generator)).sigmoid()
    for rule, (low, high) in ((SMEBU(rate=rate), ours), (None, sign)):
        bias, off = torch.zeros(1, 96), []
        for step in range(1200):
            loads = choose(scores, bias[0], 1).loads[None]
            off.append((loads - 10).abs().max().item())
            bias = rule.next_bias(bias, loads, step) if rule else bias + bias_step(loads, "sign", rate)
        assert off[0] == 268 and low <= max(off[-100:]) <= high


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"kappa": -1}, {"beta": 1.0}])
def test_refusals(wrong):
    with pytest.raises(ConfigError, match="greater than 0|without 1"):
        SMEBU(**wrong)
