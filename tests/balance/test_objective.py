"""The objective that training, chapters, ranks and benchmarks share, and the balancer that does nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, GlobalLBL, WithBias, balancer
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share, z_loss
from sigma_lite.balance.objective import Objective, objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import BalanceConfig, ConfigError
from sigma_lite.model import Routing


def routing(seed: int, T: int = 40, E: int = 6, K: int = 2) -> Routing:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    probs = logits.softmax(-1)
    gates, ids = probs.topk(K)
    return Routing(probs, ids, gates, logits)


def test_the_objective_written_out():
    """Two layers, second micro-batch of a step: weights are of a layer, layers are summed, f is of both micro-batches."""
    first, second, pooled = [routing(0), routing(1)], [routing(2), routing(3)], PooledCounts()
    whole = Objective(GlobalLBL(), weight=0.3, z_weight=0.07, n_layers=2)
    whole(torch.tensor(5.0), first, pooled, n_rows=4)
    losses = whole(torch.tensor(5.0), second, pooled, n_rows=4)
    expected, lbl = 5.0, []
    for one, other in zip(first, second, strict=True):
        f_E = load_share(expert_counts(one.ids, 6) + expert_counts(other.ids, 6))
        lbl.append(load_balancing_loss(other.probs, other.ids, f_E).item())
        expected += 0.3 * lbl[-1] + 0.07 * z_loss(other.logits).item()
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)
    assert losses.terms["balance"].item() == losses.lbl.item() == pytest.approx(sum(lbl) / 2, rel=1e-6)


def test_a_balancer_that_does_nothing_moves_nothing():
    """By itself, by the name "none", and below a class that only moves a bias: no gradient, and the LBL is shown."""

    class OnlyBias(Balancer):
        def next_bias(self, bias_LE: Tensor, pooled: Tensor, step: int) -> Tensor:
            return bias_LE + 1

    for idle in (Balancer(), OnlyBias(), balancer(BalanceConfig(loss="none")), WithBias(Balancer(), "sign")):
        found = routing(0)
        losses = Objective(idle, weight=1.0, z_weight=0.0, n_layers=1)(torch.zeros(()), [found], PooledCounts(), 1)
        assert losses.total == losses.terms["balance"] == 0 and losses.lbl > 0.9
        assert (
            not losses.total.requires_grad or not torch.autograd.grad(losses.total, found.logits, allow_unused=True)[0].any()
        )


def test_a_custom_loss_is_trained_and_the_lbl_is_measured_beside_it():
    class Seven(Balancer):
        def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
            return 7 * routing.probs.sum() / len(routing.probs)

    found = routing(0)
    losses = objective(BalanceConfig(weight=0.5, z_weight=0.0), 1, Seven())(torch.zeros(()), [found], PooledCounts(), 1)
    assert losses.terms["balance"].item() == pytest.approx(7) and losses.total.item() == pytest.approx(3.5)
    assert losses.lbl.item() == pytest.approx(load_balancing_loss(found.probs, found.ids).item())
    assert not losses.lbl.requires_grad


def test_state_that_a_balancer_does_not_know_is_refused():
    Balancer().load_state_dict({})
    for one in (Balancer(), WithBias(GlobalLBL(), "sign")):
        with pytest.raises(ConfigError, match="holds momentum of its balancer"):
            one.load_state_dict({"momentum": torch.zeros(3)})
