"""Rotary position embedding (RoPE; Su et al., 2104.09864): position turns pairs, so products see only distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every pair's angle at every position, [S, 1, C / 2], fp32."""

    cos: Tensor
    sin: Tensor


def rotation(positions_S: Tensor, head_dim: int, theta: float) -> Rotation:
    """Angles position * theta^(-2i / C) for pair i: the first pairs turn fast, the last hardly at all."""
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float32) / head_dim
    angles = positions_S.float()[:, None, None] * theta**-exponents
    return Rotation(angles.cos(), angles.sin())


def rotate(x_BSHC: Tensor, turn: Rotation) -> Tensor:
    """Turn pair (i, i + C/2) of every head by its position's angle; lengths do not change.

    (a, b) becomes (a cos - b sin, b cos + a sin): x cos + (the other of each pair) (-sin, sin).
    """
    cos, sin = turn.cos.to(x_BSHC.dtype), turn.sin.to(x_BSHC.dtype)
    other_BSHC = x_BSHC.roll(x_BSHC.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BSHC * torch.cat((cos, cos), -1), other_BSHC, torch.cat((-sin, sin), -1))
