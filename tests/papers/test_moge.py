"""Grouped routing: imbalance score 0 by construction, and what K and E it needs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET, routed

from sigma_lite.config import ConfigError
from sigma_lite.model import Parts, Router, Transformer
from sigma_lite.papers.moge import Grouped, device_loads, imbalance_score


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_group_gives_each_token_as_many_experts(groups):
    """Imbalance score 0, token by token; and inside a group they are its best."""
    routing = routed(Grouped(NET, groups=groups))
    size = NET.n_experts // groups
    for t in range(60):
        for m in range(groups):
            mine = routing.ids[t][routing.ids[t] // size == m]
            best = routing.probs[t, m * size : (m + 1) * size].topk(4 // groups).indices + m * size
            assert sorted(mine.tolist()) == sorted(best.tolist())
    assert imbalance_score(routing.ids, 8, groups) == 0
    assert device_loads(routing.ids, 8, groups).tolist() == [60 * 4 // groups] * groups
    assert torch.equal(routing.gates, routing.probs.gather(1, routing.ids)), "not renormalised"
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(60))


def test_the_usual_choice_is_imbalanced_and_one_group_is_the_usual_choice():
    usual, one = routed(Router(NET)), routed(Grouped(NET, groups=1))
    assert imbalance_score(usual.ids, 8, 4) > 0.1
    assert torch.equal(usual.ids, one.ids) and torch.equal(usual.gates, one.gates)
    assert imbalance_score(torch.zeros(5, 1, dtype=torch.int64), 8, 4) == 1


def test_with_64_experts_in_8_groups_the_usual_choice_is_never_even():
    """Pangu's own example: 16 tokens, 8 of 64 at random; mean 0.66, and 5 to 95 % of draws in 0.375 .. 1."""
    generator = torch.Generator().manual_seed(0)
    scores = [imbalance_score(torch.rand(16, 64, generator=generator).topk(8).indices, 64, 8) for _ in range(1000)]
    assert min(scores) > 0 and sum(scores) / 1000 == pytest.approx(0.66, abs=0.02)


def test_grouping_needs_a_multiple_of_the_groups():
    for change, words in (({"top_k": 1}, "cannot share out 1 experts"), ({"n_experts": 6}, "must divide n_experts=6")):
        with pytest.raises(ConfigError, match=words):
            Grouped(dataclasses.replace(NET, **change), groups=4)
    model = Transformer(NET, Parts(router=Grouped))
    with pytest.raises(ConfigError, match="cannot share out 2 experts per token"):
        model.set_k([4, 2])


def test_a_learned_scale_begins_as_none_and_learns():
    def with_scale(config):
        return Grouped(config, learned_scale=True)

    torch.manual_seed(0)
    plain = Transformer(NET, Parts(router=Grouped))
    torch.manual_seed(0)
    scaled = Transformer(NET, Parts(router=with_scale))
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(plain(ids).logits, scaled(ids).logits)
    scaled.loss(ids, ids)[0].backward()
    assert scaled.blocks[0].moe.router.scale.grad.any()


def test_the_first_of_a_token_is_its_best_in_whatever_group():
    router = Grouped(dataclasses.replace(NET, top_k=4), groups=4)
    scores_TE = torch.rand(50, NET.n_experts)
    ids_TK = router.choose(scores_TE)
    chosen_TK = scores_TE.gather(1, ids_TK)
    assert (chosen_TK[:, 0] == scores_TE.amax(1)).all() and (chosen_TK.diff(dim=1) <= 0).all()
