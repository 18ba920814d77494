"""Scale-free LBL: our own answer to the blind spot. The balance loss of a router whose logits cannot be shrunk away.

LBL can be lowered by making all logits small: P becomes flat, no choice changes, and the loss reports balance. Here each
layer's logits are first divided by their own spread, so that shrinking them changes nothing, and then by a temperature
well below 1, so that P is close to the share of tokens an expert wins. What is left to lower the loss is to move tokens.
Unlike Top-1 LBL (Sigma-MoE-Tiny, 2512.16248) nothing asks the router to be sure of itself, which is the language model's
business. Skywork-MoE (2406.06563) normalises the logits of the gate itself, token by token; here only the loss sees them so.
"""

from __future__ import annotations

from torch import Tensor

from sigma_lite.balance.balancer import Balancer
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes


def scale_free_load_balancing_loss(
    logits_TE: Tensor, f_E: Tensor, temperature: float = 0.3, through_spread: bool = False
) -> Tensor:
    """E * sum_e f_e q_e with q = mean over tokens of softmax(z / temperature), z = logits in units of their spread.

    Args:
        logits_TE: router logits, [T, E].
        f_E: load share, no gradient.
        temperature: > 0, in standard deviations of a layer's centred logits. Of 96 normal logits the best leads by about
            0.3; a smaller temperature counts winners, a larger one looks at all experts, as LBL does.
        through_spread: let the gradient through the spread too. It is then orthogonal to the logits: no step asks for
            smaller ones, as a step of the loss with the spread held fixed does, in vain.

    Returns: scalar >= 0. Balanced: 1. Collapsed and sure: E. Logits * g: the same for every g > 0. No spread at all: 1.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0; try 0.3")
    centred_TE = logits_TE.float() - logits_TE.float().mean(-1, keepdim=True)
    spread = (centred_TE if through_spread else centred_TE.detach()).square().mean().clamp(min=1e-24).sqrt()
    q_TE = (centred_TE / (temperature * spread)).softmax(-1)
    return f_E.shape[-1] * (f_E * q_TE.sum(0) / max(len(q_TE), 1)).sum()


class ScaleFreeLBL(Balancer):
    """`scale_free_load_balancing_loss` with the load share of the whole step."""

    assumes = Assumes()

    def __init__(self, temperature: float = 0.3, through_spread: bool = False):
        self.temperature, self.through_spread = temperature, through_spread

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return scale_free_load_balancing_loss(routing.logits, f_E, self.temperature, self.through_spread)
