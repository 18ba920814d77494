"""All experts of a layer as two stacked tensors, run by any backend of kernels/."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sigma_lite.config import ModelConfig
from sigma_lite.kernels import grouped_swiglu
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.weights import into_stream, passing


class Experts(nn.Module):
    """E SwiGLU networks. Stacked, not a ModuleList: one matmul call, and every expert always has a gradient tensor.

    Outputs are multiplied by a gate that starts near 1 / E for pre-softmax routing; `expert_gain` can make up for it.
    """

    assumes = Assumes()

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F = config.n_experts, config.d_model, config.d_expert
        self.w13 = nn.Parameter(torch.empty(E, 2 * F, D))  # gate rows first, then up rows
        self.w2 = nn.Parameter(torch.empty(E, D, F))
        outer = passing(F, into_stream(config.n_layers) * config.expert_gain)
        self.own_weights = {"w13": passing(D), "w2": outer}
        self.backend = "auto"

    def weights(self) -> tuple[Tensor, Tensor]:
        """w13 and w2 as they are multiplied with; override to quantise them, for instance."""
        return self.w13, self.w2

    def forward(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x_TD.device.type) if torch.is_autocast_enabled(x_TD.device.type) else x_TD.dtype
        w13, w2 = (_on_this_rank(w).to(dtype) for w in self.weights())  # grouped_mm does not follow autocast by itself
        return grouped_swiglu(x_TD.to(dtype), ids_TK, gates_TK, w13, w2, backend=self.backend)


def _on_this_rank(weight: Tensor) -> Tensor:
    """Of experts that are shared out over ranks (DTensor), those that live here."""
    return weight.to_local() if hasattr(weight, "to_local") else weight
