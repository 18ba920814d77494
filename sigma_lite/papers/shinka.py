"""The balance loss that ShinkaEvolve found by search (2509.19349): global LBL, and a hinge for starved experts.

The search mutated the global-batch LBL of a 556M model with 64 experts, 8 of them active, and judged each program by the
final cross entropy plus the deviation of the loads. One layer of the winner:

    E sum_e f_e P_e  +  0.1 s(P) sum_e max(0, tau - f_e),        s(P) = 0.5 + (1 - H(P) / log E)

The paper disagrees with itself on tau: the formula prints 0.064 / E, the listing of the program has ten times as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import load_balancing_loss, mean_over_tokens
from sigma_lite.balance.metrics import entropy
from sigma_lite.config import nearest, require
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes

PRINTED, LISTING = 0.064, 0.64
"""tau times E in the paper's formula, and in its program: below this share of an even load an expert counts as starved."""
HINGES = ("counts", "probs", "straight_through")


class Shinka(Balancer):
    """Global LBL, and a term that acts only while an expert is starved.

    Counts have no gradient. So the paper's hinge does not lift the starved expert: it is a switch, and all gradient of the
    term flows through s(P), which pushes the mean probabilities towards flat. Two variants of ours let it lift.

    Args:
        threshold: tau * E. 0.064 is printed, 0.64 is in the listing; the default is the listing, for that is the program.
        strength: of the added term; 0.1 in the paper.
        hinge: on the "counts" f, as in the paper; on the "probs" P; or "straight_through": the value of f, and the
            gradient as if f were P.
    """

    assumes = Assumes()

    def __init__(self, threshold: float = LISTING, strength: float = 0.1, hinge: str = "counts"):
        require(0 <= threshold <= 1, f"threshold={threshold}: a share of the even load, so it must lie in 0..1")
        require(hinge in HINGES, f"hinge {hinge!r} does not exist; {nearest(hinge, HINGES)}")
        self.threshold, self.strength, self.hinge = threshold, strength, hinge

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        """Balanced, or flat with no expert starved: 1. One sure expert: E + 1.5 * strength * threshold * (1 - 1 / E)."""
        P_E = mean_over_tokens(routing.probs)
        share_E = {"counts": f_E, "probs": P_E, "straight_through": f_E + P_E - P_E.detach()}[self.hinge]
        lbl = load_balancing_loss(routing.probs, routing.ids, f_E)
        return lbl + self.strength * concentration(P_E) * missing_share(share_E, self.threshold)


def missing_share(f_E: Tensor, threshold: float) -> Tensor:
    """sum_e max(0, tau - f_e), tau = threshold / E. No expert starved: 0. One has everything: threshold * (1 - 1 / E)."""
    return torch.relu(threshold / len(f_E) - f_E).sum()


def concentration(P_E: Tensor) -> Tensor:
    """s(P) = 0.5 + (1 - H(P) / log E): 0.5 (flat) .. 1.5 (one expert has all probability). Needs E >= 2."""
    return 1.5 - entropy(P_E) / math.log(len(P_E))
