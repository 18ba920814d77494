"""BASE layers (2103.16716) and Sinkhorn routing (S-BASE of 2202.01169; Megatron): balance by an assignment of the batch.

Both give up each token's own choice in training, and solve for all tokens of a batch at once: as much score as possible
while every expert has the same number of tokens. BASE solves it exactly with an auction, in which experts bid for tokens;
Sinkhorn relaxes it: rows and columns of exp(score) are scaled in turn until each token gives 1 and each expert gets T / E,
and each token then takes its best entry, so loads come out nearly even. In evaluation tokens choose greedily, and loads
are what they are. So training sees the batch, later tokens too; evaluation does not.
Filler of rows that are not packed takes places too: among the other tokens loads are then less even.

The papers': the assignment, the greedy choice in evaluation, gates of the scores themselves. Ours: the router's own softmax
as the score and the gate (BASE has a sigmoid); a fixed number of Sinkhorn rounds; for the auction rows of equal score fill
up T to a multiple of E, and are thrown away; its bid includes a step of `eps`, so its total is within T * eps of the best.
Confidence: the rule is known from both papers and from Megatron's code, whose auction is from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, is_ours, moves_after_a_step
from sigma_lite.config import ModelConfig, nearest, require
from sigma_lite.model import Router
from sigma_lite.model.assumes import Assumes

METHODS = ("sinkhorn", "auction")


class Assigned(Router):
    """Top K of scores that are balanced over the micro-batch; in evaluation, of the scores.

    Args:
        method: "sinkhorn", nearly even; or "auction", exactly even at K = 1, slow: for small batches.
        rounds: of Sinkhorn.
    """

    assumes = Assumes(k="any; 1 for the auction", causal="in evaluation only")

    def __init__(self, config: ModelConfig, method: str = "sinkhorn", rounds: int = 20):
        super().__init__(config)
        require(method in METHODS, f"method={method!r} does not exist; {nearest(method, METHODS)}")
        require(rounds >= 1, f"rounds={rounds}: must be at least 1")
        self.method, self.rounds = method, rounds
        self.set_k(config.top_k)

    def set_k(self, k: int) -> None:
        require(self.method != "auction" or k == 1, f"the auction gives each token one expert, not {k}: method: sinkhorn")
        super().set_k(k)

    def must_fit(self, balancer: Balancer) -> None:
        moves = is_ours(balancer) and moves_after_a_step(balancer)
        require(not moves, f"{balancer} would move a bias without end: the assignment evens loads out whatever the bias is")

    def choose(self, scores_TE: Tensor) -> Tensor:
        if not self.training:
            return super().choose(scores_TE)
        if self.method == "auction":
            return auction(scores_TE)[:, None]
        return super().choose(sinkhorn(scores_TE.clamp(min=torch.finfo(torch.float32).tiny).log(), self.rounds))


def sinkhorn(logits_TE: Tensor, rounds: int) -> Tensor:
    """log of exp(logits) with columns that sum to T / E and rows that sum to about 1, the more exactly the more rounds."""
    share = torch.tensor(logits_TE.shape[0] / logits_TE.shape[1], device=logits_TE.device).log()
    for _ in range(rounds):
        logits_TE = logits_TE.log_softmax(1)
        logits_TE = logits_TE - logits_TE.logsumexp(0) + share
    return logits_TE


def auction(scores_TE: Tensor, eps: float = 1e-4) -> Tensor:
    """An expert for each token, int64 [T], at most ceil(T / E) tokens each, within T * eps of the largest sum of scores.

    Each expert bids for its best places how much more it likes them than the next best token; the highest bid has the
    token and raises its price; an expert that was outbid bids again (Bertsekas 1992).
    """
    T, E = scores_TE.shape
    places = -(-T // E)
    value_EN = torch.cat((scores_TE, scores_TE.new_zeros(E * places - T, E))).T
    N = E * places
    price_N, owner_N = value_EN.new_zeros(N), torch.full((N,), -1, device=value_EN.device)
    while (owner_N < 0).any():
        for e in range(E):
            free = places - int((owner_N == e).sum())
            if not free:
                continue
            net_N = (value_EN[e] - price_N).masked_fill(owner_N == e, -torch.inf)
            best = net_N.topk(min(free + 1, N - places + free))
            wanted = best.indices[:free]
            floor = best.values[free] if len(best.values) > free else best.values[-1]
            price_N[wanted] += best.values[:free] - floor + eps
            owner_N[wanted] = e
    return owner_N[:T]
