"""Routers and bias rules of other papers: laws that hold by construction, closed forms, and golden numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.dual import choose
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ConfigError, ModelConfig, OptimConfig
from sigma_lite.model import Parts, Router, Routing, Transformer
from sigma_lite.papers.adamoe import NullLBL, NullRouter, averaged, null_load_balancing_loss, true_experts
from sigma_lite.papers.alf import QuantileBalancing, histogram, quantile, wanted_bias
from sigma_lite.papers.fixed import Frozen
from sigma_lite.papers.moge import Grouped, device_loads, imbalance_score
from sigma_lite.train.optim import adamw

NET = ModelConfig(
    vocab_size=50, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8, top_k=4,
    router_init_std=0.5,
)  # fmt: skip


def routed(router: Router, T: int = 60, seed: int = 0) -> Routing:
    torch.manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(0, 0.5)
    return router(torch.randn(T, NET.d_model))


# ----------------------------------------------------------------------------------------------------------------- MoGE


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


# --------------------------------------------------------------------------------------------------------------- AdaMoE


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


# --------------------------------------------------------------------------------------------------------------- frozen


def test_a_frozen_router_begins_as_the_learned_one_and_no_step_moves_it():
    torch.manual_seed(0)
    plain = Transformer(NET)
    torch.manual_seed(0)
    frozen = Transformer(NET, Parts(router=Frozen))
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(plain(ids).logits, frozen(ids).logits)
    before = {name: weight.clone() for name, weight in frozen.named_parameters()}
    optimizer = adamw(frozen, OptimConfig(lr=1e-2))
    frozen.loss(ids, ids)[0].backward()
    optimizer.step()
    moved = {name for name, weight in frozen.named_parameters() if not torch.equal(weight, before[name])}
    assert before.keys() - moved == {f"blocks.{layer}.moe.router.weight" for layer in range(2)}


# --------------------------------------------------------------------------------------------------- quantile balancing


def scores(T: int, E: int = 96, kind: str = "sigmoid") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    logits = logits + torch.randn(E, generator=generator, dtype=torch.float64)
    return (logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)).float()


def as_routing(scores_TE: Tensor, bias_E: Tensor, K: int, kind: str) -> Routing:
    ids = (scores_TE + bias_E).topk(K).indices
    probs = scores_TE if kind == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
    logits = scores_TE.log() if kind == "softmax" else scores_TE.logit()
    chosen = scores_TE if kind == "softmax" else logits.sigmoid()
    return Routing(probs, ids, chosen.gather(1, ids), logits)


def off(scores_TE: Tensor, bias_E: Tensor, K: int = 1) -> int:
    return round((choose(scores_TE, bias_E, K).loads - len(scores_TE) * K / 96).abs().max().item())


@pytest.mark.parametrize(("kind", "first", "fifth"), [("sigmoid", 105, 23), ("softmax", 135, 58)])
def test_one_step_on_frozen_scores_balances_most(kind, first, fifth):
    """Largest |load - 100| of 9600 tokens and 96 experts: 1799, then `first`, and after five steps `fifth`.

    With exact quantiles the first step leaves 102 and 139.
    """
    s, balancer, bias, found = scores(9600, kind=kind), QuantileBalancing(kind), torch.zeros(1, 96), []
    for step in range(6):
        found.append(off(s, bias[0]))
        bias = balancer.next_bias(bias, balancer.statistics([as_routing(s, bias[0], 1, kind)]), step)
    assert found[0] == 1799 and bias.mean().abs() < 1e-6
    assert [found[1], found[5]] == pytest.approx([first, fifth], abs=5)


def test_statistics_of_four_micro_batches_are_those_of_one_to_the_bin():
    s, bias = scores(960), 0.1 * torch.randn(2, 96)
    balancer = QuantileBalancing("softmax")
    balancer.load_state_dict({"bias": bias})

    def of(rows: slice) -> Tensor:
        return balancer.statistics([as_routing(s.softmax(-1)[rows], b, 2, "softmax") for b in bias])

    whole, parts = of(slice(None)), [of(slice(start, start + 240)) for start in range(0, 960, 240)]
    assert whole.shape == (2, 96, 1001) and whole.dtype == torch.int64
    assert torch.equal(whole, torch.stack(parts).sum(0))
    assert (whole[..., :-1].sum(-1) == 960).all() and (whole[..., -1].sum(-1) == 1920).all()


def test_a_quantile_of_a_histogram_is_within_a_bin_of_the_exact_one():
    s, bias = scores(9600), 0.1 * torch.randn(96)
    wanted = wanted_bias(s, bias, 2)
    found = quantile(histogram(wanted, bias, 1000), torch.tensor(2 / 96), bias)
    width = float(bias.max() - bias.min() + 2) / 1000
    assert (found - torch.quantile(wanted, 2 / 96, dim=0)).abs().max() <= width


def test_what_a_token_wants_is_exact_where_it_chose_the_expert():
    """There the expert would have to fall to the K-th best of the others. Elsewhere it would have to beat it: more."""
    s, bias, K = scores(480), 0.1 * torch.randn(96), 2
    wanted, chosen = wanted_bias(s, bias, K), choose(s, bias, K).chosen
    for j in range(0, 96, 5):
        others = (s + bias).index_fill(1, torch.tensor([j]), -torch.inf)
        exact = others.topk(K).values[:, -1] - s[:, j]
        assert torch.equal(wanted[chosen[:, j], j], exact[chosen[:, j]])
        assert (wanted[~chosen[:, j], j] < exact[~chosen[:, j]]).all()


def test_its_bias_is_its_state_and_anothers_bias_is_learnt_first():
    s, balancer, bias = scores(960), QuantileBalancing("sigmoid"), torch.zeros(1, 96)
    pooled = balancer.statistics([as_routing(s, bias[0], 1, "sigmoid")])
    first = balancer.next_bias(bias, pooled, 0)
    again = QuantileBalancing("sigmoid")
    again.load_state_dict(balancer.state_dict())
    now = [b.statistics([as_routing(s, first[0], 1, "sigmoid")]) for b in (balancer, again)]
    assert torch.equal(*now) and torch.equal(
        *(b.next_bias(first, n, 1) for b, n in zip((balancer, again), now, strict=True))
    )
    branched = QuantileBalancing("sigmoid")
    assert branched.next_bias(first, pooled, 0) is None and torch.equal(branched.state_dict()["bias"], first)
    with pytest.raises(ConfigError, match="momentum of another balancer"):
        branched.load_state_dict({"momentum": first})


def test_scores_that_are_not_the_routers_are_refused():
    with pytest.raises(ConfigError, match="is not what this router chooses by"):
        QuantileBalancing("softmax").statistics([as_routing(scores(96), torch.zeros(96), 1, "sigmoid")])
    with pytest.raises(ConfigError, match="every token takes all"):
        QuantileBalancing("softmax").statistics([as_routing(scores(96).softmax(-1), torch.zeros(96), 96, "softmax")])
