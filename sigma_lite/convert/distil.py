"""A little training inside of a surgery; distillation: a student learns a teacher's logits and its streams."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import require
from sigma_lite.data.rows import IGNORED, Batch
from sigma_lite.model import Output, Routing, Transformer, of_tokens


def outputs(model: Transformer, batch: Batch, modules: Iterable[nn.Module]) -> tuple[Output, list[Any]]:
    """What the model returns for a batch, and what each of these modules of it returned on the way."""
    modules, seen = list(modules), {}
    hooks = [module.register_forward_hook(lambda module, given, found: seen.update({module: found})) for module in modules]
    try:
        output = model(batch.ids_BS, documents_BS=batch.documents_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return output, [seen[module] for module in modules]


def divergence(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    """KL(teacher || student) in nats, mean over tokens: 0 where both say the same."""
    both = (logits.float().log_softmax(-1) for logits in (student_TV, teacher_TV))
    return F.kl_div(*both, log_target=True, reduction="batchmean")


def feature_losses(student: Sequence[Tensor], teacher: Sequence[Tensor], main: Tensor) -> Tensor:
    """Sum of each block's mean squared error, weighted so that no block and no kind of loss rules (2510.09094).

    w_l = (main / mse_l) * (sum of the norms of all teacher streams) / (L * the norm of stream l); w carries no gradient, so
    at each step the blocks' losses weigh as much as the main one: large streams are held down, small ones lifted.
    """
    mse_L = torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)])
    norm_L = torch.stack([t.norm() for t in teacher])
    with torch.no_grad():
        weight_L = main / mse_L.clamp(min=1e-12) * norm_L.sum() / (len(norm_L) * norm_L)
    return (weight_L * mse_L).mean()


def distil(
    student: Transformer,
    teacher: Transformer,
    rows: Sequence[Batch],
    steps: int,
    *,
    learns: Iterable[nn.Parameter],
    lr: float = 1e-3,
    balance: float = 0.0,
    routers: Sequence[nn.Module] | None = None,
    pairs: Sequence[tuple[nn.Module, nn.Module]] | None = None,
) -> list[float]:
    """Train `learns`, parameters of the student, for so many batches, and say the divergence of each step in nats.

    The divergence is of tokens that are scored, so of what an assistant says; streams and loads are of all that do not fill
    rows up.

    Args:
        balance: weight of the mean LBL of `routers`.
        routers: modules of the student that return a `Routing`; None: those of its layers.
        pairs: (of the student, of the teacher): modules whose streams are to be alike. None: block by block.
    """
    pairs = list(zip(student.blocks, teacher.blocks, strict=True)) if pairs is None else pairs
    routers = [block.moe.router for block in student.blocks] if routers is None else routers
    pupils, masters = [mine for mine, _ in pairs], [theirs for _, theirs in pairs]

    def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            (target_BSV, _), targets = outputs(teacher, batch, masters)
        (logits_BSV, _), found = outputs(student, batch, [*pupils, *routers])
        scored_BS = batch.targets_BS != IGNORED
        loss = kl = divergence(logits_BSV[scored_BS], target_BSV[scored_BS])
        own, theirs = ([_kept(stream, batch.own_BS) for stream, *_ in part] for part in (found[: len(pupils)], targets))
        loss = loss + feature_losses(own, theirs, kl.detach())
        if balance:
            loss = loss + balance * mean_lbl(of_tokens(found[len(pupils) :], batch.own_T))
        return loss, kl

    return descend(student, rows, steps, loss_of, learns=learns, lr=lr)


def _kept(stream_BSD: Tensor, own_BS: Tensor | None) -> Tensor:
    return stream_BSD if own_BS is None else stream_BSD[own_BS]


def mean_lbl(routings: Sequence[Routing]) -> Tensor:
    """LBL of this batch, mean over layers: 1 is even."""
    return torch.stack([load_balancing_loss(r.probs, r.ids) for r in routings]).mean()


def descend(
    model: nn.Module,
    rows: Sequence[Batch],
    steps: int,
    loss_of: Callable[[Batch], tuple[Tensor, Tensor]],
    *,
    learns: Iterable[nn.Parameter],
    lr: float,
) -> list[float]:
    """So many steps of AdamW, whose rate falls linearly to 0, with batches in turn, again from the first at the end.

    Args:
        loss_of: (what to minimise, what is returned for each step).
        learns: the parameters that move; no other has a gradient meanwhile.
    """
    learns, found = list(learns), []
    require(bool(rows) or steps == 0, "training needs rows: raise --rows")
    if steps == 0:
        return found
    optimizer = torch.optim.AdamW(learns, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with only(model, learns):
        for step in range(steps):
            loss, shown = loss_of(rows[step % len(rows)])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            schedule.step()
            found.append(shown.item())
    return found


@contextlib.contextmanager
def only(model: nn.Module, learns: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block only these parameters have gradients."""
    chosen, before = {id(p) for p in learns}, {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, was in before.items():
            parameter.requires_grad_(was)
            parameter.grad = None
