"""What parts of papers need beyond a choice: the tokens' ids, the layer's number, work once per token; what they assume."""

from __future__ import annotations

import torch
from torch import nn

from sigma_lite.config import ModelConfig
from sigma_lite.identity import identify
from sigma_lite.model import KeyValueCache, Parts, Router, Transformer
from sigma_lite.model.assumes import UNSAID, Assumes, assumed, together
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import slots

NET = ModelConfig(
    vocab_size=50, n_layers=3, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8, top_k=2
)


class Reader(Router):
    """Layer n sends token v to experts v + n and the next one."""

    reads_tokens = True

    def forward(self, x_TD, tokens_T):
        self.tokens_T = tokens_T
        return super().forward(x_TD)

    def choose(self, scores_TE):
        first_T = self.tokens_T + self.layer
        return torch.stack((first_T, first_T + 1), 1) % 8


def test_a_router_may_read_the_tokens_and_knows_its_layer():
    model, ids = Transformer(NET, Parts(router=Reader)), torch.arange(20).view(2, 10)
    for layer, routing in enumerate(model(ids).routings):
        assert torch.equal(routing.ids[:, 0], (ids.flatten() + layer) % 8)
    for routing in model.loss(ids, ids)[1]:
        assert routing.ids.shape == (20, 2)


def test_a_cache_hands_on_the_new_tokens_only():
    torch.manual_seed(0)
    model, ids = Transformer(NET, Parts(router=Reader)).eval(), torch.arange(20).view(2, 10)
    cache = [KeyValueCache() for _ in range(3)]
    whole = model(ids)
    pieces = [model(ids[:, part], cache=cache).logits for part in (slice(0, 4), slice(4, 5), slice(5, 10))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, atol=1e-5, rtol=1e-4)


class Halves(Router):
    """Even tokens have two experts, odd ones none."""

    leaves_empty = True

    def choose(self, scores_TE):
        return super().choose(scores_TE).where(torch.arange(len(scores_TE))[:, None] % 2 == 0, -1)


class OnceMore(nn.Module):
    """Adds the token itself, once."""

    def __init__(self, config):
        super().__init__()
        self.inner = Experts(config)

    def around(self, x_TD, routing, dispatch):
        return x_TD + dispatch(x_TD, routing, self.inner)


def test_what_works_once_per_token_does_so_whatever_the_number_of_its_experts():
    torch.manual_seed(0)
    model = Transformer(NET, Parts(router=Halves, experts=OnceMore))
    x, moe = torch.randn(1, 6, 16), model.blocks[0].moe
    y, routing = moe(x)
    plain = moe.dispatch(x[0], routing, moe.experts.inner)
    assert torch.equal(y[0], x[0] + plain) and (plain[1::2] == 0).all() and plain[::2].any(1).all()


def test_a_class_says_for_itself_what_it_assumes():
    class Silent(Router):
        pass

    class Speaks(Router):
        assumes = Assumes(k="1", causal="no")

    assert assumed(Router) == Assumes() and assumed(Silent) == assumed(len) == UNSAID
    assert together([Assumes(), assumed(Speaks), Assumes(state="a bias")]) == Assumes("1", "no", "a bias", "none")
    assert together([]) == Assumes() and together([UNSAID, Assumes(k="1")]).k == "not said; 1"
    before = identify(Speaks)
    Speaks.assumes = Assumes(k="2")
    assert identify(Speaks) == before, "words do not make it another run"


def test_slots_of_a_choice_are_best_first_and_end_in_empty_ones():
    chosen = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.1], [0.0, -2.0, 0.0]])
    assert slots(chosen, scores).tolist() == [[2, 0], [-1, -1], [1, -1]]
    assert slots(chosen[1:2], scores[1:2]).tolist() == [[-1]] and slots(chosen[:0], scores[:0]).shape == (0, 1)
