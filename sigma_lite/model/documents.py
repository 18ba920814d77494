"""Packed rows: several documents stand in one row, and attention stays inside each. Three ways to say who may look at whom.

masked  a table [B, S, S] of who may look at whom. The specification; its memory and its work grow with S squared.
blocks  the rows cut into pieces of whole documents. Nobody looks into another piece, so no score between pieces is made.
varlen  torch's flash attention over documents laid end to end. It needs a GPU and 16-bit numbers; not run on one by us.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sigma_lite.config import PIECE, ModelConfig, require

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older than torch 2.10, or built without it
    varlen_attn = None


@dataclass(frozen=True)
class Pieces:
    """Whole documents of the rows laid end to end, T = B * S positions: one long one, or several short ones together.

    All pieces but the masks of short documents need no table, and those tables have at most T * PIECE entries in all.
    """

    sizes: list[int]  # positions of each piece; their sum is T
    masks: list[Tensor | None]  # bool [1, n, n] of each piece of several documents; None: one document, plain causal


@dataclass(frozen=True)
class Varlen:
    """Where documents begin in the rows laid end to end, as flash attention takes it."""

    starts_N: Tensor  # int32, 0 first and T last
    longest: int  # positions; no document has more


def attention_way(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(masked | blocks | varlen, why) for rows of `length` tokens.

    Raises: ConfigError where `config.attention` asks for a way that cannot run here.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    way = config.attention_way(length, device.type == "cuda", half)
    why_not = _varlen_why_not(config.head_dim, device, half) if way == "varlen" else ""
    if config.attention != "auto":
        require(not why_not, f"net.attention=varlen cannot run here: {why_not}; set net.attention=auto")
        return way, "asked for by net.attention"
    if why_not:
        return "blocks", f"varlen cannot run here: {why_not}"
    return way, {
        "masked": f"rows of {length} tokens: a table of who may look at whom is small",
        "blocks": f"rows of {length} tokens: a table for them would cost more than the attention",
        "varlen": "flash attention makes no score between documents and keeps no table",
    }[way]


def _varlen_why_not(head_dim: int, device: torch.device, half: bool) -> str:
    if device.type != "cuda":
        return f"flash attention needs a CUDA GPU, this is {device.type}"
    if not half:
        return "flash attention needs 16-bit numbers (trainer.precision=bf16-mixed)"
    if varlen_attn is None or "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return f"torch {torch.__version__} has no varlen_attn with grouped heads"
    if head_dim % 8 or head_dim > 256:
        return f"flash attention needs a head_dim that is a multiple of 8 and at most 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return ""


def document_lengths(documents_BS: Tensor) -> Tensor:
    """Positions of each document in the rows laid end to end, int64 [N] on the same device; a row's end ends a document.

    The host waits for the number of documents; once a forward pass, not once a layer.

    Raises: ValueError for a document that comes back after another one: the mask alone can say that.
    """
    changes_BS = documents_BS.diff(dim=1)
    if (changes_BS < 0).any():
        raise ValueError(
            "document numbers fall within a row, so one may come back: number them upwards, or attention=masked"
        )
    first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    first_BS[:, 1:] = changes_BS != 0
    starts_N = first_BS.flatten().nonzero()[:, 0]
    return starts_N.diff(append=starts_N.new_tensor([documents_BS.numel()]))


def pieces(documents_BS: Tensor) -> Pieces:
    """Cut the rows into pieces: a document joins those before it as long as they have at most PIECE positions together."""
    groups = grouped(document_lengths(documents_BS).tolist())
    masks = [None if len(group) == 1 else _inside(group, documents_BS.device) for group in groups]
    return Pieces([sum(group) for group in groups], masks)


def grouped(lengths: Iterable[int]) -> list[list[int]]:
    """Consecutive lengths, in groups of at most PIECE together; a length above that is a group of its own."""
    groups: list[list[int]] = []
    filled = PIECE
    for length in lengths:
        if filled + length > PIECE:
            groups.append([])
            filled = 0
        groups[-1].append(length)
        filled += length
    return groups


def _inside(lengths: list[int], device: torch.device) -> Tensor:
    """Causal and inside each document, bool [1, n, n]."""
    document_n = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    return ((document_n[:, None] == document_n).tril())[None]


def varlen(documents_BS: Tensor) -> Varlen:
    starts_N = document_lengths(documents_BS).cumsum(0, dtype=torch.int32)
    return Varlen(torch.nn.functional.pad(starts_N, (1, 0)), documents_BS.shape[1])
