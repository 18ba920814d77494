"""Null experts (AdaMoE, 2406.13233): some of the experts that a token may choose do nothing, so tokens cost unequally.

The paper's: m null experts with logits of their own beside n true ones; a larger K; the gates of the true experts that a
token chose are divided by their sum (none chosen: result 0); and a balance loss in which every null expert counts as used
as often as their mean, because it does not matter which nothing a token chose. A balanced router then uses K n / (n + m)
true experts a token. The released code has the loss twice: `exp_1` takes that mean, `exp_2` writes it to an empty slice,
so that nothing is averaged there. We follow `exp_1`: a balanced layer scores 1.

Ours: a null expert is an empty slot (-1), so it costs nothing; `renormalise=False` keeps the router's own scores, which it
needs at K = 1: a single gate divided by itself is 1, through which no gradient reaches the router. A bias that is moved by
counts sees no null expert, nor does another loss of counts: both are refused. Confidence: code read, the paper's numbers
second hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sigma_lite.balance.balancer import Balancer, is_ours
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, mean_over_tokens
from sigma_lite.config import ModelConfig, require
from sigma_lite.model import NamedRouting, Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE
from sigma_lite.papers.moduleformer import MutualInformation


class NullRouter(Router):
    """Top K of n + m columns, of which the last m are null experts.

    Args:
        nulls: m.
        renormalise: divide a token's gates by their sum, as in the paper; needs K > 1. It stands for net.renormalise.
    """

    assumes = Assumes(k="0 to K, 2 or more if renormalised", parameters="router rows of the nulls")

    leaves_empty = True

    def __init__(self, config: ModelConfig, nulls: int = 8, renormalise: bool = True):
        super().__init__(config)
        require(nulls >= 0, f"nulls={nulls}: must be 0 or more")
        width = config.n_experts + nulls
        self.weight = nn.Parameter(torch.empty(width, config.d_model))
        self.register_buffer("bias", torch.zeros(width))
        self.n_experts, self.sums_to_one = config.n_experts, renormalise
        self.set_k(config.top_k)

    def set_k(self, k: int) -> None:
        why = "a single gate divided by itself is 1, and the router would not learn: set renormalise: false"
        require(k > 1 or not self.sums_to_one, f"renormalise=True with {k} expert per token: {why}")
        super().set_k(k)

    def must_fit(self, balancer: Balancer) -> None:
        """A loss of counts is 0 where every choice is a null one, and a bias would lift null experts for ever."""
        nulls, knows = len(self.bias) - self.n_experts, type(balancer) is Balancer or not is_ours(balancer)
        fix = f"set model.custom_balance: sigma_lite.papers.adamoe.NullLBL, nulls={nulls}; or balance.loss and bias: none"
        require(
            not nulls or knows or isinstance(balancer, (NullLBL, MutualInformation)),
            f"{balancer} does not see the {nulls} null experts of NullRouter: tokens would learn to choose nothing; {fix}",
        )

    def choose(self, scores_TE: Tensor) -> Tensor:
        ids_TK = super().choose(scores_TE)
        ids_TK = ids_TK.where(ids_TK < self.n_experts, -1)
        return ids_TK.gather(1, (ids_TK < 0).int().argsort(dim=1, stable=True))  # true experts first


class NullLBL(Balancer):
    """(n + m) sum_i ftilde_i P_i of each micro-batch, as in the released code. Balanced: 1. Of attention heads: the LBL.

    Args:
        nulls: m, as the router has it; another number is refused.
    """

    assumes = Assumes()

    def __init__(self, nulls: int = 8):
        require(nulls >= 0, f"nulls={nulls}: must be 0 or more")
        self.nulls = nulls

    def must_fit(self, layer: MoE) -> None:
        router = layer.router
        has = len(router.bias) - router.n_experts if isinstance(router, NullRouter) else 0
        require(
            has == self.nulls or not is_ours(router),
            f"{self} beside a {type(router).__name__} with {has} null experts: give both the same number",
        )

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        if isinstance(routing, NamedRouting):  # no head is a null expert
            return load_balancing_loss(routing.probs, routing.ids, f_E)
        return null_load_balancing_loss(routing.probs, routing.ids, self.nulls)


def null_load_balancing_loss(probs_TE: Tensor, ids_TK: Tensor, nulls: int) -> Tensor:
    """E sum_i ftilde_i P_i over E = n + m columns; ids of -1 are choices of some null expert.

    Returns: scalar > 0. All columns used and believed in alike: 1. Nothing chosen but nulls, for sure: E / m.
    """
    E, slots = probs_TE.shape[1], max(ids_TK.numel(), 1)
    n = E - nulls
    f_E = expert_counts(ids_TK, E) / slots
    return E * (averaged(f_E, n, (ids_TK < 0).sum() / slots) * mean_over_tokens(probs_TE)).sum()


def averaged(f_E: Tensor, n: int, null_share: Tensor) -> Tensor:
    """ftilde: f of the n true experts; of each null expert its part of what all of them got."""
    return torch.cat((f_E[:n], (null_share / max(len(f_E) - n, 1)).expand(len(f_E) - n)))


def true_experts(ids_TK: Tensor) -> Tensor:
    """Experts that really work for each token, int64 [T], 0..K."""
    return (ids_TK >= 0).sum(-1)
