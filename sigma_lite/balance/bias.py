"""Loss-free balance: a bias on the scores that decide, moved after each step against last step's loads.

The rule is Auxiliary-Loss-Free Load Balancing (Wang et al., 2408.15664; also DeepSeek-V3, 2412.19437). Han & Zhong
(2512.03915) read it as dual ascent on an assignment problem: b is the price of an expert's capacity. See balance/dual.py.

Tensors are [E] or [L, E]: everything works along the last axis.
"""

from __future__ import annotations

from torch import Tensor


def bias_step(counts: Tensor, rule: str, rate: float) -> Tensor:
    """What to add to the bias after a step with these loads; fp32, the shape of `counts`.

    Args:
        counts: slots per expert over the whole step, all ranks and micro-batches.
        rule: "sign": +-rate, whatever the distance (0 for an expert exactly at its share).
            "proportional": rate * (1 - load / mean load), which calms down as balance is reached.
        rate: u > 0, in units of the score (a probability).

    Returns: positive for an expert with too few tokens. With nothing counted: 0.
    """
    total = counts.sum(-1, keepdim=True)  # whole numbers until the division: E * (1 / E) in fp32 is not 1 for E = 41
    short = (total - counts.shape[-1] * counts) / total.clamp(min=1)  # 1: no token; 0: exactly its share; 1 - E: all
    if rule == "sign":
        return rate * short.sign()
    if rule == "proportional":
        return rate * short
    raise ValueError(f"bias rule {rule!r} does not exist: choose sign or proportional")


def centred(bias: Tensor) -> Tensor:
    """The bias with mean 0. No choice changes: top-k sees differences only. It stops the mean from drifting."""
    return bias - bias.mean(-1, keepdim=True)


def spread(bias: Tensor) -> Tensor:
    """max - min, >= 0. Scores lie in (0, 1): two experts whose biases differ by 1 are ranked without regard to the token."""
    return bias.amax(-1) - bias.amin(-1)


def rate_at(step: int, rate: float, decay: str = "none") -> float:
    """u at an optimizer step: constant, or falling as 1 / sqrt(step + 1), which lets sign steps settle."""
    return rate / (step + 1) ** 0.5 if decay == "sqrt" else rate
