"""A balance loss by name, or your own: any function of one layer's routing and of its pooled load share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sigma_lite.balance.losses import load_balancing_loss, top1_load_balancing_loss
from sigma_lite.config import BalanceConfig
from sigma_lite.model import Routing

BalanceLoss = Callable[[Routing, Tensor], Tensor]
"""(routing of one layer and micro-batch, f_E pooled over ranks and accumulation) -> scalar."""


def balance_loss(config: BalanceConfig) -> BalanceLoss:
    """The function that `config.loss` names. For "none" it is the global LBL, which is then logged with weight 0."""
    if config.loss == "micro":
        return lambda routing, f_E: load_balancing_loss(routing.probs, routing.ids)
    if config.loss == "top1":
        return lambda routing, f_E: top1_load_balancing_loss(routing.logits, routing.ids, config.temperature)
    return lambda routing, f_E: load_balancing_loss(routing.probs, routing.ids, f_E)
