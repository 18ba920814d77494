"""BASE and Sinkhorn: even loads in training, the best such assignment, and the greedy choice in evaluation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.losses import expert_counts
from sigma_lite.config import ConfigError
from sigma_lite.model import Router
from sigma_lite.papers.base import Assigned, auction, sinkhorn

ONE = dataclasses.replace(NET, top_k=1)


def skewed(T: int, E: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(T, E, generator=generator) + 2 * torch.randn(E, generator=generator)).softmax(-1)


def test_sinkhorn_makes_rows_and_columns_sum_to_their_shares():
    balanced = sinkhorn(skewed(120, 8).log(), rounds=200).exp()
    torch.testing.assert_close(balanced.sum(0), torch.full((8,), 15.0))
    torch.testing.assert_close(balanced.sum(1), torch.ones(120), atol=1e-3, rtol=0)


def test_sinkhorn_loads_are_nearly_even_where_the_usual_ones_collapse():
    scores = skewed(960, 8)
    usual, balanced = (expert_counts(s.topk(1).indices, 8) for s in (scores, sinkhorn(scores.log(), 20)))
    assert usual.max() > 3 * 120 and usual.min() < 40
    assert balanced.max() < 1.25 * 120 and balanced.min() > 0.75 * 120


def test_the_auction_finds_the_best_even_assignment():
    """Against every one of the 1680 ways to deal nine tokens to three experts."""
    scores = skewed(9, 3)
    found = auction(scores)
    assert expert_counts(found, 3).tolist() == [3, 3, 3]
    ways = (w for w in itertools.product(range(3), repeat=9) if w.count(0) == w.count(1) == 3)
    best = max(sum(float(scores[t, e]) for t, e in enumerate(way)) for way in ways)
    assert float(scores.gather(1, found[:, None]).sum()) == pytest.approx(best, abs=9e-4)


@pytest.mark.parametrize("T", [40, 43])
def test_the_auction_fills_every_expert(T):
    counts = expert_counts(auction(skewed(T, 8)), 8)
    assert counts.sum() == T and counts.max() == -(-T // 8) and (counts == 5).all() == (T == 40)


@pytest.mark.parametrize("method", ["sinkhorn", "auction"])
def test_in_evaluation_each_token_chooses_for_itself(method):
    router, usual = Assigned(ONE, method=method), routed(Router(ONE))
    trained = routed(router)
    assert not torch.equal(trained.ids, usual.ids)
    assert torch.equal(routed(router.eval()).ids, usual.ids)
    assert torch.equal(trained.gates, trained.probs.gather(1, trained.ids)), "the gate is the score, not the assignment's"


def test_refusals():
    with pytest.raises(ConfigError, match="one expert, not 4"):
        Assigned(NET, method="auction")
    with pytest.raises(ConfigError, match="did you mean 'sinkhorn'"):
        Assigned(NET, method="sinkhron")
