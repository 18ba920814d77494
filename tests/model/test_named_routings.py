"""A flat, named list of routings: attention heads may be experts too, and who means a layer's experts gets those."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn

from sigma_lite.balance.balancer import Balancer, GlobalLBL, SequenceLBL, WithBias, counts_of
from sigma_lite.balance.losses import load_balancing_loss, load_share, z_loss
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ConfigError, ModelConfig, OptimConfig
from sigma_lite.convert.blocks import SkippedBlocks
from sigma_lite.data.rows import Batch
from sigma_lite.loop import train
from sigma_lite.model import NamedRouting, Parts, Routing, Transformer, of_experts, of_others
from sigma_lite.papers.adamoe import NullLBL
from sigma_lite.papers.latency import LatencyCV, LatencyLBL
from sigma_lite.papers.moduleformer import HeadExperts, MutualInformation, StickBreaking, mutual_information_loss
from sigma_lite.papers.remoe import L1
from sigma_lite.papers.simbal import RoutingWithRows, SimBal, WithRows
from sigma_lite.serve.generate import Sampling, generate

NET = ModelConfig(
    vocab_size=50, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, n_experts=8, d_expert=16, top_k=2
)
HEADS = Parts(attention=functools.partial(HeadExperts, chosen=1))
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def model(parts: Parts = HEADS, net: ModelConfig = NET) -> Transformer:
    torch.manual_seed(0)
    return Transformer(net, parts)


def named(routings) -> list[str]:
    """Of experts the place says which layer's they are."""
    return [r.name if isinstance(r, NamedRouting) else f"layer {n} experts" for n, r in enumerate(routings)]


def test_a_plain_model_has_one_for_each_layer():
    routings = model(Parts())(IDS).routings
    assert named(routings) == ["layer 0 experts", "layer 1 experts", "layer 2 experts"]
    assert of_experts(routings) == routings and not of_others(routings)


def test_heads_stand_behind_the_experts_of_all_layers():
    """So [layer] is a layer's experts in any model; layers without attention choose no heads."""
    net = dataclasses.replace(NET, attention_from_layer=1)
    routings = model(net=net)(IDS).routings
    names = ["layer 0 experts", "layer 1 experts", "layer 2 experts", "layer 1 queries", "layer 2 queries"]
    assert named(routings) == names
    assert [tuple(r.probs.shape) for r in routings] == [(24, 8)] * 3 + [(24, 4)] * 2
    assert named(of_experts(routings)) == names[:3] and named(of_others(routings)) == names[3:]


def test_the_choice_is_that_of_the_same_attention_without_a_name():
    """Same weights, same logits; a head that is in no routing has gate 0."""
    named, plain = model(), model(Parts(attention=functools.partial(StickBreaking, chosen=1)))
    named_out, attention = named(IDS), named.blocks[0].attention
    assert torch.equal(named_out.logits, plain(IDS).logits)
    x_BSD = named.blocks[0].attention_norm(named.embedding(IDS))
    gates_TH = attention.gates(x_BSD).flatten(0, 1)
    heads = of_others(named_out.routings)[0]
    assert torch.equal(gates_TH.gather(1, heads.ids), heads.gates) and int((gates_TH > 0).sum()) == len(gates_TH)


def test_the_objective_sums_over_both_choices_of_a_layer():
    """ModuleFormer's: weight * sum over attention and feed-forward modules; the LBL that is shown stays the experts'."""
    made = model()
    lm, routings = made.loss(IDS, IDS)
    pooled = PooledCounts()
    losses = Objective(MutualInformation(), 0.5, 0.25, n_layers=3)(lm, routings, pooled, 2)
    each = torch.stack([mutual_information_loss(r.probs) for r in routings])
    z = torch.stack([z_loss(r.logits) for r in routings])
    torch.testing.assert_close(losses.total, lm + 0.5 * each.sum() + 0.25 * z.sum())
    torch.testing.assert_close(losses.terms["balance"], each.sum() / 3)
    lbl = torch.stack([load_balancing_loss(r.probs, r.ids) for r in of_experts(routings)]).mean()
    torch.testing.assert_close(losses.lbl, lbl)
    assert pooled.counts_LE.shape == (3, 8)
    (0.5 * losses.terms["balance"]).backward()
    assert all(block.attention.router.weight.grad.any() for block in made.blocks), "balance reaches the heads' routers"


class Remembers(Balancer):
    def losses(self, routings, f_LE, n_rows):
        self.seen = [(name, f) for name, f in zip(named(routings), f_LE, strict=True)]
        return super().losses(routings, f_LE, n_rows)


