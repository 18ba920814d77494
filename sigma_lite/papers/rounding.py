"""Token rounding (SonicMoE, 2512.14080): each expert's load becomes a multiple of the kernel's tile; no tile is half empty.

The paper's: tokens choose their top K; an expert whose load lies between two multiples of the tile is rounded to the nearer
one: down, and it drops the tokens that score it lowest; up, and it takes tokens that score it highest among those that did
not choose it. Kept choices come first. A load changes by at most half a tile. Which tokens are dropped or added depends on
the batch, so training sees later tokens; evaluation takes the plain top K. Filler of rows that are not packed counts as
tokens here, so without it tiles are not quite full.

Ours: a load in the middle is rounded up, unless the batch has too few tokens for it. A tile of 16 suits the lab,
where an expert has 43 tokens; the paper's kernels have 128. Confidence: code read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.router import slots


class Rounded(Router):
    """Top K whose loads are rounded to multiples of a tile, over the micro-batch; in evaluation, top K.

    Args:
        tile: tokens of one tile.
    """

    assumes = Assumes(k="0 to E, about K on average", causal="in evaluation only")
    leaves_empty = True

    def __init__(self, config: ModelConfig, tile: int = 16):
        super().__init__(config)
        require(tile >= 1, f"tile={tile}: must be at least 1")
        self.tile = tile

    def choose(self, scores_TE: Tensor) -> Tensor:
        ids_TK = super().choose(scores_TE)
        return slots(rounded(scores_TE, ids_TK, self.tile), scores_TE) if self.training else ids_TK


def rounded(scores_TE: Tensor, ids_TK: Tensor, tile: int) -> Tensor:
    """Which experts each token goes to, bool [T, E]; a column sums to the multiple of `tile` nearest to its load."""
    T = len(scores_TE)
    picked_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
    wanted_E = ((picked_TE.sum(0) + tile // 2) // tile * tile).clamp(max=T // tile * tile)
    order_TE = scores_TE.argsort(dim=0, descending=True, stable=True)
    order_TE = order_TE.gather(0, picked_TE.gather(0, order_TE).to(torch.int8).argsort(dim=0, descending=True, stable=True))
    first_TE = torch.arange(T, device=scores_TE.device)[:, None] < wanted_E
    return torch.zeros_like(picked_TE).scatter_(0, order_TE, first_TE)
