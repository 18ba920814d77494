"""Expert threshold: each expert gets its share of a steady stream, token by token, and statistics add up."""

from __future__ import annotations

import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.losses import expert_counts
from sigma_lite.config import ConfigError
from sigma_lite.model import Routing
from sigma_lite.papers.threshold import Above, Thresholds

LOGITS = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 8)


def as_routing(logits: torch.Tensor) -> Routing:
    nothing = torch.zeros(len(logits), 1, dtype=torch.int64)
    return Routing(logits, nothing, nothing.float(), logits)


@pytest.mark.parametrize("k", [1, 2])
def test_after_one_step_every_expert_has_its_share_however_skewed_its_scores(k):
    router, balancer = Above(NET), Thresholds(k=k)
    bias = balancer.next_bias(torch.zeros(1, 8), balancer.statistics([as_routing(LOGITS)]), 0)
    router.bias.copy_(bias[0])
    counts = expert_counts(router.choose(LOGITS.sigmoid() + router.bias), 8)
    assert ((counts - 4000 * k / 8).abs() <= 12).all(), "the fullest bin holds so many"
    exact = LOGITS.sigmoid().quantile(1 - k / 8, dim=0)
    torch.testing.assert_close(-bias[0], exact, atol=1e-3, rtol=0)


def test_the_threshold_is_a_running_average_from_the_second_step_on():
    balancer = Thresholds(k=1, keep=0.75)
    steps = [balancer.statistics([as_routing(LOGITS + shift)]) for shift in (0, 1)]
    first = balancer.next_bias(torch.zeros(1, 8), steps[0], 0)
    alone = balancer.next_bias(torch.zeros(1, 8), steps[1], 0)
    torch.testing.assert_close(balancer.next_bias(first, steps[1], 1), 0.75 * first + 0.25 * alone)


def test_statistics_of_micro_batches_add_up():
    balancer = Thresholds()
    parts = [balancer.statistics([as_routing(part)]) for part in LOGITS.split(1000)]
    assert torch.equal(torch.stack(parts).sum(0), balancer.statistics([as_routing(LOGITS)]))


def test_a_token_is_judged_by_itself_and_may_have_no_expert():
    router = Above(NET)
    first = routed(router)
    assert (first.ids >= 0).all() and first.ids.shape == (60, 4), "before there are thresholds: the top K"
    router.bias.fill_(-0.9)
    few = routed(router)
    torch.manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(0, 0.5)
    alone = router(torch.randn(60, 16)[:7])
    width = alone.ids.shape[1]
    assert torch.equal(few.ids[:7, :width], alone.ids) and (few.ids[:7, width:] == -1).all()
    kept = (few.ids >= 0).sum(1)
    assert kept.min() == 0 and kept.max() > 1


def test_refusals():
    for wrong, words in (({"k": 0}, "at least 1"), ({"keep": 1.0}, "without 1")):
        with pytest.raises(ConfigError, match=words):
            Thresholds(**wrong)
