"""Training on one screen, without Lightning: read this file first.

It computes what `sigma-lite fit` computes, to the bit (tests/test_loop.py). Lightning adds checkpoints, ranks, precisions
and callbacks. One of them may change a step: SpikeGuard refuses one whose gradient is no number or far outside what is
usual. Here every step is made, and a gradient that is NaN makes all weights NaN.

    model = Transformer(config)
    batches = train_loader(Rows(data.train, data.token_bytes, rows.length), rows, steps=100)
    for done in train(model, batches, Objective(GlobalLBL(), weight=0.02, z_weight=1e-4, n_layers=6), steps=100):
        print(done.step, done.losses[-1].terms["lm"].item())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from sigma_lite.balance.balancer import require_whole_step
from sigma_lite.balance.objective import Losses, Objective
from sigma_lite.balance.pooled import PooledCounts, mean_counted
from sigma_lite.config import OptimConfig, require
from sigma_lite.data.rows import Batch
from sigma_lite.model import Routing, Transformer, of_tokens
from sigma_lite.train.optim import clip_gradients, optimizer_of, schedule_of, total_norm


class Step(NamedTuple):
    """What one optimizer step has done; `losses` and `routings` hold one entry for each micro-batch."""

    step: int  # steps finished, this one too
    losses: list[Losses]
    routings: list[list[Routing]]
    pooled: PooledCounts  # loads of the whole step, and what else the balancer counts


def train(
    model: Transformer,
    batches: Iterable[Batch],
    objective: Objective,
    optim: OptimConfig = OptimConfig(),  # noqa: B008  frozen: safe to share
    *,
    steps: int,
    micros: int = 1,
    k: Callable[[int], Sequence[int]] | None = None,
    clip: float = 1.0,
) -> Iterator[Step]:
    """Train in place; yields after every optimizer step, whose losses are means over its tokens, however it is cut.

    Args:
        batches: micro-batches, `micros` of them for each step.
        objective: language-model loss, balance loss and z-loss; its balancer also moves the bias, if it has one.
        optim: optimizer, peak rate and schedule.
        k: steps finished -> experts per token of each layer; None leaves the model's.
        clip: largest total norm of a step's gradient; 0 clips nothing.

    Raises: ConfigError for a balancer that does not fit the model's parts, or that must see the whole step at once with more
        than one micro-batch; and where the batches end too soon.
    """
    require_whole_step(objective.balancer, micros)
    objective.require_fit(model)
    model.train()
    optimizer, rate, batches = optimizer_of(model, optim), schedule_of(optim), iter(batches)
    peaks = [group["lr"] for group in optimizer.param_groups]  # routers may have a rate of their own
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step, total_steps=steps, optim=optim)
        if k:
            model.set_k(k(step))
        done = Step(step + 1, [], [], PooledCounts())
        optimizer.zero_grad()
        cut = list(islice(batches, micros))
        require(len(cut) == micros, f"the batches ended in step {step + 1} of {steps}: give {steps * micros} of them")
        each = mean_counted(cut)
        for batch in cut:
            lm, routings = model.loss(
                batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS, count=each and each.scored
            )
            routings = of_tokens(routings, batch.own_T)
            losses = objective(lm, routings, done.pooled, batch.lengths, each and each.read)
            (losses.total / micros).backward()
            done.losses.append(losses)
            done.routings.append(routings)
        if clip:
            norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
            clip_gradients(model.parameters(), norm, clip)
        optimizer.step()
        with torch.no_grad():
            bias_LE = objective.balancer.next_bias(model.bias_LE, done.pooled.statistics, step)
        if bias_LE is not None:
            model.set_bias(bias_LE)
        yield done
