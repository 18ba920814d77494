"""Compression: what must not change does not, what is left out is what does least, and bytes are those that are kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET, routed
from test_dense2moe import batch, logits

from sigma_lite.config import ConfigError
from sigma_lite.convert.calibrate import expert_bytes, expert_inputs
from sigma_lite.convert.distil import divergence
from sigma_lite.convert.rebuild import named_parts, units
from sigma_lite.convert.stored import KeptRouter, LowRank, Skipping, TopP, dequantise, packed, quantise, unpacked
from sigma_lite.kernels import grouped_swiglu
from sigma_lite.model import Transformer
from sigma_lite.model.parts import as_parts
from sigma_lite.papers.compression import (
    Factorise,
    Merge,
    Nucleus,
    Plain,
    Prune,
    Quantise,
    Skip,
    ToDense,
    aligned,
    use,
)

ROWS = [batch(0), batch(1)]
TOP1, TOP2 = (dataclasses.replace(NET, top_k=k) for k in (1, 2))


def model_of(net=TOP2, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(net).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.moe.experts.w2.mul_(10)  # experts that matter
    return model


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 4), (4, 0), (4, 8)])
def test_rounding_is_at_most_half_a_step(bits, group):
    w = torch.randn(3, 10, 16)
    w[0, 0] = 0
    integers, scale = quantise(w, bits, group)
    steps = scale.repeat_interleave(group or 16, -1)
    error = (dequantise(integers, scale) - w).abs()
    assert (error <= steps * 0.5001).all() and (error[0, 0] == 0).all()
    assert integers.abs().max() == 2 ** (bits - 1) - 1, "the largest of each group uses the whole range"


def test_two_numbers_in_a_byte():
    numbers = torch.randint(-8, 8, (5, 6), dtype=torch.int8)
    assert packed(numbers).shape == (5, 3) and packed(numbers).dtype == torch.uint8
    assert torch.equal(unpacked(packed(numbers)), numbers)


@pytest.mark.parametrize(
    ("surgery", "share", "far"),
    [
        (Quantise(bits=16), 1 / 2, 1e-4),
        (Quantise(bits=8), (16 * 16 + 16 * 4 + 16 * 8 + 16 * 4) / (384 * 4), 1e-4),
        (Quantise(bits=4), (16 * 8 + 16 * 4 + 16 * 4 + 16 * 4) / (384 * 4), 5e-2),
    ],
)
def test_quantised_experts_take_the_bytes_that_they_say(surgery, share, far):
    """An expert here is 16 x 16 and 16 x 8 numbers; scales are fp32, one a row."""
    model = model_of()
    small = surgery(model, ROWS)
    assert expert_bytes(small) == pytest.approx(share * expert_bytes(model), rel=1e-9)
    assert 0 < float(divergence(logits(small), logits(model))) < far
    again = Transformer(small.config, as_parts(named_parts(small.parts)))
    again.load_state_dict(small.state_dict())
    assert torch.equal(logits(again.eval()), logits(small))
    small.loss(batch().ids_BS, batch().targets_BS)[0].backward()
    assert small.blocks[0].moe.router.weight.grad.abs().max() > 0, "what is not rounded learns on"
    assert torch.equal(logits(Plain()(small, [])), logits(small))


def test_a_product_of_thin_matrices_is_the_nearest():
    """Eckart and Young: the squared error is the sum of the squared singular values that were left out."""
    model = model_of()
    full = Factorise(rank=8)(model, [])
    thin = Factorise(rank=3)(model, [])
    w13, w2 = model.blocks[0].moe.experts.w13.detach(), model.blocks[0].moe.experts.w2.detach()
    torch.testing.assert_close(full.blocks[0].moe.experts.weights()[1], w2, atol=1e-5, rtol=1e-5)
    for weight, found in zip((w13, w2), thin.blocks[0].moe.experts.weights(), strict=True):
        left_out = torch.linalg.svdvals(weight)[:, 3:].square().sum()
        assert (found - weight).square().sum().item() == pytest.approx(float(left_out), rel=1e-4)
    assert expert_bytes(thin) == 2 * 8 * 4 * 3 * (16 + 16 + 16 + 8), "8 experts of 2 layers"
    thin.loss(batch().ids_BS, batch().targets_BS)[0].backward()
    assert all(p.grad is not None for p in thin.blocks[0].moe.experts.parameters())
    assert isinstance(thin.blocks[0].moe.experts, LowRank) and torch.equal(logits(Plain()(thin, [])), logits(thin))


def test_scores_are_gate_times_norm_of_the_output():
    model = model_of()
    found = use(model, ROWS)
    want = torch.zeros(2, 8)
    for layers in expert_inputs(model, ROWS):
        for layer, (x_TD, routing) in enumerate(layers):
            experts = model.blocks[layer].moe.experts
            for t in range(len(x_TD)):
                for e, gate in zip(routing.ids[t].tolist(), routing.gates[t].tolist(), strict=True):
                    y = grouped_swiglu(x_TD[t : t + 1], torch.tensor([[0]]), torch.ones(1, 1), experts.w13[e][None],
                                       experts.w2[e][None], backend="loop")  # fmt: skip
                    want[layer, e] += gate * y.norm().item()
    torch.testing.assert_close(found.score, want, rtol=1e-4, atol=1e-6)
    assert found.tokens == 128 and found.count.sum(1).tolist() == [256, 256]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_experts_that_do_nothing_are_pruned_without_a_trace(scope):
    model = model_of()
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.weight[::2] = 0
            block.moe.router.bias[::2] = -5.0  # never chosen
    small = Prune(keep=0.5, scope=scope)(model, ROWS)
    assert expert_bytes(small) == expert_bytes(model) / 2
    for block, old in zip(small.blocks, model.blocks, strict=True):
        rows = {tuple(row) for row in block.moe.router.weight.tolist()}
        assert rows == {tuple(row) for row in old.moe.router.weight[1::2].tolist()}
    same = model_of()
    same.load_state_dict(model.state_dict())
    for block in same.blocks:
        block.moe.router.scores = lambda logits: logits.masked_fill(torch.arange(8) % 2 == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(logits(small), logits(same), atol=1e-5, rtol=1e-5)


def test_no_bias_chooses_an_expert_that_a_layer_does_not_have():
    """Such a column gets no token, so a loss-free bias lifts it for ever."""
    router = KeptRouter(NET, kept=[8, 5], layer=1)
    router.bias[5:] = 9.0
    assert int(routed(router).ids.max()) < 5


def test_global_pruning_takes_from_where_least_is_done():
    model = model_of()
    with torch.no_grad():
        model.blocks[0].moe.experts.w2[3:] *= 1e-3
    small = Prune(keep=0.5, scope="global")(model, ROWS)
    sizes = [len(block.moe.experts.w13) for block in small.blocks]
    assert sizes == [3, 5] or (sum(sizes) == 8 and sizes[0] == 3 < sizes[1])
    out = small(batch().ids_BS)
    assert all(int(r.ids.max()) < n and torch.isfinite(r.probs).all() for r, n in zip(out.routings, sizes, strict=True))
    assert float(out.routings[0].probs[:, 3:].max()) == 0
    again = Transformer(small.config, as_parts(named_parts(small.parts)))
    again.load_state_dict(small.state_dict())
    assert torch.equal(logits(again.eval()), logits(small))
    small.loss(batch().ids_BS, batch().targets_BS)[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())
    with pytest.raises(ConfigError, match="a layer has only 3"):
        small.set_k((4, 4))


def twins(shuffled: bool) -> Transformer:
    """Expert 2 i + 1 is expert 2 i, its units in another order, and is chosen for nearly the same tokens."""
    model = model_of()
    with torch.no_grad():
        for block in model.blocks:
            router, experts = block.moe.router, block.moe.experts
            router.weight[1::2] = router.weight[::2] * 0.999
            order = torch.randperm(8) if shuffled else torch.arange(8)
            gate, up = experts.w13[::2].chunk(2, 1)
            experts.w13[1::2] = torch.cat([gate[:, order], up[:, order]], 1)
            experts.w2[1::2] = experts.w2[::2][:, :, order]
    return model


def test_merging_what_is_the_same_changes_nothing():
    model = twins(shuffled=True)
    one = Merge(keep=0.5)(model, ROWS)
    torch.testing.assert_close(logits(one), logits(model), atol=1e-5, rtol=1e-5)
    assert float(divergence(logits(Merge(keep=0.5, align=False)(model, ROWS)), logits(model))) > 1e-4
    weights = sum(block.moe.experts.w13.numel() + block.moe.experts.w2.numel() for block in model.blocks)
    assert sum(p.numel() for block in one.blocks for p in block.moe.experts.parameters()) == weights / 2
    assert expert_bytes(one) == weights * 4 / 2 + 2 * 8 * 8, "and a table of 8 ids in each layer"
    assert torch.equal(logits(Plain()(one, [])), logits(one))


def test_merged_experts_are_weighted_by_their_use():
    """Twins of which one's output is three times the other's: what is merged lies between them where their tokens say."""
    model = twins(shuffled=False)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.experts.w2[1::2] *= 3
    merged, count_LE = Merge(keep=0.5)(model, ROWS), use(model, ROWS).count
    for layer, (block, was) in enumerate(zip(merged.blocks, model.blocks, strict=True)):
        for place, w2 in enumerate(block.moe.experts.w2):
            group = (block.moe.experts.place_E == place).nonzero()[:, 0]
            share = count_LE[layer, group].double() / count_LE[layer, group].sum()
            assert len(group) == 2 and share.min() > 0
            expected = (share[:, None, None] * was.moe.experts.w2[group].double()).sum(0)
            torch.testing.assert_close(w2.double(), expected, atol=1e-6, rtol=1e-5)


def test_units_are_aligned_by_likeness():
    w13, w2, order = torch.randn(16, 12), torch.randn(12, 8), torch.randperm(8)
    one = units(w13, w2)
    assert torch.equal(one[order][aligned(one, one[order])], one)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_two_choices_may_lead_to_one_network(backend):
    x, w13, w2 = torch.randn(5, 16), torch.randn(2, 16, 16), torch.randn(2, 16, 8)
    ids, gates = torch.ones(5, 2, dtype=torch.long), torch.rand(5, 2)
    both = grouped_swiglu(x, ids, gates, w13, w2, backend=backend)
    torch.testing.assert_close(both, grouped_swiglu(x, ids[:, :1], gates.sum(1, keepdim=True), w13, w2, backend="loop"))


def chosen(model: Transformer) -> float:
    """Experts per token, mean over layers."""
    with torch.no_grad():
        return torch.stack([(r.ids >= 0).float().sum(1).mean() for r in model(batch().ids_BS).routings]).mean().item()


def test_skipping_goes_from_all_choices_to_the_first():
    model = model_of(dataclasses.replace(NET, top_k=3))
    assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(logits(Skip(beta=0.0)(model, ROWS)), logits(model))
    torch.testing.assert_close(logits(Nucleus(p=1.0)(model, ROWS)), logits(model))
    few = Skip(beta=1.0)(model, ROWS), Nucleus(p=1e-6)(model, ROWS)
    first = model_of(dataclasses.replace(NET, top_k=1))
    for small in few:
        torch.testing.assert_close(logits(small), logits(first), msg="gates are not divided by their sum")
        assert chosen(small) == 1
    assert 1 < chosen(Nucleus(p=0.4)(model, ROWS)) < 3
    half = Skip()(model_of(), ROWS)
    assert chosen(half) == pytest.approx(1.5, abs=0.15), "the median ratio keeps every other second choice"


def test_a_dense_student_learns_from_the_experts():
    model = model_of()
    begun, taught = ToDense(experts=2, steps=0)(model, ROWS), ToDense(experts=2, steps=40, lr=5e-3)(model, ROWS)
    assert taught.config.n_experts == 1 and taught.config.d_expert == 16
    far, near = (float(divergence(logits(m), logits(model))) for m in (begun, taught))
    assert near < 0.6 * far and expert_bytes(taught) == expert_bytes(model) / 4


@pytest.mark.parametrize(
    ("surgery", "complaint"),
    [
        (Prune(keep=0.1), "keep=0.1 leaves 1 experts, and each token chooses 2"),
        (Prune(scope="globl"), "scope='globl': did you mean 'global'"),
        (Merge(keep=0.0), "keep=0.0: a share of the experts"),
        (Quantise(bits=5), "bits=5: choose from 4, 8, 16"),
        (Quantise(group=5), "group=5: must divide the rows of w13, which have 16 numbers"),
        (Factorise(rank=9), r"rank=9: must lie in 1\.\.8"),
        (Nucleus(p=0.0), "p=0.0: must lie in"),
        (Plain(), "only Quantised, LowRank, Mapped can be made usual experts"),
    ],
)
def test_what_cannot_be_compressed_says_why(surgery, complaint):
    with pytest.raises(ConfigError, match=complaint):
        surgery(model_of(), ROWS)


def test_one_thing_after_the_other():
    model = model_of()
    small = Quantise()(Prune(keep=0.5)(model, ROWS), ROWS)
    assert expert_bytes(small) < expert_bytes(model) / 5
    with pytest.raises(ConfigError, match="this model has its own experts"):
        Prune()(small, ROWS)
    with pytest.raises(ConfigError, match="one expert per token"):
        Skip()(model_of(TOP1), ROWS)


@pytest.mark.parametrize("router", [Skipping, TopP])
def test_a_bias_that_all_experts_share_drops_no_choice(router):
    made = router(TOP2)
    torch.nn.init.normal_(made.weight)
    x_TD = torch.randn(300, NET.d_model)
    before = made(x_TD).ids
    made.bias.fill_(0.3)
    assert (before < 0).any() and torch.equal(made(x_TD).ids, before)
