"""Fewer blocks for each token: a mixture of blocks (Dense2MoE's third stage, 2510.09094), and what it has to beat.

The paper's, for a diffusion transformer: groups of neighbouring blocks, a router for each group that reads the picture's
tokens, their condition and the time, the best blocks of a group run, and a loss on the stream behind the group. Ours: for a
language model, so the choice is made token by token, from the token's stream before the group and nothing later; keys and
values of skipped blocks are made all the same (convert/blocks.py says why). Gates are 1, since the paper's are not told.
Confidence: text about the paper, no code of its authors is known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.convert.blocks import SkippedBlocks
from sigma_lite.convert.distil import distil, outputs
from sigma_lite.convert.rebuild import rebuilt
from sigma_lite.data.rows import Batch
from sigma_lite.model import Transformer


@dataclass(frozen=True)
class MixtureOfBlocks:
    """Of each group of neighbouring blocks every token runs only some, which a router of the group chooses.

    Distilled from the model as it was: its logits, and its stream behind each group. What a chosen block adds is not scaled,
    so with `kept = size` the model computes what it did before; a block's probability has a gradient all the same, through
    a factor that is always 1. Blocks and routers learn, embedding and head stay.
    """

    size: int = 2  # blocks of a group; divides the number of layers
    kept: int = 1  # of them, that each token runs; may change at any time, by model.stack.set_kept
    steps: int = 80
    lr: float = 1e-3
    balance: float = 1e-2  # weight of the mean LBL of the groups' routers: with 0 each may end up with the same block always
    seed: int = 0  # of the routers

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        require(model.parts.stack is None, "this model has its own stack: only plain blocks can be put into groups")
        stack = functools.partial(SkippedBlocks, size=self.size, kept=self.kept)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            few = rebuilt(model, parts=dataclasses.replace(model.parts, stack=stack))
        learns = [weight for weight in (*few.blocks.parameters(), *few.stack.parameters()) if weight.requires_grad]
        pairs = list(zip(few.stack.groups, model.blocks[self.size - 1 :: self.size], strict=True))
        routers = [group.router for group in few.stack.groups]
        distil(few, model, rows, self.steps, learns=learns, lr=self.lr, balance=self.balance, routers=routers, pairs=pairs)
        return few


@dataclass(frozen=True)
class DropBlocks:
    """Fewer blocks for every token: those that turn the stream least are left out, and the others distilled.

    What a mixture of blocks has to beat. A block's influence is 1 - the cosine of the streams before and behind it, mean
    over tokens (ShortGPT, 2403.03853).
    """

    keep: int = 2  # blocks that stay
    steps: int = 80
    lr: float = 1e-3

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        L, own = model.config.n_layers, model.parts.stack or model.config.attention_from_layer
        require(1 <= self.keep <= L, f"keep={self.keep}: must lie in 1..{L}, the number of blocks")
        require(not own, "only a model whose blocks are all alike and run one after another can lose some")
        places = sorted(block_influence(model, rows).topk(self.keep).indices.tolist())
        few = rebuilt(model, dataclasses.replace(model.config, n_layers=self.keep))
        for block, place in zip(few.blocks, places, strict=True):
            block.load_state_dict(model.blocks[place].state_dict())
        pairs = [(block, model.blocks[place]) for block, place in zip(few.blocks, places, strict=True)]
        learns = [weight for weight in few.blocks.parameters() if weight.requires_grad]
        distil(few, model, rows, self.steps, learns=learns, lr=self.lr, pairs=pairs)
        return few


@torch.no_grad()
def block_influence(model: Transformer, rows: Sequence[Batch]) -> Tensor:
    """1 - cosine of the streams before and behind each block, mean over all tokens of the rows: [L], 0..2."""
    require(bool(rows), "the influence of blocks is measured on rows: raise --rows")
    total, tokens = torch.zeros(len(model.blocks)), 0
    for batch in rows:
        _, (embedded_BSD, *behind) = outputs(model, batch, [model.embedding, *model.blocks])
        streams = [embedded_BSD, *(stream_BSD for stream_BSD, _ in behind)]
        turned = [1 - torch.cosine_similarity(a, b, dim=-1) for a, b in zip(streams, streams[1:], strict=False)]
        own_BS = torch.ones_like(batch.ids_BS, dtype=torch.bool) if batch.own_BS is None else batch.own_BS
        total += torch.stack([turn_BS[own_BS].sum() for turn_BS in turned])
        tokens += int(own_BS.sum())
    return total / tokens
