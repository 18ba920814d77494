"""Square-root-softplus scores, gates that sum to the scale, and low layers that choose by the token's id."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from samples import NET, routed

from sigma_lite.config import ConfigError
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.deepseek_v4 import HashedLow, SqrtSoftplus
from sigma_lite.papers.hash import hashed

ONE = dataclasses.replace(NET, top_k=1)


def test_scores_golden_and_finite_gradients():
    logits = torch.tensor([[0.0, 3.0, -3.0, 100.0, -200.0, 1.0, 2.0, 4.0]], requires_grad=True)
    scores = SqrtSoftplus(NET).scores(logits)
    for score, z in zip(scores[0, :3].tolist(), (0.0, 3.0, -3.0), strict=True):
        assert score == pytest.approx(math.sqrt(math.log1p(math.exp(z))), rel=1e-6)
    assert scores[0, 3].item() == pytest.approx(10) and 0 < scores[0, 4] < 1e-15
    scores.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 1] > 0


def test_gates_sum_to_the_scale_and_probabilities_to_one():
    routing = routed(SqrtSoftplus(NET, scale=2.5))
    torch.testing.assert_close(routing.gates.sum(1), torch.full((60,), 2.5))
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(60))


def test_the_bias_decides_and_does_not_gate():
    router = SqrtSoftplus(ONE, renormalise=False)
    router.bias[3] = 9
    routing = routed(router)
    assert (routing.ids == 3).all()
    torch.testing.assert_close(routing.gates[:, 0], router.scores(routing.logits)[:, 3])


def test_low_layers_go_by_the_token_and_their_gate_still_learns():
    def low(config):
        return HashedLow(config, layers=1, renormalise=False)

    torch.manual_seed(0)
    model, ids = Transformer(ONE, Parts(router=low)), torch.randint(0, 50, (4, 12))
    loss, routings = model.loss(ids, ids)
    assert torch.equal(routings[0].ids, hashed(ids.flatten(), 8, 1, 0))
    assert not torch.equal(routings[1].ids, hashed(ids.flatten(), 8, 1, 1))
    loss.backward()
    assert all(block.moe.router.weight.grad.any() for block in model.blocks)


def test_refusals():
    with pytest.raises(ConfigError, match="set renormalise: false"):
        SqrtSoftplus(ONE)
    with pytest.raises(ConfigError, match="layers=-1"):
        HashedLow(NET, layers=-1)
