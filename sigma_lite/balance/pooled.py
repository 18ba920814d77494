"""What is counted over ranks and over the micro-batches of one optimizer step: loads, statistics, and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
        self._so_far: list[Tensor] = []
        self._own: Tensor | None = None

    def add(self, counts_LE: Tensor, own: Tensor | None = None, others: Sequence[Tensor] = ()) -> Tensor | list[Tensor]:
        """Add one micro-batch's counts, int64 [L, E]; returns f so far, fp32 [L, E]; with others a list, theirs behind.

        Args:
            own, others: what else is counted: by a balancer, int64 [L, ...]; of heads and such, each int64 [its number].
        """
        given = [counts_LE, *others, *([] if own is None else [own])]
        summed = sum_over_ranks(torch.cat([counts.flatten() for counts in given])).split([c.numel() for c in given])
        added = [new.view(counts.shape) for new, counts in zip(summed, given, strict=True)]
        so_far = [before + new for before, new in zip(self._so_far, added, strict=True)] if self._so_far else added
        self._so_far, self._own = so_far, None if own is None else so_far[-1]
        f_LE = load_share(so_far[0])
        return [*f_LE, *map(load_share, so_far[1 : 1 + len(others)])] if others else f_LE

    @property
    def counts_LE(self) -> Tensor | None:
        """Loads of this step so far."""
        return self._so_far[0] if self._so_far else None

    @property
    def statistics(self) -> Tensor | None:
        """What the balancer asked for, of this step so far: by default the counts. None before the first micro-batch."""
        return self.counts_LE if self._own is None else self._own

    def reset(self) -> None:
        """Call after each optimizer step."""
        self._so_far, self._own = [], None


class Counted(NamedTuple):
    """Tokens of one micro-batch, or the mean over those of a step, which need not be whole."""

    scored: float  # that the main loss is of
    read: float  # that routers' losses are of: all but those that fill rows up


def mean_counted(micros: Sequence[Any], ranks: int = 1, device: torch.device | None = None) -> Counted | None:
    """The mean over a step's micro-batches, which are `micros` on this rank; all ranks must call this.

    A step must not depend on how its rows are cut, and gradients are averaged over micro-batches and ranks. A mean of means
    is the mean over all tokens only if each has as many, which answers of conversations and those that rewards keep have
    not. So sums are divided by this mean. None where each has as many: then their means may be averaged as they are.

    Args:
        micros: what has `counted`, such as a Batch: (scored, read).
    """
    own = torch.tensor([one.counted for one in micros], dtype=torch.int64, device=device)
    total, squares = sum_over_ranks(torch.stack([own.sum(0), own.square().sum(0)])).tolist()
    parts = len(micros) * ranks
    if all(parts * square == number**2 for number, square in zip(total, squares, strict=True)):
        return None
    return Counted(*(number / parts for number in total))


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
