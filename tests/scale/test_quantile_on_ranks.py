"""Quantile balancing on two ranks: the histogram is that of one batch, to the bin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ranks import on_ranks
from torch import Tensor

from sigma_lite.balance.balancer import counts_of
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.model import Routing
from sigma_lite.papers.alf import QuantileBalancing

E, K = 96, 2


def pooled(parts: Sequence[Tensor], bias: Tensor) -> tuple[Tensor, Tensor]:
    """What one step counts, through the buffer that training uses, and the bias after it."""
    balancer, buffer = QuantileBalancing("softmax"), PooledCounts()
    balancer.load_state_dict({"bias": bias})
    for logits in parts:
        probs = logits.softmax(-1)
        ids = (probs + bias[0]).topk(K).indices
        routings = [Routing(probs, ids, probs.gather(1, ids), logits)]
        buffer.add(counts_of(routings), balancer.statistics(routings))
    return buffer.statistics, balancer.next_bias(bias, buffer.statistics, 0)


def test_two_ranks_of_two_micro_batches_pool_to_one_batch(tmp_path):
    """The next bias is bitwise the same on both ranks and in one process; a mean of two quantiles is another one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(960, E, generator=generator) + torch.randn(E, generator=generator)
    bias = 0.1 * torch.randn(1, E, generator=generator)
    both = on_ranks(2, lambda rank: pooled(logits[480 * rank : 480 * (rank + 1)].split(240), bias), tmp_path)
    counts, moved = pooled([logits], bias)
    for own_counts, own_moved in both:
        assert torch.equal(own_counts, counts) and torch.equal(own_moved, moved)
    halves = [pooled([half], bias)[1] for half in logits.split(480)]
    assert not torch.allclose(sum(halves) / 2, moved, atol=1e-4)
