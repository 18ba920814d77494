"""LatentMoE (2601.18089): experts work in a narrower space, so that more of them fit and less is sent between devices.

The paper's: z = W_down x of width l = d / 2; routed experts read and write z; y = shared + W_up RMSNorm(u), where u is the
gated sum of their outputs; the router reads the full x. Ours: no shared expert (papers/shared.py has it); `keep_scale`.

At K = 1 the norm is a trap: u = gate * E(z), and RMSNorm(gate * E(z)) = RMSNorm(E(z)), so the gate cancels and no gradient
of the language model reaches the router. `keep_scale` multiplies by the sum of a token's gates again after the norm. At
K = 1 the experts are refused without it, because their router cannot learn. Confidence: formula read, code not.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.weights import into_stream, passing


class Latent(nn.Module):
    """The usual experts at width `width`, between two matrices that all of them share.

    Args:
        width: l; default half of the model's.
        keep_scale: multiply what the norm gives by the sum of the token's gates: ours, and needed at K = 1.
    """

    assumes = Assumes(k="any; 2 or more without keep_scale", parameters="two matrices and a norm, but smaller experts")

    def __init__(self, config: ModelConfig, width: int | None = None, keep_scale: bool = False):
        super().__init__()
        D, width = config.d_model, config.d_model // 2 if width is None else width
        require(1 <= width <= D, f"width={width}: must lie in 1..{D}, the width of the model")
        self.keep_scale = keep_scale
        self.set_k(config.top_k)
        self.down, self.up = nn.Linear(D, width, bias=False), nn.Linear(width, D, bias=False)
        self.norm = RMSNorm(width, config.norm_eps)
        self.inner = Experts(dataclasses.replace(config, d_model=width))
        outer = passing(width, into_stream(config.n_layers))
        self.own_weights = {"down.weight": passing(D), "up.weight": outer}

    def set_k(self, k: int) -> None:
        why = "the norm cancels a single gate, and the router would not learn: set keep_scale: true"
        require(self.keep_scale or k > 1, f"keep_scale=False with {k} expert per token: {why}")

    def around(self, x_TD: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
        u_TL = self.norm(dispatch(self.down(x_TD), routing, self.inner))
        return self.up(u_TL * routing.gates.sum(-1, keepdim=True).to(u_TL.dtype) if self.keep_scale else u_TL)
