"""Null experts: tokens cost unequally, closed forms of the loss, and the released code's two averages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ConfigError, OptimConfig
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.adamoe import NullLBL, NullRouter, averaged, null_load_balancing_loss, true_experts
from sigma_lite.train.optim import adamw


@pytest.mark.parametrize("nulls", [4, 8, 24])
def test_flat_routers_use_k_n_over_n_plus_m_true_experts(nulls):
    """Null columns are like the others: among random scores each of n + m is as likely."""
    routing = routed(NullRouter(NET, nulls=nulls), T=4000)
    assert routing.probs.shape == (4000, 8 + nulls) and routing.ids.max() == 7
    assert true_experts(routing.ids).float().mean().item() == pytest.approx(4 * 8 / (8 + nulls), rel=0.25)
    assert true_experts(routing.ids).unique().numel() > 1, "tokens cost unequally"


def test_gates_of_true_experts_are_a_softmax_over_them():
    """ "Option 2" of the paper: renormalised over the true experts that were chosen; none chosen: all 0."""
    routing = routed(NullRouter(NET, nulls=8))
    for t in range(60):
        kept = routing.ids[t] >= 0
        expected = routing.logits[t, routing.ids[t][kept]].softmax(-1)
        torch.testing.assert_close(routing.gates[t][kept], expected)
        assert (routing.gates[t][~kept] == 0).all()


def test_at_one_expert_per_token_a_renormalised_gate_is_refused():
    one = dataclasses.replace(NET, top_k=1)
    with pytest.raises(ConfigError, match="set renormalise: false"):
        NullRouter(one)
    routing = routed(NullRouter(one, renormalise=False))
    assert torch.equal(routing.gates, routing.probs.gather(1, routing.ids.clamp(min=0)) * (routing.ids >= 0))


def test_the_router_and_not_the_config_says_whether_gates_sum_to_one():
    """`renormalise: false` keeps the scores of a model whose config divides them, and `true` divides those of another."""
    divides = dataclasses.replace(NET, renormalise=True)
    routing = routed(NullRouter(divides, renormalise=False))
    assert torch.equal(routing.gates, routing.probs.gather(1, routing.ids.clamp(min=0)) * (routing.ids >= 0))
    assert torch.equal(routed(NullRouter(divides)).gates, routed(NullRouter(NET)).gates)


def test_null_loss_closed_forms():
    """Balanced: 1. Only nulls: E / m. Where nulls are used evenly it is the usual loss with all columns."""
    n, m = 6, 3
    all_ids = torch.arange(9).repeat(4)[:, None]
    ids = all_ids.where(all_ids < n, -1)
    flat, sure = torch.full((36, 9), 1 / 9), torch.nn.functional.one_hot(all_ids[:, 0], 9).float()
    for probs in (flat, sure):
        assert null_load_balancing_loss(probs, ids, m).item() == pytest.approx(1)
    nobody = torch.full((36, 1), -1)
    only_nulls = torch.cat((torch.zeros(36, n), torch.full((36, m), 1 / m)), 1)
    assert null_load_balancing_loss(only_nulls, nobody, m).item() == pytest.approx(9 / m)


def test_nulls_are_not_balanced_among_themselves_and_without_the_mean_they_would_be():
    """exp_1 averages their f, so all null columns have the same gradient; exp_2's slice is empty, so they differ."""
    used, n = torch.tensor([0.2, 0.2, 0.4, 0.1, 0.1]), 2
    P = torch.full((5,), 0.2, requires_grad=True)
    (with_mean,) = torch.autograd.grad((5 * averaged(used, n, used[n:].sum()) * P).sum(), P)
    (without,) = torch.autograd.grad((5 * used * P).sum(), P)
    torch.testing.assert_close(with_mean[n:], torch.full((3,), 1.0))
    assert without[n:].unique().numel() > 1 and torch.equal(with_mean[:n], without[:n])


def test_null_experts_train_in_a_model():
    torch.manual_seed(0)
    model = Transformer(NET, Parts(router=NullRouter))
    ids = torch.randint(0, 50, (4, 12))
    optimizer, pooled, losses = adamw(model, OptimConfig(lr=3e-3)), PooledCounts(), []
    for _ in range(15):
        optimizer.zero_grad()
        lm, routings = model.loss(ids[:, :-1], ids[:, 1:])
        found = Objective(NullLBL(), 0.1, 1e-4, 2)(lm, routings, pooled, 4)
        found.total.backward()
        optimizer.step()
        pooled.reset()
        losses.append(float(lm))
    assert losses[-1] < losses[0] - 0.3 and model.blocks[0].moe.router.weight.grad.any()


@pytest.mark.parametrize("nulls", [4, 8, 16])
def test_under_a_strong_loss_the_load_comes_to_k_n_over_n_plus_m(nulls):
    """From logits that hardly choose a null: columns are moved by nothing but the loss."""
    n, K, T = 8, 3, 500
    logits = torch.randn(T, n + nulls, generator=torch.Generator().manual_seed(0))
    shift = torch.cat((torch.zeros(n), torch.full((nulls,), -3.0))).requires_grad_()
    optimizer, loads = torch.optim.SGD([shift], lr=1.0), []
    for _ in range(200):
        z = logits + shift
        ids = z.detach().topk(K).indices
        ids = ids.where(ids < n, -1)
        loads.append(true_experts(ids).float().mean().item())
        optimizer.zero_grad()
        null_load_balancing_loss(z.softmax(-1), ids, nulls).backward()
        optimizer.step()
    assert loads[0] > 0.9 * K and loads[-1] == pytest.approx(K * n / (n + nulls), rel=0.02)


def test_an_empty_slot_stands_behind_the_true_experts():
    router = NullRouter(NET, nulls=NET.n_experts)
    empty_TK = router.choose(torch.rand(200, 2 * NET.n_experts)) < 0
    assert empty_TK.any() and not (empty_TK[:, :-1] & ~empty_TK[:, 1:]).any()
