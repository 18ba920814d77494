"""Expert choice (2202.09368): not tokens choose experts, experts choose tokens, each the C = K T / E that it scores highest.

The paper's: softmax over experts, then each expert's C best tokens of the batch, gated by that softmax. Loads are equal by
construction, and tokens have 0 to E experts, K on average. What it costs: whether a token is chosen depends on all tokens
of the batch, also on later ones. So a token's output knows of the future, which a language model has to predict, and the
loss in training and on held-out text is better than the model can write. The leak can be more than the
K log2((1 - R) / R) bits a token and layer of 2408.15664, R = K / E: which experts took a token tells up to
`most_bits`; tests here read a later token from an earlier one's experts.

Ours: C is rounded, and at least 1. Then a batch of one token, as in writing text, goes to all E experts: what was
trained is not what writes. Filler of rows that are not packed may be chosen like any token. Confidence: the paper's rule is
well known; its code was not read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, is_ours, moves_after_a_step
from sigma_lite.config import require
from sigma_lite.model import Router
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.router import slots


class ExpertChoice(Router):
    """Each expert takes its C best tokens of the micro-batch; a token's slots are as many as took it, the rest empty."""

    assumes = Assumes(k="0 to E, K on average", causal="no")
    leaves_empty = True

    def must_fit(self, balancer: Balancer) -> None:
        moves = is_ours(balancer) and moves_after_a_step(balancer)
        require(not moves, f"{balancer} would move a bias that changes no choice: an expert's best tokens stay its best")

    def choose(self, scores_TE: Tensor) -> Tensor:
        C = capacity(*scores_TE.shape, self.top_k)
        taken_CE = scores_TE.topk(C, dim=0).indices
        return slots(torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, taken_CE, True), scores_TE)


def most_bits(E: int, K: int) -> float:
    """What the experts of a token can tell, in bits: E H(R), the entropy of E choices of rate R = K / E, 0 .. E.

    E H(R) = K log2((1 - R) / R) + E log2(1 / (1 - R)). So the first term alone, which 2408.15664 prints, is less: at E = 16
    and K = 2 it is 5.6 of 8.7 bits, at E = 2 and K = 1 it is 0 of 2.
    """
    return E * sum(-p * math.log2(p) for p in (K / E, 1 - K / E) if p)


def capacity(T: int, E: int, K: int) -> int:
    """C: tokens of each expert, 1..T; 0 of no tokens."""
    return min(T, max(1, round(K * T / E)))
