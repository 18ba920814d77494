"""Groups of neighbouring blocks, of which each token runs only some: the Mixture of Blocks of Dense2MoE (2510.09094)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import KeyValueCache, Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.attention import Allowed
from sigma_lite.model.block import Block
from sigma_lite.model.rotary import Rotation


class SkippedBlocks(nn.Module):
    """The blocks in groups of `size`; a router per group chooses, token by token, the `kept` that run.

    A skipped block leaves the token's stream as it is. Its keys and values are made all the same: later tokens may run
    that block, and look at them; so a cache has no holes, and a text is read in one pass as it is written token by token.
    Nothing is saved here, a skipped block is computed and dropped; what skipping would save is counted (`multiplied`).
    """

    assumes = Assumes(parameters="a router per group of blocks")

    def __init__(self, config: ModelConfig, size: int = 2, kept: int = 1):
        super().__init__()
        L = config.n_layers
        fits = [n for n in range(1, L + 1) if L % n == 0]
        require(size in fits, f"size={size}: groups must divide the {L} blocks; choose from {fits}")
        require(1 <= kept <= size, f"kept={kept}: must lie in 1..{size}, the blocks of a group")
        own = {"n_experts": size, "top_k": kept, "renormalise": False, "router_score": "softmax"}
        shape = dataclasses.replace(config, **own)  # to a group's router, blocks are experts
        self.size, self.groups = size, nn.ModuleList(Group(shape) for _ in range(L // size))

    def forward(
        self,
        blocks: Sequence[Block],
        x_BSD: Tensor,
        angles: Rotation,
        mask_BSS: Allowed,
        caches: Sequence[KeyValueCache] | None,
        ids_BS: Tensor,
    ) -> tuple[Tensor, list[Routing]]:
        blocks, routings = list(blocks), []
        for first, group in zip(range(0, len(blocks), self.size), self.groups, strict=True):
            own = slice(first, first + self.size)
            x_BSD, found, _ = group(blocks[own], x_BSD, angles, mask_BSS, caches and caches[own], ids_BS)
            routings += found
        return x_BSD, routings

    def set_kept(self, kept: int) -> None:
        """Blocks of each group that run, from now on; `size`: the model is as if there were no groups."""
        require(1 <= kept <= self.size, f"kept={kept}: must lie in 1..{self.size}, the blocks of a group")
        for group in self.groups:
            group.router.set_k(kept)


class Group(nn.Module):
    """Neighbouring blocks and their router, which reads the stream, normalised, before the first of them."""

    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.router = Router(shape)

    def forward(self, blocks, x_BSD: Tensor, angles: Rotation, mask_BSS: Allowed, caches, ids_BS: Tensor):
        """(stream, the blocks' routings, which blocks run as a `Routing` over them)."""
        choice = self.router(F.rms_norm(x_BSD, x_BSD.shape[-1:]).flatten(0, 1))
        runs_TM = torch.zeros_like(choice.probs, dtype=torch.bool).scatter(1, choice.ids, True)
        routings = []
        for place, (block, cache) in enumerate(zip(blocks, caches or [None] * len(blocks), strict=True)):
            y_BSD, found = block(x_BSD, angles, mask_BSS, cache, ids_BS)
            runs_T1, p_BS1 = runs_TM[:, place, None], choice.probs[:, place].view(*x_BSD.shape[:2], 1)
            learns_BS1 = (p_BS1 - p_BS1.detach()).to(y_BSD.dtype)  # 0, with p's gradient: what a chosen block adds is whole
            x_BSD = torch.where(runs_T1.view_as(p_BS1), y_BSD + learns_BS1 * (y_BSD - x_BSD), x_BSD)
            routings += [r.with_tensors(ids=r.ids.where(runs_T1, -1), gates=r.gates.where(runs_T1, 0.0)) for r in found]
        return x_BSD, routings, choice
