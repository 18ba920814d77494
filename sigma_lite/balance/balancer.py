"""The one interface of everything that balances: a loss on the routing, a bias on the choice, or both.

A reader's own idea is either a function of one layer,

    def mine(routing, f_E): ...            # -> scalar; f_E is the load share of the whole optimizer step so far

or a subclass of `Balancer`. `SigmaLit(custom_balance=mine)`, `model.custom_balance: file.mine` in yaml and
`lab.compare({"mine": mine})` all take either.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step, centred, rate_at
from sigma_lite.balance.losses import (
    expert_counts,
    load_balancing_loss,
    sequence_load_balancing_loss,
    top1_load_balancing_loss,
)
from sigma_lite.config import BALANCE_CHOICES, BalanceConfig, ConfigError, nearest, require
from sigma_lite.model import Router, Routing, Transformer
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE

BalanceLoss = Callable[[Routing, Tensor], Tensor]
"""(routing of one layer and micro-batch, f_E pooled over ranks and accumulation) -> scalar."""


class Balancer:
    """Does nothing: no loss, no bias, no state. Override what your idea needs. The LBL is measured beside it in any case."""

    assumes = Assumes()
    of_rows = False  # whether the loss is a mean over rows, and not over tokens: rows may have unequal numbers of these
    needs_whole_step = False  # whether one micro-batch on one rank must hold the step's tokens

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "moved_bias" in vars(cls) and "next_bias" not in vars(cls):
            raise ConfigError(
                f"{cls.__qualname__}.moved_bias would never be called: rename it next_bias(bias_LE, pooled, step), where"
                " pooled is the step's expert counts, or whatever your `statistics` counts"
            )

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        """A scalar for one layer and micro-batch; 0 by default.

        Args:
            routing: what the layer's router decided for T tokens.
            f_E: load share of each expert over all ranks and the micro-batches of this step so far; no gradient.
        """
        return routing.logits.new_zeros(())

    def losses(self, routings: Sequence[Routing], f_LE: Tensor, n_rows: int | Tensor) -> Tensor:
        """[L], one scalar a routing; f_LE is a list where heads are chosen too. Override to see all at once, or each row."""
        return torch.stack([self.loss(routing, f_E) for routing, f_E in zip(routings, f_LE, strict=True)])

    def statistics(self, routings: Sequence[Routing]) -> Tensor:
        """What `next_bias` wants to know of one micro-batch, int64 [L, ...]; by default slots per expert, [L, E].

        It is summed over ranks and over the micro-batches of a step. Whole numbers, because their sum is the same in every
        order: so a bias does not depend on how a step is cut. Histograms, for instance, add up; quantiles do not.
        """
        return counts_of(routings)

    def next_bias(self, bias_LE: Tensor, pooled: Tensor, step: int) -> Tensor | None:
        """The routers' bias for the next step, or None to leave it. Called once after each optimizer step.

        Args:
            bias_LE: the present bias, fp32.
            pooled: `statistics` of the finished step, over all ranks and micro-batches. Only finished steps may decide: a
                bias that saw the tokens it routes would leak the future into the past.
            step: optimizer steps finished before this one, from 0.
        """
        return None

    def must_fit(self, layer: MoE) -> None:
        """ConfigError for a layer whose router or experts this balancer cannot balance; asked before any work."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run must know besides the bias, such as a momentum: tensors by name, kept in each checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave. Raises ConfigError for a state that this balancer does not have."""
        if state:
            raise ConfigError(
                f"the checkpoint holds {', '.join(sorted(state))} of its balancer, and {type(self).__qualname__} has no"
                " load_state_dict: write one, or begin a new run"
            )

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        """Class and settings, for people; what a record holds, and what a resumed run is held to, is in identity.py."""
        settings = {k: v for k, v in vars(self).items() if isinstance(v, (int, float, str, Balancer))}
        return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def moves_after_a_step(balancer: Balancer) -> bool:
    """Whether it has a `next_bias`: it then moves the routers' bias, or something of its own."""
    return type(balancer).next_bias is not Balancer.next_bias


def require_fit(balancer: Balancer, model: Transformer) -> None:
    """ConfigError where the balancer and a layer's parts cannot work together; either may say so."""
    for block in model.blocks:
        balancer.must_fit(block.moe)
        if isinstance(block.moe.router, Router):  # that of a chapter's reader may be any module
            block.moe.router.must_fit(balancer)


def require_whole_step(balancer: Balancer, micros: int, ranks: int = 1) -> None:
    """ConfigError for a balancer that must see the whole step at once, where it would see a part.

    Args:
        micros: micro-batches of a step on each rank.
    """
    whole = not balancer.needs_whole_step or micros * ranks == 1
    cut = f"{balancer} must see all tokens of a step at once, and {micros} micro-batch(es) on {ranks} rank(s) share them out"
    require(whole, f"{cut}: set rows.per_micro to rows.per_step, on one rank")


