"""What many implementations ship: index the stacked weights inside the loop. Equal values, E squared backward work.

`w13[e]` hands autograd a slice. Its gradient must have the shape of the whole stack, so each of the E backward steps
allocates [E, 2F, D] zeros, fills one slice, and adds all of it to the sum. kernels/loop.py differs by one `unbind`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.loop import require_all_seen


def grouped_swiglu_naive(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Same value as kernels/loop.py, in any dtype. Never chosen by "auto": it is here to be measured."""
    y_TD, seen = torch.zeros_like(x_TD), 0
    for expert in range(len(w13)):
        token, slot = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], w13[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[expert]) * gates_TK[token, slot, None].to(x_TD.dtype)
        y_TD, seen = y_TD.index_add(0, token, y), seen + len(token)
    require_all_seen(seen, ids_TK, len(w13))
    return y_TD
