"""What training minimises, in one place: Lightning, the chapters' plain loop, ranks, tests and benchmarks all call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, balancer, counts_of, moves_after_a_step, require_fit
from sigma_lite.balance.losses import load_balancing_loss, z_loss
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import BalanceConfig
from sigma_lite.model import Routing, Transformer, of_experts, of_others


class Losses(NamedTuple):
    """The losses of one micro-batch, all scalars."""

    total: Tensor  # the sum of the weighted terms: call backward on it
    terms: dict[str, Tensor]  # `main`, "balance" and "z" before their weights; the last two are means over layers
    lbl: Tensor  # measured, no gradient: global-batch LBL, mean over layers; 1 = balanced, or blind


class Objective:
    """total = main + sum over layers of (weight * balance loss + z_weight * router z-loss).

    Weights multiply each layer's loss and the layers are summed, as in Megatron. A term is shown as a mean over layers,
    because one reads it so; `term_weights` therefore holds the weight of a layer times the number of layers.

    Args:
        balancer: its losses are the balance term; see balance/balancer.py.
        weight: of one layer's balance loss.
        z_weight: of one layer's router z-loss.
        n_layers: L.
        main: name of what is learned: lm, the language-model loss, or policy, that of train/reward.py.
    """

    def __init__(self, balancer: Balancer, weight: float, z_weight: float, n_layers: int, main: str = "lm"):
        self.balancer, self.main = balancer, main
        self.term_weights: Mapping[str, float] = {main: 1.0, "balance": weight * n_layers, "z": z_weight * n_layers}

    def __call__(
        self,
        loss: Tensor,
        routings: Sequence[Routing],
        pooled: PooledCounts,
        n_rows: int | Tensor,
        each: float | None = None,
    ) -> Losses:
        """The losses of one micro-batch.

        Args:
            loss: the main one, a mean over scored tokens, or their sum divided by the step's mean number of them.
            routings: one of each layer's experts, and those of what else chooses: balance and z-loss are of all.
            pooled: loads and the balancer's own statistics of this optimizer step so far; this micro-batch's are added.
            n_rows: B; the T tokens of a routing are row-major, T / B of each row. Or how many there are of each, int64 [B].
            each: T in the mean over the step's micro-batches; None: the same in all. Losses that are means over tokens are
                multiplied by T / each, so that their mean over micro-batches and ranks is one over all tokens.
        """
        own, experts, others = None, of_experts(routings), of_others(routings)
        if type(self.balancer).statistics is not Balancer.statistics:
            with torch.no_grad():
                own = self.balancer.statistics(experts)
        f = pooled.add(counts_of(experts), own, [counts_of([r])[0] for r in others])
        a_layer = len(routings) / len(experts)  # 1 unless attention chooses too; then a layer's loss is a sum
        weight = 1.0 if each is None else len(experts[0].ids) / each
        of_balance = a_layer if self.balancer.of_rows else a_layer * weight
        terms = {
            self.main: loss,
            "balance": self.balancer.losses([*experts, *others], f, n_rows).mean() * of_balance,
            "z": torch.stack([z_loss(r.logits) for r in routings]).mean() * (a_layer * weight),
        }
        total = torch.stack([self.term_weights[name] * term for name, term in terms.items()]).sum()
        return Losses(total, terms, _measured(experts, f[: len(experts)]) * weight)

    def require_fit(self, model: Transformer) -> None:
        """ConfigError where the balancer, if it acts at all, and a layer's parts cannot work together."""
        acts = self.term_weights["balance"] != 0 or moves_after_a_step(self.balancer)
        require_fit(self.balancer if acts else Balancer(), model)


def objective(config: BalanceConfig, n_layers: int, custom: Balancer | None = None, main: str = "lm") -> Objective:
    """The objective that `config` names, with a balancer of your own in place of the one that it names."""
    return Objective(custom or balancer(config), config.weight, config.z_weight, n_layers, main)


@torch.no_grad()
def _measured(routings: Sequence[Routing], f_LE: Tensor | Sequence[Tensor]) -> Tensor:
    lbl_L = [load_balancing_loss(r.probs, r.ids, f_E) for r, f_E in zip(routings, f_LE, strict=True)]
    return torch.stack(lbl_L).mean()
