"""What the solutions of chapters 4, 8, 9 and 11 claim. That they pass and mistakes are named: test_check.py."""

from __future__ import annotations

import pytest
import torch

from sigma_lite.config import ModelConfig
from sigma_lite.model.router import Router
from sigma_lite.teach.exercises import chapter_04, chapter_08, chapter_09, chapter_11


@pytest.mark.parametrize("k", [1, 2, 6])
def test_the_gradient_that_the_chapter_derives(k):
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    ids_TK, tau = logits_TE.topk(k).indices, 0.4
    p_TE = (logits_TE / tau).softmax(-1)
    fhat_E, pbar = p_TE.mean(0), p_TE.gather(1, ids_TK).sum(1).mean()
    loss = 6 * fhat_E.square().sum() / pbar
    slope_TE = (2 * 6 * fhat_E - loss * torch.zeros_like(p_TE).scatter(1, ids_TK, 1.0)) / pbar
    by_hand = p_TE * (slope_TE - (p_TE * slope_TE).sum(1, keepdim=True)) / (9 * tau)
    torch.testing.assert_close(by_hand, chapter_08.gradient(logits_TE, ids_TK, tau))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bounds_of_the_top1_loss_that_the_chapter_proves(k):
    """1 for balanced and sure, E / K for flat, E for all sure of one expert, whatever K is."""
    E = 8
    sure = torch.full((E, E), -60.0)
    for token in range(E):
        sure[token, [(token + i) % E for i in range(k)]] = 0.0
    values = {"sure": sure, "flat": torch.zeros(E, E), "collapsed": 60.0 * torch.eye(E)[:1].expand(E, E)}
    losses = {name: chapter_08.pooled(logits[None], k).item() for name, logits in values.items()}
    assert losses == pytest.approx({"sure": 1, "flat": E / k, "collapsed": E}, rel=1e-4)


def test_stages_hold_from_their_first_step_on():
    plan = [(0, (8, 4)), (5, (2,)), (9, ())]
    lists = [chapter_11.stages(step, plan, 3) for step in range(10)]
    assert lists == [(8, 4, 1)] * 5 + [(2, 1, 1)] * 4 + [(1, 1, 1)]


def test_spread_of_a_bias_that_always_moves_the_same_way():
    counts_NE = torch.tensor([[5, 3, 1]]).expand(4, 3)
    torch.testing.assert_close(chapter_09.spreads(counts_NE, 0.5), torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("k", [1, 3])
def test_the_router_that_readers_write_is_the_packages(k):
    package = Router(ModelConfig(n_experts=6, d_model=8, top_k=k))
    x_TD, weight_ED = torch.randn(5, 8), torch.randn(6, 8)
    wanted = torch.func.functional_call(package, {"weight": weight_ED}, x_TD)
    gates_TK, ids_TK = chapter_04.router(x_TD, weight_ED, k)
    torch.testing.assert_close(gates_TK, wanted.gates)
    torch.testing.assert_close(chapter_04.gates(wanted.logits, k), wanted.gates)
    assert torch.equal(ids_TK, wanted.ids)


def test_a_fair_gap_bounds_who_can_be_reached():
    """An expert further below the top bias than the fair gap gets fewer tokens than a fair share."""
    score_TE = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    bias_E = torch.zeros(5)
    gap = chapter_09.fair_gap(score_TE, bias_E + torch.tensor([1e-9, 0, 0, 0, 0]))
    bias_E[0] = gap + 1e-4
    counts_E = torch.bincount(chapter_09.choose(score_TE, bias_E)[0], minlength=5)
    assert (counts_E[1:] < 40 / 5).all()