def is_ours(one: Any) -> bool:
    """Whether this package brings its class: what a reader's own can do beside others, its reader knows."""
    return getattr(one, "_loss", one).__module__.startswith("sigma_lite.")


def counts_of(routings: Sequence[Routing]) -> Tensor:
    """Slots per expert in every layer, int64 [L, E]."""
    return torch.stack([expert_counts(r.ids, r.probs.shape[1]) for r in routings])


class GlobalLBL(Balancer):
    """The LBL of the global batch (Demons in the Detail, 2501.11873): f over all ranks and the step's micro-batches."""

    assumes = Assumes()

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return load_balancing_loss(routing.probs, routing.ids, f_E)


class MicroLBL(Balancer):
    """Each micro-batch of each rank balanced for itself, as in GShard and Switch."""

    assumes = Assumes()

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return load_balancing_loss(routing.probs, routing.ids)


class SequenceLBL(Balancer):
    """Each row balanced for itself (DeepSeek-V3, 2412.19437)."""

    assumes = Assumes()
    of_rows = True

    def losses(self, routings: Sequence[Routing], f_LE: Tensor, n_rows: int | Tensor) -> Tensor:
        return torch.stack([sequence_load_balancing_loss(r.probs, r.ids, n_rows) for r in routings])


class Top1LBL(Balancer):
    """Sigma-MoE-Tiny's loss without the blind spot."""

    assumes = Assumes()

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return top1_load_balancing_loss(routing.logits, routing.ids, self.temperature)


class FromFunction(Balancer):
    """A plain function of one layer, as a balancer."""

    def __init__(self, loss: BalanceLoss):
        self._loss = loss

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return self._loss(routing, f_E)


class WithBias(Balancer):
    """A balancer that is nothing but losses, and a loss-free bias beside it.

    Raises: ConfigError for an inner one with a `next_bias` of its own. It asks for statistics of its own too, and two rules
        cannot move one bias.
    """

    assumes = Assumes(state="a bias an expert")

    def __init__(self, inner: Balancer, rule: str, rate: float = 1e-3, decay: str = "none", centre: bool = False):
        name = type(inner).__qualname__
        if moves_after_a_step(inner):
            raise ConfigError(
                f"WithBias({name}): {name} moves a bias or a coefficient of its own after each step, and the rule {rule!r}"
                f" would stand in its place: use {name} alone, or put a balancer of losses only inside"
            )
        rules, decays = BALANCE_CHOICES["bias"][1:], BALANCE_CHOICES["bias_decay"]
        require(rule in rules, f"WithBias(rule={rule!r}) does not exist; {nearest(rule, rules)}")
        require(decay in decays, f"WithBias(decay={decay!r}) does not exist; {nearest(decay, decays)}")
        require(0 < rate < math.inf, f"WithBias(rate={rate}): must be greater than 0 and finite")
        self.inner, self.rule, self.rate, self.decay, self.centre = inner, rule, rate, decay, centre

    @property
    def of_rows(self) -> bool:
        return self.inner.of_rows

    @property
    def needs_whole_step(self) -> bool:
        return self.inner.needs_whole_step

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return self.inner.loss(routing, f_E)

    def losses(self, routings: Sequence[Routing], f_LE: Tensor, n_rows: int | Tensor) -> Tensor:
        return self.inner.losses(routings, f_LE, n_rows)

    def next_bias(self, bias_LE: Tensor, pooled: Tensor, step: int) -> Tensor:
        bias_LE = bias_LE + bias_step(pooled, self.rule, rate_at(step, self.rate, self.decay))
        return centred(bias_LE) if self.centre else bias_LE

    def must_fit(self, layer: MoE) -> None:
        self.inner.must_fit(layer)

    def state_dict(self) -> dict[str, Tensor]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_state_dict(state)


def balancer(config: BalanceConfig) -> Balancer:
    """What `config` names."""
    named = {"global": GlobalLBL, "micro": MicroLBL, "sequence": SequenceLBL, "none": Balancer}
    inner = Top1LBL(config.temperature) if config.loss == "top1" else named[config.loss]()
    if config.bias == "none":
        return inner
    return WithBias(inner, config.bias, config.bias_rate, config.bias_decay, config.bias_centre)


def as_balancer(custom: Balancer | BalanceLoss) -> Balancer:
    """A reader's own object or function as a Balancer. Raises ConfigError for anything else."""
    if isinstance(custom, Balancer):
        return custom
    if isinstance(custom, type) or not callable(custom):
        raise ConfigError(
            f"{custom!r} is not a balancer: give a function (routing, f_E) -> scalar, or an object of a Balancer subclass"
        )
    return FromFunction(custom)