def test_loads_of_heads_are_pooled_over_micro_batches_too():
    made, balancer, pooled = model(), Remembers(), PooledCounts()
    objective = Objective(balancer, 0.1, 0.0, n_layers=3)
    found = [made.loss(ids, ids) for ids in (IDS, IDS.flip(0, 1))]
    for lm, routings in found:
        objective(lm, routings, pooled, 2)
    for place, (name, f_E) in enumerate(balancer.seen):
        counted = sum(counts_of([routings[place]])[0] for _, routings in found)
        assert torch.equal(f_E, load_share(counted)), name
    assert torch.equal(pooled.statistics, sum(counts_of(of_experts(routings)) for _, routings in found))


@pytest.mark.parametrize("balancer", [GlobalLBL(), SequenceLBL(), WithBias(GlobalLBL(), "sign")], ids=repr)
def test_the_plain_loop_trains_it(balancer):
    """A bias moves the experts' routers; losses see the heads."""
    made, objective = model(), Objective(balancer, 0.1, 1e-4, n_layers=3)
    before = [block.attention.router.weight.clone() for block in made.blocks]
    empty = torch.zeros(2, dtype=torch.int64)
    batch = Batch(IDS, IDS.roll(-1, 1), torch.zeros_like(IDS), empty, torch.ones_like(IDS), torch.zeros_like(IDS))
    steps = list(train(made, [batch] * 2, objective, OptimConfig(warmup_steps=0), steps=2))
    assert len(steps) == 2 and steps[-1].losses[-1].total.isfinite()
    assert all(not torch.equal(b.attention.router.weight, w) for b, w in zip(made.blocks, before, strict=True))
    assert made.bias_LE.shape == (3, 8) and made.bias_LE.any() == isinstance(balancer, WithBias)


def test_a_text_that_is_written_reports_layers_only():
    (written,) = generate(model().eval(), [[1, 2, 3]], max_new_tokens=2, seeds=[0], sampling=Sampling(), experts=True)
    assert [tuple(ids.shape) for ids in written.experts] == [(4, 2)] * 3


def test_a_token_that_skips_a_block_skips_its_heads_too():
    net = dataclasses.replace(NET, n_layers=4)
    routings = model(dataclasses.replace(HEADS, stack=SkippedBlocks), net)(IDS).routings
    assert named(routings)[3:5] == ["layer 3 experts", "layer 0 queries"]
    for experts, heads in zip(routings[:4], routings[4:], strict=True):
        assert torch.equal(experts.ids[:, 0] < 0, heads.ids[:, 0] < 0) and (heads.ids < 0).any()


def test_a_routing_that_holds_more_keeps_it():
    routings = model(Parts(router=WithRows))(IDS).routings
    assert all(isinstance(r, RoutingWithRows) for r in routings)
    assert SimBal().losses(routings, torch.zeros(3, 8), 2).isfinite().all()


def test_a_skipped_block_leaves_what_a_routing_holds():
    net = dataclasses.replace(NET, n_layers=4)
    routings = model(Parts(router=WithRows, stack=SkippedBlocks), net)(IDS).routings
    assert (routings[3].ids < 0).any() and all(isinstance(r, RoutingWithRows) for r in routings)
    assert SimBal().losses(routings, torch.zeros(4, 8), 2).isfinite().all()


def test_each_changes_the_tensors_and_keeps_the_name():
    routing = model()(IDS).routings[-1]
    first = routing.each(lambda t: t[:5])
    assert first.name == "layer 2 queries" and [len(t) for t in first] == [5] * 4


OF_EXPERTS = (NullLBL(nulls=2), LatencyLBL(), LatencyCV(), L1(start=0.5), SimBal())


@pytest.mark.parametrize("balancer", OF_EXPERTS, ids=repr)
def test_a_loss_about_experts_is_the_usual_one_for_heads(balancer):
    """No head is a null expert, has a latency, is gated by a ReLU, or shows its router's rows."""
    heads = model()(IDS).routings[-1]
    f_H = load_share(counts_of([heads])[0])
    weight = balancer.coefficient if isinstance(balancer, L1) else 1.0
    torch.testing.assert_close(balancer.loss(heads, f_H), weight * load_balancing_loss(heads.probs, heads.ids, f_H))


class Keys(NamedRouting):
    of = "keys"


class Twice(nn.Module):
    """Attention that makes two choices."""

    def __init__(self, config):
        super().__init__()
        self.inner = HeadExperts(config)

    def forward(self, *given):
        y_BSD, heads = self.inner(*given)
        return y_BSD, heads, Keys(*heads)


def test_a_block_may_return_several():
    routings = model(Parts(attention=Twice))(IDS).routings
    assert named(routings)[3:5] == ["layer 0 queries", "layer 0 keys"] and len(routings) == 9


class Plain(Twice):
    def forward(self, *given):
        y_BSD, heads = self.inner(*given)
        return y_BSD, Routing(*heads)


def test_attention_that_does_not_say_what_it_chose_is_refused():
    with pytest.raises(ConfigError, match="Plain returned a plain Routing.*subclass of NamedRouting"):
        model(Parts(attention=Plain))(IDS)
