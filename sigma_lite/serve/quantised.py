"""Weights as integers with a scale for each row, in memory (convert/stored.py) and in the files of an export."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sigma_lite.serve import layout

KIND = "sigma_lite_int8_"  # begins the model_type: transformers refuses one that it does not know, and loads any integers
SCALE = "_scale"  # ends the name of an integer tensor's scales


def quantise(w: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor]:
    """(integers, scales) with w close to integers x scale: |error| <= scale / 2. Symmetric: 0 stays 0.

    Args:
        w: [..., R, C].
        group: numbers of a row that share a scale; 0: the whole row.

    Returns: int8 [..., R, C] in -(2^(bits-1) - 1) .. 2^(bits-1) - 1, fp32 [..., R, C / group].
    """
    grouped = w.detach().float().unflatten(-1, (-1, group or w.shape[-1]))
    most = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / most
    integers = (grouped / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-most, most)
    return integers.flatten(-2).to(torch.int8), scale[..., 0]


def dequantise(integers: Tensor, scale: Tensor) -> Tensor:
    """fp32 of the integers' shape."""
    groups = scale.shape[-1]
    return (integers.unflatten(-1, (groups, -1)).float() * scale[..., None]).flatten(-2)


def small(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model in the layout of an export as int8 experts, fp32 routers and the rest in bfloat16.

    Routers keep their precision, because the expert with the largest logit is chosen whatever the distance to the next.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            found[name], found[name + SCALE] = quantise(tensor, bits=8)
        else:
            found[name] = tensor.float() if name.endswith(layout.ROUTER[1]) else tensor.bfloat16()
    return found
