"""Parts of one's own: nothing changes without them, empty slots cost and move nothing, gradients reach what was kept."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

from sigma_lite.balance.balancer import GlobalLBL, SequenceLBL
from sigma_lite.balance.losses import expert_counts, sequence_load_balancing_loss, top1_load_balancing_loss
from sigma_lite.balance.metrics import ExpertLoad
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ModelConfig
from sigma_lite.model import Parts, Router, Routing, Transformer, dispatch
from sigma_lite.model.attention import Attention
from sigma_lite.model.experts import Experts
from sigma_lite.model.weights import Weight

NET = ModelConfig(
    vocab_size=50, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=6, d_expert=8, top_k=2,
    router_init_std=0.5,
)  # fmt: skip


class Same(Router):
    """Today's router, written as a paper would write its own."""

    def choose(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.argsort(dim=-1, descending=True)[:, : self.top_k]


class Sparing(Router):
    """Even tokens keep no slot, every fourth from 1 on keeps its best only."""

    leaves_empty = True

    def choose(self, scores_TE: Tensor) -> Tensor:
        ids_TK = super().choose(scores_TE)
        ids_TK[::2] = -1
        ids_TK[1::4, 1:] = -1
        return ids_TK


class Wider(Router):
    """Three columns beyond those of the experts."""

    leaves_empty = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.n_experts + 3, config.d_model))
        self.register_buffer("bias", torch.zeros(config.n_experts + 3))
        self.n_experts = config.n_experts

    def choose(self, scores_TE: Tensor) -> Tensor:
        ids_TK = super().choose(scores_TE)
        return ids_TK.where(ids_TK < self.n_experts, -1)


class Scaled(Attention):
    """A part that owns a parameter, whose beginning it says."""

    def __init__(self, config: ModelConfig, begin: float = 1.0):
        super().__init__(config)
        self.scale = nn.Parameter(torch.empty(()))
        self.own_weights = {**self.own_weights, "scale": Weight(std=None)}
        self.begin = begin

    def forward(self, *args, **kwargs) -> Tensor:
        return super().forward(*args, **kwargs) * self.scale * self.begin


def made(parts: Parts = Parts(), net: ModelConfig = NET) -> Transformer:  # noqa: B008
    torch.manual_seed(0)
    return Transformer(net, parts)


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


def gradients(model: Transformer) -> dict[str, Tensor]:
    lm, routings = model.loss(*tokens())
    objective = Objective(GlobalLBL(), weight=0.1, z_weight=0.01, n_layers=NET.n_layers)
    objective(lm, routings, PooledCounts(), 3).total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "parts", [Parts(), Parts(router=Same), Parts(dispatch=dispatch.local)], ids=("default", "a subclass", "dispatch named")
)
def test_the_same_parts_are_bitwise_the_same_model(parts):
    """Weights, result and gradients; a part's code does not matter for what a parameter begins as, its name does."""
    plain, other = made(), made(parts)
    assert all(map(torch.equal, plain.state_dict().values(), other.state_dict().values()))
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(plain(tokens()[0]).logits, other(tokens()[0]).logits)
    one, two = gradients(plain), gradients(other)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_with_no_empty_slot_ragged_is_local():
    plain, ragged = made(), made(Parts(dispatch=dispatch.ragged))
    torch.testing.assert_close(plain(tokens()[0]).logits, ragged(tokens()[0]).logits)
    one, two = gradients(plain), gradients(ragged)
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=name)


@pytest.mark.parametrize("backend", ["loop", "grouped", "padded", "auto"])
def test_a_token_without_experts_gives_zero_and_passes_no_gradient(backend):
    block = made(Parts(router=Sparing)).blocks[0].moe
    block.experts.backend = backend
    x_BSD = torch.randn(2, 8, 16, requires_grad=True)
    y_BSD, routing = block(x_BSD)
    assert (routing.ids[::2] == -1).all() and (routing.gates[::2] == 0).all()
    assert (y_BSD.flatten(0, 1)[::2] == 0).all() and (y_BSD.flatten(0, 1)[1::2] != 0).any(-1).all()
    y_BSD.square().sum().backward()
    assert (x_BSD.grad.flatten(0, 1)[::2] == 0).all() and (x_BSD.grad.flatten(0, 1)[1::2] != 0).any(-1).all()
    assert block.router.weight.grad.any()


def test_ragged_is_each_token_with_the_experts_that_it_kept():
    """Slot by slot with the specification, whose ids are never empty; and the router's gradient of kept slots only."""
    moe = made(Parts(router=Sparing)).blocks[0].moe
    moe.experts.backend = "loop"
    x_TD = torch.randn(8, 16)
    routing = moe.router(x_TD)
    y_TD = dispatch.ragged(x_TD, routing, moe.experts)
    by_hand = torch.zeros(8, 16)
    for t in range(8):
        for slot in range(2):
            if routing.ids[t, slot] >= 0:
                one = x_TD[t, None], routing.ids[t, slot].view(1, 1), routing.gates[t, slot].view(1, 1)
                by_hand[t] = by_hand[t] + moe.experts(*one)[0]
    torch.testing.assert_close(y_TD, by_hand)
    found, expected = (
        torch.autograd.grad(y.square().sum(), moe.router.weight, retain_graph=True)[0] for y in (y_TD, by_hand)
    )
    torch.testing.assert_close(found, expected)


