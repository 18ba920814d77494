"""ModuleFormer's balance without counting (2306.04640): maximise the mutual information of token and expert."""

from __future__ import annotations

from torch import Tensor

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import mean_over_tokens
from sigma_lite.balance.metrics import entropy
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes


def mutual_information_loss(probs_TE: Tensor) -> Tensor:
    """mean_t H(p_t) - H(mean_t p_t) = -I(token; expert), in nats (2306.04640; `MI loss` of its code).

    The first term asks each token to be sure, the second asks all tokens together to use every expert. Nothing is counted,
    so the whole loss has a gradient; but it sees no loads either, only probabilities.

    Args:
        probs_TE: probabilities over all experts, [T, E].

    Returns: scalar in -log E .. 0. Sure and even: -log E. Flat for each token, or all sure of the same expert: 0.
    """
    each = entropy(probs_TE).sum() / max(len(probs_TE), 1)
    return each - entropy(mean_over_tokens(probs_TE))


class MutualInformation(Balancer):
    """`mutual_information_loss` of each layer and micro-batch. The marginal is the micro-batch's own: f is not used."""

    assumes = Assumes()

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return mutual_information_loss(routing.probs)
