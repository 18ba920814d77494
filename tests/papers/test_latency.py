"""Costs decide the fair share: 40 and 60 %, a shorter makespan; powers of two; and the gradient that K = 1 loses."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from samples import NET

from sigma_lite.balance.balancer import GlobalLBL
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import ConfigError
from sigma_lite.model import Parts, Routing, Transformer
from sigma_lite.papers.latency import (
    LatencyCV,
    LatencyLBL,
    Mixed,
    cv_squared,
    importance_of_chosen,
    makespan,
    measured_latency,
    per_expert,
    power_of_two,
    smooth_load,
)


def test_powers_of_two_and_their_straight_through_gradient():
    w = torch.tensor([1.0, -0.74, 0.3, 0.0, -3.1, 0.7], requires_grad=True)
    assert power_of_two(w).tolist() == [1, -1, 0.25, 0, -4, 0.5]
    (power_of_two(w) * torch.arange(6.0)).sum().backward()
    assert w.grad.tolist() == [0, 1, 2, 3, 4, 5]


def test_mixed_experts_equal_a_loop():
    torch.manual_seed(0)
    moe = Transformer(NET, Parts(experts=functools.partial(Mixed, full=3, shift_width=4))).blocks[0].moe
    x, (full, shift) = torch.randn(1, 20, 16), moe.experts.kinds
    y, routing = moe(x)
    expected = torch.zeros(20, 16)
    for t in range(20):
        for e, gate in zip(routing.ids[t].tolist(), routing.gates[t], strict=True):
            w13, w2 = (full.w13[e], full.w2[e]) if e < 3 else (power_of_two(shift.w13[e - 3]), power_of_two(shift.w2[e - 3]))
            a, b = (w13 @ x[0, t]).chunk(2)
            expected[t] += gate * (w2 @ (F.silu(a) * b))
    torch.testing.assert_close(y[0], expected, atol=1e-5, rtol=1e-4)
    assert full.w2.shape == (3, 16, 8) and shift.w2.shape == (5, 16, 4)
    y.sum().backward()
    assert all(w.grad is not None for w in moe.experts.parameters())
    assert moe.experts(x[0], torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1)).shape == (20, 16), "one kind has none"


def trained(balancer, E: int = 2, T: int = 2000) -> torch.Tensor:
    """Tokens of each expert after free logits have followed the loss, K = 1."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
    shift = torch.zeros(E, requires_grad=True)
    optimizer = torch.optim.SGD([shift], lr=0.02)
    for _ in range(400):
        z = logits.detach() + shift
        probs, ids = z.softmax(-1), z.argmax(-1, keepdim=True)
        routing = Routing(probs, ids, probs.gather(1, ids), z)
        optimizer.zero_grad()
        balancer.loss(routing, load_share(expert_counts(ids, E))).backward()
        optimizer.step()
    return expert_counts((logits + shift).argmax(-1, keepdim=True), E)


@pytest.mark.parametrize("balancer", [LatencyLBL((6, 4)), LatencyCV((6, 4), width=1.0)], ids=["LBL", "CV"])
def test_costs_of_six_and_four_give_shares_of_40_and_60_and_a_shorter_makespan(balancer):
    aware, even, latency = trained(balancer), trained(GlobalLBL()), torch.tensor([6.0, 4.0])
    assert (even / 2000).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert (aware / 2000).tolist() == pytest.approx([0.4, 0.6], abs=0.05)
    assert makespan(aware, latency) < 0.92 * makespan(even, latency)


def test_the_optimum_is_where_all_finish_together():
    alpha = per_expert((6, 4), 2)
    assert cv_squared(alpha * torch.tensor([0.4, 0.6])).item() == pytest.approx(0, abs=1e-9)
    assert cv_squared(alpha * torch.tensor([0.5, 0.5])).item() == pytest.approx(0.08)
    flat = Routing(torch.full((9, 4), 0.25), torch.arange(9)[:, None] % 4, torch.ones(9, 1), torch.zeros(9, 4))
    assert LatencyLBL((5, 5)).loss(flat, torch.full((4,), 0.25)).item() == pytest.approx(1), "equal costs: the usual loss"


def test_at_k_1_the_released_importance_has_no_gradient_and_ours_has():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradients = []
    for importance in (importance_of_chosen(logits, 1), importance_of_chosen(logits, 2), logits.softmax(-1).sum(0)):
        (gradient,) = torch.autograd.grad(cv_squared(per_expert((6, 4), 4) * importance), logits)
        gradients.append(gradient.abs().max().item())
    assert gradients[0] == 0 < 1e-4 < min(gradients[1:])
    (load,) = torch.autograd.grad(cv_squared(smooth_load(logits, 1, 0.5)), logits)
    assert load.any(), "the smooth load is what trains there"


def test_smooth_load_counts_as_its_width_falls():
    logits = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    counts = expert_counts(logits.topk(2).indices, 6).float()
    torch.testing.assert_close(smooth_load(logits, 2, 1e-4), counts, atol=0.6, rtol=0)


def test_what_is_measured_is_the_time_of_a_token():
    """Experts 64 times as wide take longer."""
    net = dataclasses.replace(NET, d_model=64, d_expert=512)
    torch.manual_seed(0)
    wide, narrow = measured_latency(
        Transformer(net, Parts(experts=functools.partial(Mixed, shift_width=8))).blocks[0].moe.experts, 64
    )
    assert 0 < narrow < wide < 0.1


def test_refusals():
    for made, words in (
        (lambda: Mixed(NET, full=8), "both kinds exist"),
        (lambda: LatencyLBL((0, 1)), "greater than 0"),
        (lambda: per_expert((1, 2, 3), 8), "3 kinds do not divide 8"),
        (lambda: smooth_load(torch.zeros(2, 4), 4, 0.1), "every token takes all"),
    ):
        with pytest.raises(ConfigError, match=words):
            made()
