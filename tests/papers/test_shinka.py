"""ShinkaEvolve's loss: closed forms, and gradients derived on paper."""

from __future__ import annotations

import math

import pytest
import torch
from samples import routing, skewed, sure

from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import ConfigError
from sigma_lite.model import Routing
from sigma_lite.papers.shinka import LISTING, PRINTED, Shinka, concentration, missing_share


def test_both_thresholds_are_those_of_the_paper():
    """Formula and listing at E = 64: 0.001 and 0.01, ten times as much."""
    assert [x / 64 for x in (PRINTED, LISTING)] == pytest.approx([0.001, 0.01])
    assert Shinka().threshold == LISTING


@pytest.mark.parametrize("E", [8, 64])
@pytest.mark.parametrize("threshold", [PRINTED, LISTING])
def test_shinka_closed_forms(E, threshold):
    """Balanced: the LBL and nothing else. Collapsed: E and the hinge of E - 1 empty experts at full strength, 1.5."""
    balanced, collapsed = torch.arange(4 * E) % E, torch.zeros(4 * E, dtype=torch.int64)
    own = Shinka(threshold)
    assert own.loss(*routing(sure(balanced, E).float())).item() == pytest.approx(1)
    expected = E + 0.1 * 1.5 * threshold * (1 - 1 / E)
    assert own.loss(*routing(sure(collapsed, E).float())).item() == pytest.approx(expected, rel=1e-6)
    flat = Routing(torch.full((9, E), 1 / E), torch.zeros(9, 1, dtype=torch.int64), torch.zeros(9, 1), torch.zeros(9, E))
    blind = own.loss(flat, torch.eye(E)[0]).item()
    assert blind == pytest.approx(1 + 0.1 * 0.5 * threshold * (1 - 1 / E)), "the blind spot stays: s is least when P is flat"


def test_the_two_thresholds_see_different_experts():
    """Loads of 0, 0.3 and 0.9 of an even share: printed tau starts at 0.064, the listing's at 0.64."""
    f = torch.tensor([0.0, 0.3, 0.9, 2.8]) / 4
    assert missing_share(f, PRINTED).item() == pytest.approx(0.064 / 4)
    assert missing_share(f, LISTING).item() == pytest.approx((0.64 + 0.34) / 4)
    assert missing_share(torch.full((4,), 0.25), 1.0).item() == 0


def test_concentration_runs_from_half_to_one_and_a_half():
    assert concentration(torch.full((64,), 1 / 64)).item() == pytest.approx(0.5)
    assert concentration(torch.eye(64)[3]).item() == pytest.approx(1.5)


@pytest.mark.parametrize("K", [1, 2])
def test_all_gradient_of_the_hinge_flows_through_the_concentration(K):
    """d/dP_e = strength * missing * (1 + log P_e) / log E: it flattens P, and knows nothing of which expert starves."""
    routed, f = routing(skewed(), K)
    P = routed.probs.mean(0)
    own, lbl = Shinka().loss(routed, f), load_balancing_loss(routed.probs, routed.ids, f)
    (gradient,) = torch.autograd.grad(own - lbl, routed.probs, retain_graph=True)
    missing = missing_share(f, LISTING).item()
    expected = 0.1 * missing * (1 + P.log()) / math.log(16) / 200
    assert missing > 0.1
    torch.testing.assert_close(gradient, expected.detach().expand(200, 16), rtol=1e-3, atol=1e-8)


def test_while_nobody_starves_it_is_the_global_loss():
    routed, _ = routing(skewed())
    even = torch.full((16,), 1 / 16)
    terms = [Shinka().loss(routed, even), load_balancing_loss(routed.probs, routed.ids, even)]
    assert torch.equal(*terms)
    assert torch.equal(*(torch.autograd.grad(term, routed.probs, retain_graph=True)[0] for term in terms))


@pytest.mark.parametrize("hinge", ["probs", "straight_through"])
def test_our_variants_lift_the_starved(hinge):
    """Beside the paper's gradient, -strength * s / T for each starved expert and 0 for the others."""
    routed, f = routing(skewed())
    P = routed.probs.mean(0)
    own, paper = Shinka(hinge=hinge).loss(routed, f), Shinka().loss(routed, f)
    starved = (P if hinge == "probs" else f) < LISTING / 16
    assert 0 < starved.sum() < 16
    (gradient,) = torch.autograd.grad(own, routed.probs, retain_graph=True)
    through_s = 0.1 * missing_share(P if hinge == "probs" else f, LISTING) * (1 + P.log()) / math.log(16)
    expected = (16 * f + through_s - 0.1 * concentration(P) * starved) / 200
    torch.testing.assert_close(gradient, expected.detach().expand(200, 16), rtol=1e-4, atol=1e-7)
    if hinge == "straight_through":
        torch.testing.assert_close(own, paper, msg="its value is the paper's")


@pytest.mark.parametrize("wrong", [{"threshold": 64.0}, {"threshold": -1.0}, {"hinge": "count"}])
def test_shinka_refuses(wrong):
    with pytest.raises(ConfigError, match="must lie in 0..1|did you mean 'counts'"):
        Shinka(**wrong)
