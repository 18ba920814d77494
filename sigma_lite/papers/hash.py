"""Hash routing (Hash Layers, 2106.04426): the token's id decides which expert works, and no router is learned.

The paper's: a fixed random function from the vocabulary to the experts; the expert's output is not multiplied by a gate; it
does as well as a learned router at its sizes. Balanced only up to the frequencies of tokens: an expert that gets the most
frequent token has at least its share, in every batch. Ours: each layer hashes in another way; K > 1 takes the next K - 1
experts too, with the gate 1 / K (the paper's MultiHash joins pieces of K experts instead); the hash is splitmix64, so that
every device and every process sends a token to the same place and nothing has to be kept. The paper's balanced and
clustered tables are left out. Confidence: the paper's summary was read, its code not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, is_ours, moves_after_a_step
from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes

GOLDEN, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Hashed(Router):
    """Expert `hashed(token)` of E, for every occurrence of a token.

    Args:
        seed: of the hash; layers differ in any case.
    """

    assumes = Assumes(parameters="none, and no router at all")
    reads_tokens = True

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__(config)
        del self.weight
        self.own_weights, self.n_experts, self.seed = {}, config.n_experts, seed

    def must_fit(self, balancer: Balancer) -> None:
        moves = is_ours(balancer) and moves_after_a_step(balancer)
        require(not moves, f"{balancer} would move a bias that changes no choice: the token's id decides")

    def forward(self, x_TD: Tensor, tokens_T: Tensor) -> Routing:
        """As `Router.forward`; probs are 1 / K on the K experts of a token, logits 0: nothing was scored."""
        ids_TK = hashed(tokens_T, self.n_experts, self.top_k, self.seed * 1000 + self.layer)
        probs_TE = F.one_hot(ids_TK, self.n_experts).float().mean(1)
        return Routing(probs_TE, ids_TK, torch.full_like(ids_TK, 1, dtype=torch.float32) / self.top_k, 0 * probs_TE)


def hashed(tokens_T: Tensor, n_experts: int, K: int = 1, salt: int = 0) -> Tensor:
    """Experts of each token id, int64 [T, K]: a random one, and those that follow it."""
    first_T = splitmix64(tokens_T + salt * 2**32) % n_experts
    return (first_T[:, None] + torch.arange(K, device=tokens_T.device)) % n_experts


def splitmix64(x: Tensor) -> Tensor:
    """The x-th number of splitmix64 (Steele, Lea & Flood 2014), int64: all 64 bits, read as a signed number."""
    x = (x + 1) * GOLDEN
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros coming in, which torch does for no signed number."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
