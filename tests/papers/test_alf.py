"""Quantile balancing: golden numbers on frozen scores, statistics that add up, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.dual import choose
from sigma_lite.config import ConfigError
from sigma_lite.model import Routing
from sigma_lite.papers.alf import QuantileBalancing, histogram, quantile, wanted_bias


def scores(T: int, E: int = 96, kind: str = "sigmoid") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    logits = logits + torch.randn(E, generator=generator, dtype=torch.float64)
    return (logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)).float()


def as_routing(scores_TE: Tensor, bias_E: Tensor, K: int, kind: str) -> Routing:
    ids = (scores_TE + bias_E).topk(K).indices
    probs = scores_TE if kind == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
    logits = scores_TE.log() if kind == "softmax" else scores_TE.logit()
    chosen = scores_TE if kind == "softmax" else logits.sigmoid()
    return Routing(probs, ids, chosen.gather(1, ids), logits)


def off(scores_TE: Tensor, bias_E: Tensor, K: int = 1) -> int:
    return round((choose(scores_TE, bias_E, K).loads - len(scores_TE) * K / 96).abs().max().item())


@pytest.mark.parametrize(("kind", "first", "fifth"), [("sigmoid", 105, 23), ("softmax", 135, 58)])
def test_one_step_on_frozen_scores_balances_most(kind, first, fifth):
    """Largest |load - 100| of 9600 tokens and 96 experts: 1799, then `first`, and after five steps `fifth`.

    With exact quantiles the first step leaves 102 and 139.
    """
    s, balancer, bias, found = scores(9600, kind=kind), QuantileBalancing(kind), torch.zeros(1, 96), []
    for step in range(6):
        found.append(off(s, bias[0]))
        bias = balancer.next_bias(bias, balancer.statistics([as_routing(s, bias[0], 1, kind)]), step)
    assert found[0] == 1799 and bias.mean().abs() < 1e-6
    assert [found[1], found[5]] == pytest.approx([first, fifth], abs=5)


def test_statistics_of_four_micro_batches_are_those_of_one_to_the_bin():
    s, bias = scores(960), 0.1 * torch.randn(2, 96)
    balancer = QuantileBalancing("softmax")
    balancer.load_state_dict({"bias": bias})

    def of(rows: slice) -> Tensor:
        return balancer.statistics([as_routing(s.softmax(-1)[rows], b, 2, "softmax") for b in bias])

    whole, parts = of(slice(None)), [of(slice(start, start + 240)) for start in range(0, 960, 240)]
    assert whole.shape == (2, 96, 1001) and whole.dtype == torch.int64
    assert torch.equal(whole, torch.stack(parts).sum(0))
    assert (whole[..., :-1].sum(-1) == 960).all() and (whole[..., -1].sum(-1) == 1920).all()


def test_a_quantile_of_a_histogram_is_within_a_bin_of_the_exact_one():
    s, bias = scores(9600), 0.1 * torch.randn(96)
    wanted = wanted_bias(s, bias, 2)
    found = quantile(histogram(wanted, bias, 1000), torch.tensor(2 / 96), bias)
    width = float(bias.max() - bias.min() + 2) / 1000
    assert (found - torch.quantile(wanted, 2 / 96, dim=0)).abs().max() <= width


def test_what_a_token_wants_is_exact_where_it_chose_the_expert():
    """There the expert would have to fall to the K-th best of the others. Elsewhere it would have to beat it: more."""
    s, bias, K = scores(480), 0.1 * torch.randn(96), 2
    wanted, chosen = wanted_bias(s, bias, K), choose(s, bias, K).chosen
    for j in range(0, 96, 5):
        others = (s + bias).index_fill(1, torch.tensor([j]), -torch.inf)
        exact = others.topk(K).values[:, -1] - s[:, j]
        assert torch.equal(wanted[chosen[:, j], j], exact[chosen[:, j]])
        assert (wanted[~chosen[:, j], j] < exact[~chosen[:, j]]).all()


def test_its_bias_is_its_state_and_anothers_bias_is_learnt_first():
    s, balancer, bias = scores(960), QuantileBalancing("sigmoid"), torch.zeros(1, 96)
    pooled = balancer.statistics([as_routing(s, bias[0], 1, "sigmoid")])
    first = balancer.next_bias(bias, pooled, 0)
    again = QuantileBalancing("sigmoid")
    again.load_state_dict(balancer.state_dict())
    now = [b.statistics([as_routing(s, first[0], 1, "sigmoid")]) for b in (balancer, again)]
    assert torch.equal(*now) and torch.equal(
        *(b.next_bias(first, n, 1) for b, n in zip((balancer, again), now, strict=True))
    )
    branched = QuantileBalancing("sigmoid")
    assert branched.next_bias(first, pooled, 0) is None and torch.equal(branched.state_dict()["bias"], first)
    with pytest.raises(ConfigError, match="momentum of another balancer"):
        branched.load_state_dict({"momentum": first})


def test_scores_that_are_not_the_routers_are_refused():
    with pytest.raises(ConfigError, match="is not what this router chooses by"):
        QuantileBalancing("softmax").statistics([as_routing(scores(96), torch.zeros(96), 1, "sigmoid")])
    with pytest.raises(ConfigError, match="every token takes all"):
        QuantileBalancing("softmax").statistics([as_routing(scores(96).softmax(-1), torch.zeros(96), 96, "softmax")])
