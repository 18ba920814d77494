"""What the solutions of chapters 8 to 10 claim. That they pass and mistakes are named: test_check.py."""

from __future__ import annotations

import torch

from sigma_lite.teach.exercises import chapter_08, chapter_09, chapter_10


def test_the_gradient_that_the_chapter_derives():
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    ids_TK, tau = logits_TE.topk(1).indices, 0.4
    p_TE = (logits_TE / tau).softmax(-1)
    fhat_E, pbar = p_TE.mean(0), p_TE.gather(1, ids_TK).mean()
    loss = 6 * fhat_E.square().sum() / pbar
    slope_TE = (2 * 6 * fhat_E - loss * torch.zeros_like(p_TE).scatter(1, ids_TK, 1.0)) / pbar
    by_hand = p_TE * (slope_TE - (p_TE * slope_TE).sum(1, keepdim=True)) / (9 * tau)
    torch.testing.assert_close(by_hand, chapter_08.gradient(logits_TE, ids_TK, tau))


def test_stages_hold_from_their_first_step_on():
    plan = [(0, (8, 4)), (5, (2,)), (9, ())]
    lists = [chapter_10.stages(step, plan, 3) for step in range(10)]
    assert lists == [(8, 4, 1)] * 5 + [(2, 1, 1)] * 4 + [(1, 1, 1)]


def test_spread_of_a_bias_that_always_moves_the_same_way():
    counts_NE = torch.tensor([[5, 3, 1]]).expand(4, 3)
    torch.testing.assert_close(chapter_09.spreads(counts_NE, 0.5), torch.tensor([1.0, 2.0, 3.0, 4.0]))
