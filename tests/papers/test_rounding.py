"""Token rounding: every load a multiple of the tile, at most half a tile from the tokens' choice, which comes first."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.losses import expert_counts
from sigma_lite.config import ConfigError
from sigma_lite.model import Router
from sigma_lite.papers.rounding import Rounded, rounded

SCORES = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)


@pytest.mark.parametrize("tile", [1, 8, 16])
@pytest.mark.parametrize("K", [1, 3])
def test_loads_are_the_nearest_multiples(tile, K):
    ids = SCORES.topk(K).indices
    before, after = expert_counts(ids, 8), rounded(SCORES, ids, tile).sum(0)
    assert (after % tile == 0).all() and ((after - before).abs() <= tile / 2).all()
    assert tile > 1 or torch.equal(after, before)


def test_choices_come_first_then_scores():
    ids = SCORES.topk(1).indices
    chosen, picked = rounded(SCORES, ids, 16), torch.zeros(200, 8, dtype=torch.bool).scatter_(1, ids, True)
    grew = chosen.sum(0) > picked.sum(0)
    assert grew.any() and (chosen.sum(0) < picked.sum(0)).any()
    for expert in range(8):
        mine, score = chosen[:, expert], SCORES[:, expert]
        if grew[expert]:
            added = mine & ~picked[:, expert]
            assert mine[picked[:, expert]].all() and score[added].min() >= score[~mine].max()
        else:
            dropped = picked[:, expert] & ~mine
            assert not (mine & ~picked[:, expert]).any()
            assert not dropped.any() or score[dropped].max() <= score[mine].min()


def test_a_load_above_the_batch_is_rounded_down():
    """All seven tokens to one expert, tiles of four: eight do not exist, so four."""
    scores = torch.tensor([[0.9, 0.1]]).repeat(7, 1)
    assert rounded(scores, scores.topk(1).indices, 4).sum(0).tolist() == [4, 0]


def test_in_evaluation_it_is_the_usual_router():
    one = dataclasses.replace(NET, top_k=1)
    router, usual = Rounded(one, tile=8), routed(Router(one))
    assert (expert_counts(routed(router).ids, 8) % 8 == 0).all()
    assert torch.equal(routed(router.eval()).ids, usual.ids) and torch.equal(routed(router).gates, usual.gates)
    with pytest.raises(ConfigError, match="tile=0"):
        Rounded(one, tile=0)
