"""Global-batch load shares and statistics: counts pooled over ranks and over the micro-batches of one optimizer step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sigma_lite.balance.losses import load_share


class PooledCounts:
    """The accumulation buffer of global-batch LBL (Demons in the Detail, 2501.11873, Algorithm 1).

    Each micro-batch adds its counts, summed over all ranks; f is the share over everything added since the last reset.
    Early micro-batches therefore see a noisier f than late ones: the buffer's loss is not the pooled loss, but comes
    nearer to it as accumulation proceeds. Counts are integers, so no order of summation changes them.
    """

    def __init__(self) -> None:
        self.counts_LE: Tensor | None = None
        self._own: Tensor | None = None

    def add(self, counts_LE: Tensor, own: Tensor | None = None) -> Tensor:
        """Add one micro-batch's counts, int64 [L, E]; returns f so far, fp32 [L, E].

        Args:
            own: what a balancer counts beside the loads, int64 [L, ...]; it travels in the same message.
        """
        both = [counts_LE] if own is None else [counts_LE, own]
        added = sum_over_ranks(torch.cat([counts.flatten() for counts in both])).split([counts.numel() for counts in both])
        counts_LE, *own_counts = [new.view(counts.shape) for new, counts in zip(added, both, strict=True)]
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE
        for new in own_counts:
            self._own = new if self._own is None else self._own + new
        return load_share(self.counts_LE)

    @property
    def statistics(self) -> Tensor | None:
        """What the balancer asked for, of this step so far: by default the counts. None before the first micro-batch."""
        return self.counts_LE if self._own is None else self._own

    def reset(self) -> None:
        """Call after each optimizer step."""
        self.counts_LE = self._own = None


@torch.no_grad()
def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over all ranks; the tensor itself on one. The autograd all_reduce would be wrong here: f has no gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return counts
    total = counts.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def max_over_ranks(values: Tensor) -> Tensor:
    """The largest over all ranks, place by place; the tensor itself on one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    most = values.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most
