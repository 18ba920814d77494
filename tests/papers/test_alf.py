"""Quantile balancing: golden numbers on frozen scores, statistics that add up, and its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.dual import ascend, choose
from sigma_lite.config import ConfigError
from sigma_lite.model import Routing
from sigma_lite.papers.alf import QuantileBalancing, histogram, online, quantile, wanted_bias


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


@pytest.mark.parametrize(
    ("T", "kind", "golden"),
    [
        (960, "sigmoid", {0: 149, 1: 11, 5: 4, 20: 4}),
        (9600, "sigmoid", {0: 1799, 1: 102, 5: 25, 20: 20}),
        (9600, "softmax", {0: 1799, 1: 139, 20: 17}),
    ],
)
def test_exact_quantiles_on_frozen_scores(T, kind, golden):
    """The rule without a histogram: largest |load - T / 96| before, after a few steps, and in the end."""
    s, bias, found = scores(T, kind=kind), torch.zeros(96), []
    for _ in range(max(golden) + 1):
        found.append(off(s, bias))
        bias = wanted_bias(s, bias, 1).kthvalue(T // 96 + 1, dim=0).values  # 1 / 96 of all lie below
    assert {step: found[step] for step in golden} == pytest.approx(golden, abs=3)


@pytest.mark.parametrize(("T", "golden"), [(960, {0: 149, 60: 72, 300: 10, 1000: 4}), (9600, {0: 1799, 60: 782})])
def test_the_sign_rule_on_the_same_scores_is_slow(T, golden):
    """And its end is no worse than that of quantiles."""
    found = ascend(scores(T), 1, max(golden), "sign", 1e-3).imbalance
    assert {step: found[step].item() for step in golden} == pytest.approx(golden, abs=3)


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


# -------------------------------------------------------------------------------------------------------------- online


def regrets(step, N: int, T: int = 4, streams: int = 300, half: float = 1.0, middle: float = 0.5) -> Tensor:
    """[N], expected regret so far, mean over streams of two experts whose scores differ by U(middle - half, middle + half).

    With q = p_0 - p_1 and x = q + middle the expected cost lies x^2 / (4 half) above its least while |x| <= half, that is
    mu = 1 / half along the price, which is q / sqrt 2 long; beyond, where all tokens choose alike, it is |x| / 2 - half / 4.
    """
    generator = torch.Generator().manual_seed(0)

    def batches():
        for _ in range(N):
            difference = middle + half * (2 * torch.rand(streams, T, generator=generator, dtype=torch.float64) - 1)
            yield torch.stack([difference, torch.zeros_like(difference)], -1)

    price = online(batches(), 1, step).price
    x = (price[..., 0] - price[..., 1] + middle).abs()
    return torch.where(x <= half, x.square() / (4 * half), x / 2 - half / 4).mean(1).cumsum(0)


@pytest.mark.parametrize("T", [1, 4])
def test_steps_of_one_over_mu_n_have_logarithmic_regret(T):
    """Below the bound at each N, and about what can be worked out: q_n - q* is the mean of n - 1 errors, each of variance
    half^2 / T, so the regret of step n is half / (4 T (n - 1)), and their sum half (log N + 0.577) / (4 T)."""
    half, N = 0.8, 3000
    found = regrets(lambda n: half / n, N, T, half=half, middle=0.0)
    n = torch.arange(1, N + 1)
    bound = 0.5 * (1 + n.log()) * half / 2
    assert (found <= bound).all()
    assert found[-1].item() == pytest.approx(half * (math.log(N) + 0.577) / (4 * T), rel=0.15)
    decades = found[[29, 299, 2999]].diff() / math.log(10)
    assert decades.tolist() == pytest.approx([half / (4 * T)] * 2, rel=0.25), "the same for each tenfold of steps"


def test_other_steps_have_more_regret():
    """Steps that fall as 1 / sqrt n: four times the regret for 16 times the steps, in the end. A mu ten times too large: it
    hardly leaves where it began."""
    right, slow, stuck = (
        regrets(step, 3200)[[199, 3199]] for step in (lambda n: 1 / n, lambda n: 0.5 * n**-0.5, lambda n: 0.1 / n)
    )
    assert right[1] / right[0] < 1.8
    assert 3 < slow[1] / slow[0] < 4.5 and slow[1] > 3 * right[1]
    assert stuck[1] > 4 * slow[1]


def test_online_is_the_rule_written_out():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(2, 12, 6, generator=generator, dtype=torch.float64) for _ in range(5)]
    found = online(batches, 2, lambda n: 0.3 / n)
    for stream in range(2):
        price = torch.zeros(6, dtype=torch.float64)
        for n, batch in enumerate(batches, start=1):
            now = choose(batch[stream], price, 2)
            torch.testing.assert_close(found.price[n - 1, stream], price)
            assert found.cost[n - 1, stream].item() == pytest.approx(now.dual / 12)
            price = price - 0.3 / n * (now.loads / 12 - 2 / 6)