def test_no_token_with_an_expert():
    class Nobody(Router):
        leaves_empty = True

        def choose(self, scores_TE):
            return torch.full((len(scores_TE), self.top_k), -1)

    model = made(Parts(router=Nobody))
    lm, routings = model.loss(*tokens())
    assert lm.isfinite() and not expert_counts(routings[0].ids, 6).any()
    losses = Objective(GlobalLBL(), 0.1, 0.01, 2)(lm, routings, PooledCounts(), 3)
    losses.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_router_that_names_no_expert_and_does_not_say_so_is_an_error():
    silent = type("Silent", (Sparing,), {"leaves_empty": False})
    with pytest.raises((IndexError, RuntimeError)):
        made(Parts(router=silent))(tokens()[0])


# ------------------------------------------------------------------------------------------------------------- counting


def test_empty_slots_count_nowhere():
    ids = torch.tensor([[0, -1], [2, 0], [-1, -1]])
    assert expert_counts(ids, 3).tolist() == [2, 0, 1]
    assert expert_counts(torch.full((4, 1), -1), 3).tolist() == [0, 0, 0]


def test_losses_of_kept_slots_are_those_without_the_empty_ones():
    """One kept slot a token: as if K were 1."""
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs, best = logits.softmax(-1), logits.argmax(-1, keepdim=True)
    with_empty = torch.cat((best, torch.full_like(best, -1)), 1)
    for loss in (
        lambda ids: sequence_load_balancing_loss(probs, ids, 3),
        lambda ids: top1_load_balancing_loss(logits, ids, 0.3),
    ):
        one, two = loss(best), loss(with_empty)
        assert torch.equal(one, two)
        assert torch.equal(*(torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (one, two)))


def test_the_width_of_a_router_is_that_of_its_probabilities():
    """Losses see all columns, load tables the experts alone."""
    model = made(Parts(router=Wider))
    _, routings = model.loss(*tokens())
    assert {r.probs.shape[1] for r in routings} == {9} and model.bias_LE.shape == (2, 9)
    assert all(r.ids.max() < 6 for r in routings) and any((r.ids == -1).any() for r in routings)
    pooled = PooledCounts()
    losses = Objective(SequenceLBL(), 0.1, 0.01, 2)(torch.zeros(()), routings, pooled, 3)
    assert losses.total.isfinite() and pooled.counts_LE.shape == (2, 9) and not pooled.counts_LE[:, 6:].any()
    load = ExpertLoad(2, 6)
    load.update(routings)
    found = load.load()
    kept = torch.stack([torch.bincount(r.ids[r.ids >= 0], minlength=6) for r in routings])
    assert torch.equal(load.counts_LE, kept) and found["f"].shape == found["P"].shape == (2, 6)
    torch.testing.assert_close(found["P"], torch.stack([r.probs[:, :6].mean(0) for r in routings]))


# ---------------------------------------------------------------------------------------------------------- other parts


def test_attention_and_experts_of_ones_own():
    class Halved(Experts):
        def forward(self, x_TD, ids_TK, gates_TK):
            return super().forward(x_TD, ids_TK, gates_TK / 2)

    plain = made()
    as_scaled = made(Parts(attention=functools.partial(Scaled, begin=1.0)))
    assert torch.equal(plain(tokens()[0]).logits, as_scaled(tokens()[0]).logits)
    halved, x_BSD = made(Parts(experts=Halved)), torch.randn(1, 4, 16)
    torch.testing.assert_close(2 * halved.blocks[0].moe(x_BSD)[0], plain.blocks[0].moe(x_BSD)[0])
    assert Parts(attention=Scaled).custom == {"attention": Scaled} and not Parts().custom


def test_a_part_says_how_its_parameters_begin():
    class Silent(Router):
        def __init__(self, config):
            super().__init__(config)
            self.temperature = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="no module says how blocks.0.moe.router.temperature begins"):
        made(Parts(router=Silent))


def test_a_schedule_reaches_a_router_of_ones_own():
    model = made(Parts(router=Sparing), dataclasses.replace(NET, top_k=1))
    model.set_k([3, 1])
    assert [r.ids.shape[1] for r in model(tokens()[0]).routings] == [3, 1]


def test_a_routing_is_still_four_tensors():
    """Callers take it apart and put it together again."""
    assert Routing._fields == ("probs", "ids", "gates", "logits")


class ByLayer(Experts):
    """As many experts as its layer says."""

    def __init__(self, config: ModelConfig, layer: int = 0, more: int = 0):
        super().__init__(dataclasses.replace(config, n_experts=config.n_experts + layer + more))


def test_a_part_that_asks_is_told_its_layer():
    model = Transformer(NET, Parts(experts=functools.partial(ByLayer, more=2)))
    assert [len(block.moe.experts.w13) for block in model.blocks] == [8, 9]
    assert model.parts.experts.keywords == {"more": 2}, "what is recorded knows no layer"
    plain = Parts(router=Same)
    assert plain.of_layer(1) is plain
