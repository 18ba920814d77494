"""The loss-free bias as arithmetic, and the one interface of everything that balances."""

from __future__ import annotations

import math

import pytest
import torch

from sigma_lite.balance.balancer import Balancer, GlobalLBL, MicroLBL, Top1LBL, WithBias, as_balancer, balancer, counts_of
from sigma_lite.balance.bias import bias_step, centred, rate_at, spread
from sigma_lite.balance.losses import load_balancing_loss, load_share, sequence_load_balancing_loss, top1_load_balancing_loss
from sigma_lite.config import BalanceConfig, ConfigError
from sigma_lite.model import Routing
from sigma_lite.papers.alf import QuantileBalancing
from sigma_lite.papers.latency import LatencyLBL
from sigma_lite.papers.moduleformer import MutualInformation
from sigma_lite.papers.remoe import L1
from sigma_lite.papers.shinka import Shinka
from sigma_lite.papers.smebu import SMEBU
from sigma_lite.papers.threshold import Thresholds

COUNTS = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [5, 4, 3, 4]])


def routings(L: int = 2, T: int = 24, E: int = 6, K: int = 2, seed: int = 0) -> list[Routing]:
    logits_LTE = torch.randn(L, T, E, generator=torch.Generator().manual_seed(seed))
    chosen = [(logits, logits.softmax(-1), logits.topk(K).indices) for logits in logits_LTE]
    return [Routing(probs, ids, probs.gather(1, ids), logits) for logits, probs, ids in chosen]


def shares(routings: list[Routing]) -> torch.Tensor:
    return torch.stack([load_share(torch.bincount(r.ids.flatten(), minlength=r.probs.shape[1])) for r in routings])


# ------------------------------------------------------------------------------------------------------- one step


def test_signs_lift_the_poor_and_lower_the_rich():
    expected = torch.tensor([[0, 0, 0, 0], [-1, 1, 1, 1], [-1, 0, 1, 0]])
    torch.testing.assert_close(bias_step(COUNTS, "sign", 0.01), 0.01 * expected)


def test_proportional_steps_are_the_relative_shortfall():
    expected = torch.tensor([[0, 0, 0, 0], [-3, 1, 1, 1], [-0.25, 0, 0.25, 0]])  # 1 - load / mean load
    torch.testing.assert_close(bias_step(COUNTS, "proportional", 0.01), 0.01 * expected)
    torch.testing.assert_close(bias_step(7 * COUNTS, "proportional", 0.01), 0.01 * expected)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_an_even_load_moves_nothing_whatever_the_number_of_experts(rule):
    """In fp32, E * (1 / E) is not 1 for E = 41, 47, 55, ...: a sign of that quotient would push a balanced layer."""
    pushed = [E for E in range(2, 300) if bias_step(torch.full((E,), 85), rule, 1e-3).any()]
    assert pushed == []


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_nothing_counted_moves_nothing(rule):
    step = bias_step(torch.tensor([[0, 0], [3, 1]]), rule, 0.5)
    assert step[0].tolist() == [0, 0] and step[1, 0] < 0 < step[1, 1] and step.dtype == torch.float32


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'signs' does not exist: choose sign or proportional"):
        bias_step(COUNTS, "signs", 0.1)


def test_centring_changes_no_choice():
    torch.manual_seed(0)
    bias, scores = torch.randn(3, 16) + 2, torch.rand(3, 200, 16)
    torch.testing.assert_close(centred(bias).mean(-1), torch.zeros(3))
    torch.testing.assert_close(spread(centred(bias)), spread(bias))
    torch.testing.assert_close(spread(bias), bias.max(-1).values - bias.min(-1).values)
    for K in (1, 4):
        chosen = [(scores + b[:, None]).topk(K).indices for b in (bias, centred(bias))]
        assert torch.equal(*chosen)


@pytest.mark.parametrize(("rate", "first"), [(1e-2, 50), (1e-3, 500)])
def test_spread_grows_by_two_rates_a_step_at_most(rate, first):
    """So no pair of experts is decided without regard to the token before 1 / (2u) steps."""
    bias, steps = torch.zeros(4), 0
    while spread(bias) < 1 - 1e-4:
        bias, steps = bias + bias_step(COUNTS[1], "sign", rate), steps + 1
    assert steps == first


def test_rates():
    assert [rate_at(step, 0.1) for step in (0, 8, 10**6)] == [0.1] * 3
    assert [rate_at(step, 0.1, "sqrt") for step in (0, 3, 99)] == pytest.approx([0.1, 0.05, 0.01])


# -------------------------------------------------------------------------------------------------- the one interface


