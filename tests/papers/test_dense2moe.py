"""Dense2MoE: all experts with gate 1 are the dense model, whatever ranks the units; K may be anything from 0 on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET

from sigma_lite.config import ConfigError
from sigma_lite.convert.distil import feature_losses
from sigma_lite.data.rows import Batch
from sigma_lite.model import Transformer
from sigma_lite.papers.dense2moe import Dense2MoE, TaylorSplit, Upcycle, importance, set_k, taylor_importance

DENSE = dataclasses.replace(NET, n_experts=1, top_k=1, d_expert=32)


def batch(seed: int = 0, rows: int = 4, S: int = 16) -> Batch:
    ids = torch.randint(0, NET.vocab_size, (rows, S + 1), generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(rows, S, dtype=torch.long)
    return Batch(ids[:, :-1], ids[:, 1:], zeros, zeros.to(torch.uint8), zeros.int() + 1, zeros[:, 0] - 1)


def dense(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(DENSE).eval()


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(batch().ids_BS).logits


@pytest.mark.parametrize("by", ["taylor", "magnitude", "random"])
def test_all_experts_with_gate_one_are_the_dense_model(by):
    model = dense()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    split = TaylorSplit(experts=6, shared=2, by=by)(model, [batch()])
    set_k(split, 6)
    assert (logits(split) - logits(model)).abs().max() > 1e-4, "a router that is not flat gives other gates"
    for block in split.blocks:
        torch.nn.init.zeros_(block.moe.router.weight)  # every gate is 1 / 6, and w2 is 6 times as large
    torch.testing.assert_close(logits(split), logits(model), atol=1e-5, rtol=0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_every_unit_goes_to_one_place_and_the_best_are_shared():
    model = dense()
    split = TaylorSplit(experts=6, shared=2)(model, [batch()])
    ranks_LF = taylor_importance(model, [batch()])
    for layer, block in enumerate(split.blocks):
        experts, old = block.moe.experts, model.blocks[layer].moe.experts.w2[0]
        columns = torch.cat([experts.shared.w2[0], *(experts.routed.w2 / 6)], 1)
        place = (columns.T[:, None] - old.T).abs().sum(-1).argmin(1)
        assert sorted(place.tolist()) == list(range(32))
        assert set(place[:8].tolist()) == set(ranks_LF[layer].topk(8).indices.tolist())


def test_taylor_importance_is_the_slope_of_shrinking_a_unit():
    model = dense().double()
    found_LF = taylor_importance(model, [batch()])
    loss = lambda: model.loss(batch().ids_BS, batch().targets_BS)[0]  # noqa: E731
    experts, unit, h = model.blocks[1].moe.experts, 5, 1e-6
    moved = []
    for sign in (1, -1):
        saved = {name: weight.detach().clone() for name, weight in experts.named_parameters()}
        with torch.no_grad():
            for row in (unit, 32 + unit):
                experts.w13[0, row] *= 1 + sign * h
            experts.w2[0, :, unit] *= 1 + sign * h
        moved.append(loss().item())
        experts.load_state_dict(saved)
    assert float(found_LF[1, unit]) == pytest.approx(abs(moved[0] - moved[1]) / (2 * h), rel=1e-4)


def test_with_k_0_the_shared_expert_works_alone():
    split = TaylorSplit(experts=6, shared=2)(dense(), [batch()])
    set_k(split, 0)
    alone = logits(split)
    for block in split.blocks:
        torch.nn.init.zeros_(block.moe.experts.routed.w2)
    set_k(split, 3)
    torch.testing.assert_close(logits(split), alone)
    with pytest.raises(ConfigError, match=r"k=7: must lie in 0\.\.6"):
        set_k(split, 7)


def test_distillation_brings_it_nearer_and_leaves_the_rest_alone():
    from sigma_lite.convert.distil import divergence

    model, rows = dense(), [batch(n) for n in range(4)]
    with torch.no_grad():
        model.blocks[0].moe.experts.w2.mul_(4)  # a layer that matters
    plain = TaylorSplit(experts=6, shared=2)(model, rows)
    taught = Dense2MoE(experts=6, shared=2, shared_steps=8, routed_steps=24, lr=5e-3)(model, rows)
    far, near = (float(divergence(logits(m), logits(model))) for m in (plain, taught))
    assert near < 0.7 * far
    moved = {n for n, w in taught.state_dict().items() if not torch.equal(w, plain.state_dict()[n])}
    assert moved and all(".moe.experts." in name or ".moe.router.weight" in name for name in moved)
    assert taught.blocks[0].moe.router.weight.requires_grad and taught.embedding.weight.requires_grad


def test_streams_weigh_as_much_as_the_logits_and_large_ones_are_held_down():
    """w_l = main / mse_l * (sum of norms) / (L norm_l), and w has no gradient."""
    teacher = [torch.full((2, 4), norm / 8**0.5) for norm in (1.0, 2.0, 5.0)]
    student = [(t * (1.1 + n)).requires_grad_() for n, t in enumerate(teacher)]
    main = torch.tensor(0.3)
    found = feature_losses(student, teacher, main)
    assert found.item() == pytest.approx(0.3 * sum(8 / (3 * norm) for norm in (1, 2, 5)) / 3)
    found.backward()
    for s, t, norm in zip(student, teacher, (1, 2, 5), strict=True):
        weight = 0.3 / (s - t).square().mean() * 8 / (3 * norm)
        torch.testing.assert_close(s.grad, (weight * 2 * (s - t) / s.numel() / 3).detach())
    alike = [torch.randn(3, 5) for _ in range(4)]
    alike = [t / t.norm() for t in alike]
    assert feature_losses([2 * t for t in alike], alike, main).item() == pytest.approx(0.3), "one norm: as much as main"


@pytest.mark.parametrize("k", [1, 2])
def test_copies_are_the_dense_model_until_units_are_fresh(k):
    model = dense()
    same = Upcycle(experts=4, top_k=k, fresh=0)(model, [])
    if k == 1:
        for block in same.blocks:
            torch.nn.init.zeros_(block.moe.router.weight)
    torch.testing.assert_close(logits(same), logits(model), atol=1e-5, rtol=0)
    other = Upcycle(experts=4, top_k=k, fresh=0.5)(model, [])
    experts, old = other.blocks[0].moe.experts, model.blocks[0].moe.experts
    kept = [(w == old.w13[0]).all(1)[:32] for w in experts.w13]
    assert all(int(units.sum()) == 16 for units in kept) and not torch.equal(kept[0], kept[1])


def test_equal_copies_stay_equal_and_fresh_units_let_the_router_learn():
    """Symmetry: with equal copies no gate matters, so the router's gradient is 0."""

    def slope(fresh: float) -> float:
        many = Upcycle(experts=4, top_k=2, fresh=fresh)(dense(), [])
        many.loss(batch().ids_BS, batch().targets_BS)[0].backward()
        return float(many.blocks[0].moe.router.weight.grad.abs().max())

    assert slope(0) < 1e-6 < 1e-4 < slope(0.5)


@pytest.mark.parametrize(
    ("surgery", "complaint"),
    [
        (TaylorSplit(experts=5, shared=2), "d_expert=32 units cannot be dealt to 2 \\+ 5 experts"),
        (TaylorSplit(by="tailor"), "by='tailor': did you mean 'taylor'"),
        (TaylorSplit(experts=0), "experts=0: must be at least 1"),
        (Upcycle(fresh=2.0), "fresh=2.0: must lie in 0..1"),
    ],
)
def test_what_cannot_be_split_says_why(surgery, complaint):
    with pytest.raises(ConfigError, match=complaint):
        surgery(dense(), [batch()])


def test_a_model_of_experts_is_not_split():
    with pytest.raises(ConfigError, match="only a dense model can be split, this one has 8 experts"):
        TaylorSplit()(Transformer(NET), [batch()])
    assert importance(dense(), [], "random", 3).equal(importance(dense(), [], "random", 3))
