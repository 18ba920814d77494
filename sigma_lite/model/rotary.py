"""Rotary position embedding (RoPE; Su et al., 2104.09864): position turns pairs, so products see only distance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.config import RopeScaling

FAST, SLOW = 32, 1  # turns in an original row: YaRN's beta and alpha, and transformers' beta_fast and beta_slow


class Rotation(NamedTuple):
    """Cosine and sine of every pair's angle at every position, [S, 1, C / 2], fp32."""

    cos: Tensor
    sin: Tensor


def rotation(positions_S: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotation:
    """Angles position * theta^(-2i / C) for pair i: the first pairs turn fast, the last hardly at all.

    With `scaling` rows may be longer than those a model was trained on: see `slowed` and `temperature`.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float32) / head_dim
    if scaling is None:
        angles = positions_S.float()[:, None, None] * theta**-exponents
        return Rotation(angles.cos(), angles.sin())
    angles = positions_S.float()[:, None, None] * slowed(theta**-exponents, theta, scaling)
    larger = temperature(scaling)
    return Rotation(angles.cos() * larger, angles.sin() * larger)


def slowed(speed_P: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Angle per position of each of P = C / 2 pairs, for rows `factor` times as long.

    linear  Position interpolation (2306.15595): all pairs turn `factor` times slower, so no angle is new to the model.
    yarn    By parts (YaRN, 2309.00071, section 3.2): a pair that turns more than FAST times in an original row stays, one
            that turns less than SLOW times is slowed, those between are mixed. Bounds are whole pairs, as in transformers.
    """
    if scaling.kind == "linear":
        return speed_P / scaling.factor
    P = len(speed_P)
    first, last = (P * math.log(scaling.original / (2 * math.pi * turns)) / math.log(theta) for turns in (FAST, SLOW))
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * P - 1)
    ramp_P = ((torch.arange(P, device=speed_P.device) - first) / max(last - first, 0.001)).clamp(0, 1)
    return speed_P * (1 - ramp_P) + speed_P / scaling.factor * ramp_P


def temperature(scaling: RopeScaling) -> float:
    """Factor on queries and on keys, so that attention over more positions stays as sharp (2309.00071, section 3.4)."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling.kind == "yarn" else 1.0


def rotate(x_BSHC: Tensor, rotation: Rotation) -> Tensor:
    """Turn pair (i, i + C/2) of every head by its position's angle; lengths do not change.

    (a, b) becomes (a cos - b sin, b cos + a sin): x cos + (the other of each pair) (-sin, sin).
    """
    cos, sin = rotation.cos.to(x_BSHC.dtype), rotation.sin.to(x_BSHC.dtype)
    other_BSHC = x_BSHC.roll(x_BSHC.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BSHC * torch.cat((cos, cos), -1), other_BSHC, torch.cat((-sin, sin), -1))