def test_a_bias_beside_a_loss():
    """The loss is the inner one's; the bias is where it was plus the step, at the rate of that step."""
    found, bias = routings(), torch.linspace(-1, 1, 8).view(2, 4)
    for centre in (False, True):
        both = WithBias(MicroLBL(), "sign", 0.1, "sqrt", centre)
        assert torch.equal(both.losses(found, shares(found), 1), MicroLBL().losses(found, shares(found), 1))
        expected = bias + bias_step(COUNTS[1:], "sign", 0.1 / 2)
        moved = both.next_bias(bias, COUNTS[1:], step=3)
        torch.testing.assert_close(moved, expected - expected.mean(-1, keepdim=True) if centre else expected)


def test_a_bias_beside_a_loss_of_one_layer():
    """Asked for one layer alone too. The shares are not the micro-batch's own, so the global LBL is another number."""
    routing, other = routings()[0], torch.tensor([1.0, 0, 0, 0, 0, 0])
    one = WithBias(MicroLBL(), "sign").loss(routing, other)
    assert one == MicroLBL().loss(routing, other) != GlobalLBL().loss(routing, other)


def test_every_name_in_the_settings_is_its_loss():
    found, other = routings(), torch.rand(2, 6).softmax(-1)
    expected = {
        "global": lambda r, f: load_balancing_loss(r.probs, r.ids, f),
        "none": lambda r, f: torch.zeros(()),
        "micro": lambda r, f: load_balancing_loss(r.probs, r.ids),
        "sequence": lambda r, f: sequence_load_balancing_loss(r.probs, r.ids, 3),
        "top1": lambda r, f: top1_load_balancing_loss(r.logits, r.ids, 0.5),
    }
    values = {}
    for name, loss in expected.items():
        values[name] = balancer(BalanceConfig(loss=name, temperature=0.5)).losses(found, other, 3)
        torch.testing.assert_close(values[name], torch.stack([loss(*pair) for pair in zip(found, other, strict=True)]))
    apart = [tuple(values[name].tolist()) for name in ("global", "micro", "sequence", "top1")]
    assert len(set(apart)) == 4, "all four differ here, so none can stand for another"


def test_the_settings_of_the_bias_arrive():
    assert balancer(BalanceConfig(loss="micro")).next_bias(torch.zeros(1, 4), COUNTS[:1], 0) is None
    named = balancer(BalanceConfig(loss="micro", bias="proportional", bias_rate=0.5, bias_decay="sqrt", bias_centre=True))
    assert type(named.inner) is MicroLBL
    assert (named.rule, named.rate, named.decay, named.centre) == ("proportional", 0.5, "sqrt", True)


def test_ones_own():
    found = routings()
    mine = as_balancer(lambda routing, f_E: (f_E * routing.probs.mean(0)).sum())
    assert isinstance(mine, Balancer) and mine.next_bias(torch.zeros(2, 6), torch.ones(2, 6), 0) is None
    torch.testing.assert_close(6 * mine.losses(found, shares(found), 1), MicroLBL().losses(found, shares(found), 1))
    own = MicroLBL()
    assert as_balancer(own) is own
    for wrong in (MicroLBL, "micro", 3, None):
        with pytest.raises(ConfigError, match="give a function .* or an object of a Balancer subclass"):
            as_balancer(wrong)


@pytest.mark.parametrize(
    "inner", [L1(), SMEBU(), QuantileBalancing(), Thresholds(), WithBias(GlobalLBL(), "sign")], ids=repr
)
def test_a_bias_beside_what_moves_by_itself_is_refused(inner):
    """Inside, none of them was ever asked for its next bias: L1's coefficient stayed at 1e-8, the others did nothing."""
    with pytest.raises(ConfigError, match=f"WithBias.{type(inner).__qualname__}.*use {type(inner).__qualname__} alone"):
        WithBias(inner, "sign")


def test_a_bias_beside_any_loss_leaves_the_loss_as_it_is():
    """Of each balancer of losses, its terms; and the bias moves by counts."""
    both_layers = routings(E=8)
    f_LE = shares(both_layers)
    for inner in (GlobalLBL(), MicroLBL(), Top1LBL(), Shinka(), MutualInformation(), LatencyLBL(), Balancer()):
        both = WithBias(inner, "sign", 0.1)
        assert torch.equal(both.losses(both_layers, f_LE, 2), inner.losses(both_layers, f_LE, 2))
        assert torch.equal(both.statistics(both_layers), counts_of(both_layers))
        assert both.next_bias(torch.zeros(2, 8), counts_of(both_layers), 0).abs().max() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "given",
    [{"rule": "sing"}, {"rule": "none"}, {"rate": -1e-3}, {"rate": 0}, {"rate": math.inf}, {"decay": "sqr"}],
    ids=str,
)
def test_a_bias_rule_that_does_not_exist_is_refused_when_it_is_made(given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
        WithBias(GlobalLBL(), **{"rule": "sign", **given})
