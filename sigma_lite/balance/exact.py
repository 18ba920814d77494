"""Sums without rounding and without float64, which Apple's GPUs lack: fp32 numbers as whole multiples of a small unit.

Whole numbers add up to the same in every order, so a sum does not depend on how many rows a batch or a rank has.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-28  # 3.7e-9; an int64 then holds sums up to 3.4e10, such as the nats of ten billion tokens


def whole(x: Tensor) -> Tensor:
    """Multiples of UNIT, int64, at most UNIT / 2 off. What is not finite becomes 0: count it with `lost`."""
    return torch.where(x.isfinite(), x.float() / UNIT, 0.0).round().long()  # a power of two: the division rounds nothing


def lost(x: Tensor) -> Tensor:
    """1 where `x` is infinite or no number, int64."""
    return (~x.isfinite()).long()


def widest(value: float, device: torch.device) -> Tensor:
    """A number in as many bits as the device has."""
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
