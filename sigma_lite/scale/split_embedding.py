"""An embedding cut along the hidden size: every rank keeps a slice of d numbers of every token's row (SE-MoE, 2205.10034).

Where ranks have rows of text of their own, a whole embedding on each rank means a gradient [V, D] that is summed over all
ranks, although a step touches few of its rows. Cut along D, nothing is summed over ranks:

    forward     gather the ids of all ranks, look up own slices for all of them, exchange slices for whole rows
    backward    exchange gradients of rows for gradients of slices; each rank adds up the whole gradient of its slice

A rank then sends, in one forward and backward pass, of T tokens of its own

    2 T D (R - 1) / R numbers, in the place of      2 V D (R - 1) / R       of an all-reduce (or of FSDP's gather and sum)

and T (R - 1) ids. So it pays where a micro-batch has fewer tokens than the vocabulary has rows, and a rank stores V D / R
numbers, with as many of a gradient and of moments.

The paper's saving, 15.81 GB to 8.63 GB, is of its own model and machine. Not for tied embeddings: a head that uses the same
weight needs all of it. Our strategy cuts the embedding as it cuts all dense weights, with FSDP2. Confidence: the idea read
in summary; that ids are gathered and slices exchanged is the form that the ranks of data parallelism need.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.config import require
from sigma_lite.scale.expert_parallel import exchange


class SplitEmbedding(nn.Module):
    """Takes the place of `nn.Embedding` on every rank of a group. All ranks must look up as many ids as each other.

    Args:
        weight_VD: the whole table, the same on all ranks; this rank keeps its part of the columns.

    Raises: ConfigError for a width that cannot be cut into equal slices.
    """

    def __init__(self, weight_VD: Tensor, group: dist.ProcessGroup):
        super().__init__()
        self.group, R, D = group, dist.get_world_size(group), weight_VD.shape[1]
        require(D % R == 0, f"d_model={D} cannot be cut into {R} equal slices, one for each rank: change either")
        self.weight = nn.Parameter(weight_VD.detach().chunk(R, 1)[dist.get_rank(group)].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of these ids, [..., D]. The gradient of a slice is the sum over the tokens of all ranks."""
        R, T = dist.get_world_size(self.group), ids.numel()
        all_N = ids.new_empty(R * T)
        dist.all_gather_into_tensor(all_N, ids.flatten(), group=self.group)
        slices_NC = F.embedding(all_N, self.weight)
        slices_RTC = exchange(slices_NC, [T] * R, [T] * R, self.group).view(R, T, -1)  # of own tokens, from every rank
        return slices_RTC.transpose(0, 1).reshape(*ids.shape, -1)


def sent_by_slices(tokens: int, d_model: int, ranks: int) -> int:
    """Numbers that a rank sends in a forward and backward pass over so many tokens of its own."""
    return 2 * tokens * d_model * (ranks - 1) // ranks


def sent_by_all_reduce(vocabulary: int, d_model: int, ranks: int) -> int:
    """Numbers that a rank sends where every rank has the whole table: a ring sends its gradient twice, less its own part."""
    return 2 * vocabulary * d_model * (ranks - 1) // ranks
