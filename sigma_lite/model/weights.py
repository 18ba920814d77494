"""How a parameter begins and whether it decays: said by the module that owns it, beside the parameter itself.

A module keeps `own_weights`, a `Weight` for each name below it that no module of its own kind owns (`query.weight` of an
attention). So a part that takes another's place brings its own rules, and no list of names elsewhere has to know it.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weight(NamedTuple):
    """The rules of one parameter."""

    std: float | None  # of the normal distribution that it is drawn from, mean 0; None: it begins as all ones
    decays: bool = False  # weight decay: for what multiplies activations, not for what sets their scale or names a token
    routes: bool = False  # a router's: it learns at optim.router_lr times the rate


GAIN = Weight(std=None)


def passing(fan_in: int, scale: float = 1.0, decays: bool = True) -> Weight:
    """A matrix that passes on the variance it gets, times `scale` squared: normal with variance 1 / fan-in."""
    return Weight(1 / math.sqrt(fan_in) * scale, decays)


def into_stream(n_layers: int) -> float:
    """Scale of what is added to the residual stream: 1 / sqrt(2 L), because 2 L such terms add up (GPT-2)."""
    return 1 / math.sqrt(2 * n_layers)


def weight_of(model: nn.Module, name: str) -> Weight:
    """The rules of parameter `name` of a model, from the innermost module that has them.

    Raises: ValueError when no module says them.
    """
    path = name.split(".")
    for cut in reversed(range(len(path))):
        owner, rest = model.get_submodule(".".join(path[:cut])), ".".join(path[cut:])
        if rest in getattr(owner, "own_weights", {}):
            return owner.own_weights[rest]
    kind, parameter = type(model.get_submodule(".".join(path[:-1]))).__name__, path[-1]
    raise ValueError(
        f"no module says how {name} begins and whether it decays: let {kind} set"
        f" self.own_weights = {{{parameter!r}: Weight(std=..., decays=...)}}"
    )


@torch.no_grad()
def fill(weight: Tensor, rule: Weight, name: str) -> None:
    """What a parameter begins as depends on torch's seed and its name only, so not on order or on how it is sharded."""
    if rule.std is None:
        weight.fill_(1)
        return
    digest = hashlib.sha256(f"{torch.initial_seed()}/{name}".encode()).digest()
    generator = torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:7], "big"))
    weight.normal_(0, rule.std, generator=generator)
