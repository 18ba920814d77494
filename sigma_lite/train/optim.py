"""Optimizer and schedule of a run: AdamW and warmup-stable-decay, others by name, or a class of the reader's own."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sigma_lite.balance.pooled import sum_over_ranks
from sigma_lite.config import OPTIMIZERS, SCHEDULES, ConfigError, OptimConfig, class_named, require
from sigma_lite.identity import identify
from sigma_lite.model.weights import weight_of
from sigma_lite.reading import imported
from sigma_lite.train.schedules import Schedule
from sigma_lite.train.schedules import wsd as warmup_stable_decay  # noqa: F401  as the chapters call it


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Those that decay, those that do not, and routers with a rate of their own; each module says which is which.

    Raises: ValueError for a parameter of which no module says it.
    """
    decayed, kept, routers = [], [], []
    for name, parameter in model.named_parameters():
        rule = weight_of(model, name)
        own_rate = rule.routes and optim.router_lr != 1
        (routers if own_rate else decayed if rule.decays else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
        {"params": routers, "weight_decay": 0.0, "lr": optim.lr * optim.router_lr},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused: one pass over memory. On a CPU that is 5 times faster than torch's default loop over parameters."""
    return torch.optim.AdamW(parameter_groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def optimizer_of(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim.optimizer` names, called with parameter groups, lr and its init_args.

    Groups hold `weight_decay`, and `matrices`: whether they are attention and expert matrices, [M, N] or [E, M, N]. A class
    on top of torch's AdamW gets betas and eps too, and is fused.

    Raises: ConfigError for a class that cannot be imported or refuses these groups or arguments.
    """
    if optim.optimizer == "adamw":
        return adamw(model, optim)
    path, args = class_named(optim.optimizer, "optim.optimizer", OPTIMIZERS)
    cls = imported(path, "model.optim.optimizer")
    is_optimizer = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    require(is_optimizer, f"model.optim.optimizer={path} is no torch.optim.Optimizer: derive it from that class")
    decaying = {id(p) for name, p in model.named_parameters() if weight_of(model, name).decays}
    groups = [{**group, "matrices": id(group["params"][0]) in decaying} for group in parameter_groups(model, optim)]
    if issubclass(cls, torch.optim.AdamW):
        args = {"betas": optim.betas, "eps": optim.eps, "fused": True, **args}
    try:
        return cls(groups, lr=optim.lr, **args)
    except (TypeError, ValueError) as error:
        matrices_only = cls.__name__ == "Muon" and "2D" in str(error)
        fix = "; `optimizer: muon` takes each expert's matrix apart, and AdamW for the rest" if matrices_only else ""
        raise ConfigError(f"model.optim.optimizer={path}: {error}{fix}") from error


def schedule_of(optim: OptimConfig) -> Schedule:
    """The schedule that `optim.schedule` names: (step, total_steps=..., optim=...) -> factor on the peak rate.

    Raises: ConfigError for one that cannot be imported, and for a scheduler of torch, which is no function of the step.
    """
    path, args = class_named(optim.schedule, "optim.schedule", SCHEDULES)
    where = f"model.optim.schedule={path}"
    made = imported(path, "model.optim.schedule")
    stateful = isinstance(made, type) and issubclass(made, torch.optim.lr_scheduler.LRScheduler)
    require(not stateful, f"{where} changes the rate by a state: give a function (step, total_steps, optim) -> factor")
    if not isinstance(made, type):
        return functools.partial(made, **args)
    try:
        return made(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def own_identities(optim: OptimConfig) -> dict[str, Any]:
    """{"custom_optimizer": identity, ...} of those that neither torch nor this package brings: their code may change."""
    found = {}
    for name, names in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        path, args = class_named(getattr(optim, name), f"optim.{name}", names)
        if path.partition(".")[0] not in ("torch", "sigma_lite"):
            own = imported(path, f"model.optim.{name}")
            with _as_written(own):
                found[f"custom_{name}"] = identify(functools.partial(own, **args) if args else own)
    return found


@contextlib.contextmanager
def _as_written(own: Any) -> Iterator[None]:
    """Inside, a class of optimizers has the `step` of its source: torch replaces it when the first object is made."""
    classes = [c for c in getattr(own, "__mro__", ()) if getattr(vars(c).get("step"), "hooked", False)]
    replaced = {c: vars(c)["step"] for c in reversed(classes)}  # the lowest base first: what is above may inherit from it
    for c, step in replaced.items():
        del c.step
        if getattr(c, "step", None) is not inspect.unwrap(step, stop=lambda f: not hasattr(f, "hooked")):
            c.step = inspect.unwrap(step, stop=lambda f: not hasattr(f, "hooked"))
    try:
        yield
    finally:
        for c, step in replaced.items():
            c.step = step


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, a scalar; of sharded ones (DTensor) over all ranks, of which each holds a part."""
    gradients = list(gradients)
    pieces = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(pieces)
    sharded = any(g is not piece for g, piece in zip(gradients, pieces, strict=True))
    return sum_over_ranks(norm.square()).sqrt() if sharded else norm


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients to total norm `limit` where `norm` exceeds it; most steps need no second pass over them."""
    if norm > limit:
        by_mesh: dict[Any, list[nn.Parameter]] = {}  # torch's operators on sharded tensors take one mesh at a time
        for parameter in parameters:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        for group in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
