"""Fewer blocks a token: all of them are the model itself, as many run as it says, routers learn, caches have no holes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET
from test_dense2moe import batch

from sigma_lite.config import ConfigError
from sigma_lite.convert.distil import divergence, outputs
from sigma_lite.model import KeyValueCache, Transformer
from sigma_lite.papers.blocks import DropBlocks, MixtureOfBlocks, block_influence
from sigma_lite.papers.compression import Quantise
from sigma_lite.papers.dense2moe import TaylorSplit

DEEP = dataclasses.replace(NET, n_layers=4)
ROWS = [batch(n) for n in range(4)]


def model_of(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(dataclasses.replace(DEEP, **changes)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.moe.experts.w2.mul_(8)  # blocks that matter
    return model


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    return model(batch().ids_BS).logits


def grouped(model: Transformer, **settings) -> Transformer:
    return MixtureOfBlocks(**{"steps": 0, **settings})(model, ROWS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_blocks_are_the_model_exactly(size):
    model = model_of()
    few = grouped(model, size=size, kept=size)
    assert torch.equal(logits(few), logits(model))
    if size > 1:
        few.stack.set_kept(1)
        assert (logits(few) - logits(model)).abs().max() > 0.01
        few.stack.set_kept(size)
        assert torch.equal(logits(few), logits(model))


@pytest.mark.parametrize(("size", "kept"), [(2, 1), (4, 1), (4, 3)])
def test_every_token_runs_so_many_blocks_of_each_group(size, kept):
    few = grouped(model_of(), size=size, kept=kept)
    with torch.no_grad():
        (_, routings), found = outputs(few, batch(), few.stack.groups)
    runs_TL = torch.stack([(routing.ids >= 0).any(1) for routing in routings], 1)
    assert (runs_TL.view(-1, 4 // size, size).sum(2) == kept).all()
    assert runs_TL.float().mean(0).min() < 1 and len(runs_TL.unique(dim=0)) > 1, "tokens differ in what they run"
    for group, (_, _, choice) in enumerate(found):
        there = runs_TL[:, group * size : (group + 1) * size].nonzero()[:, 1].view(-1, kept)
        assert torch.equal(there, choice.ids.sort(dim=1).values)


def test_a_skipped_block_leaves_the_stream_as_it_is():
    """A token that skips a block has behind it what it had before, and one that runs it has what the block alone gives."""
    model = model_of()
    few = grouped(model, size=4, kept=1)
    with torch.no_grad():
        few.stack.groups[0].router.weight.zero_()
        few.stack.groups[0].router.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))  # every token: block 2 alone
        _, ((stream, *_),) = outputs(few, batch(), few.stack.groups)
        shallow = Transformer(dataclasses.replace(DEEP, n_layers=1)).eval()
        shallow.blocks[0].load_state_dict(model.blocks[2].state_dict())
        shallow.embedding.load_state_dict(model.embedding.state_dict())
        _, ((alone, _),) = outputs(shallow, batch(), shallow.blocks)
    assert torch.equal(stream, alone)


def test_gradients_reach_the_router_of_each_group():
    few = grouped(model_of())
    few.loss(batch().ids_BS, batch().targets_BS)[0].backward()
    for group in few.stack.groups:
        assert group.router.weight.grad.norm() > 1e-4


def test_no_token_looks_ahead_and_a_cache_has_no_holes():
    few = grouped(model_of())
    ids = batch().ids_BS
    with torch.no_grad():
        whole = few(ids).logits
        torch.testing.assert_close(few(ids[:, :7]).logits, whole[:, :7], atol=1e-5, rtol=0)
        caches = [KeyValueCache() for _ in few.blocks]
        steps = [few(ids[:, at : at + 1], cache=caches).logits for at in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


def test_distillation_brings_it_nearer_and_keeps_every_block_in_use():
    model = model_of()
    plain, taught = (grouped(model, steps=steps, lr=3e-3) for steps in (0, 30))
    far, near = (float(divergence(logits(few).flatten(0, 1), logits(model).flatten(0, 1))) for few in (plain, taught))
    assert near < 0.8 * far
    assert torch.equal(taught.embedding.weight, model.embedding.weight)
    with torch.no_grad():
        routings = taught(batch().ids_BS).routings
    shares = [float((routing.ids >= 0).any(1).float().mean()) for routing in routings]
    assert min(shares) > 0.05, shares
    assert sum(shares) == pytest.approx(2)


def test_it_follows_a_split_and_precedes_rounding():
    """Parts of other surgeries stay: the groups are of whatever blocks there are."""
    split = TaylorSplit(experts=6, shared=2)(model_of(n_experts=1, top_k=1, d_expert=32), ROWS)
    few = grouped(split, kept=2)
    torch.testing.assert_close(logits(few), logits(split))
    rounded = Quantise(8)(grouped(model_of()), ROWS)
    assert (logits(rounded) - logits(grouped(model_of()))).abs().max() < 0.5 and rounded.stack is not None


def test_the_block_that_does_nothing_is_dropped():
    model = model_of()
    with torch.no_grad():
        model.blocks[1].attention.out.weight.zero_()
        model.blocks[1].moe.experts.w2.zero_()
    influence_L = block_influence(model, ROWS)
    assert influence_L[1] < 1e-6 < influence_L[[0, 2, 3]].min()
    torch.testing.assert_close(logits(DropBlocks(keep=3, steps=0)(model, ROWS)), logits(model), atol=1e-5, rtol=0)
    plain, taught = (DropBlocks(keep=2, steps=steps, lr=3e-3)(model_of(), ROWS) for steps in (0, 30))
    far, near = (float(divergence(logits(few).flatten(0, 1), logits(model_of()).flatten(0, 1))) for few in (plain, taught))
    assert near < 0.9 * far


@pytest.mark.parametrize(
    ("surgery", "complaint"),
    [
        (MixtureOfBlocks(size=3), r"size=3: groups must divide the 4 blocks; choose from \[1, 2, 4\]"),
        (MixtureOfBlocks(kept=3), r"kept=3: must lie in 1\.\.2"),
        (DropBlocks(keep=5), r"keep=5: must lie in 1\.\.4"),
    ],
)
def test_what_cannot_be_grouped_says_why(surgery, complaint):
    with pytest.raises(ConfigError, match=complaint):
        surgery(model_of(), ROWS)
    with pytest.raises(ConfigError, match="has its own stack"):
        grouped(grouped(model_of()))
