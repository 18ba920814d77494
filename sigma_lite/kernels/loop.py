"""The specification: one matmul per expert, in any dtype. Every faster backend must equal this one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu_loop(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """y_t = sum_k gate_tk * w2_e ( silu(gate_e x_t) * up_e x_t ), with e = ids_tk.

    `unbind` splits the stacked weights once. Indexing `w13[e]` inside the loop is the slow path that many implementations
    ship: chapter 3 asks why.
    """
    y_TD, seen = torch.zeros_like(x_TD), 0
    for expert, (w13_e, w2_e) in enumerate(zip(w13.unbind(0), w2.unbind(0), strict=True)):
        token, slot = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], w13_e).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2_e) * gates_TK[token, slot, None].to(x_TD.dtype)
        y_TD, seen = y_TD.index_add(0, token, y), seen + len(token)
    require_all_seen(seen, ids_TK, len(w13))
    return y_TD


def require_all_seen(seen: int, ids_TK: Tensor, n_experts: int) -> None:
    """IndexError where a slot has gone to no expert: its id does not exist, and its token would lose it without a word."""
    if seen != ids_TK.numel():
        raise IndexError(f"ids must lie in 0..{n_experts - 1}, these reach from {ids_TK.min()} to {ids_TK.max()}")
