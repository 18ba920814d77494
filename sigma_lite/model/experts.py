"""All experts of a layer as two stacked tensors, run by any backend of kernels/."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sigma_lite.config import ModelConfig
from sigma_lite.kernels import grouped_swiglu
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.weights import into_stream, passing

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_TD, ids_TK, gates_TK) -> y_TD, as `Experts.forward`."""


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
        self.fetch: Callable[[Tensor], Tensor] | None = None  # of ranks that compute other experts than they store

    def weights(self) -> tuple[Tensor, Tensor]:
        """w13 and w2 as they are multiplied with; override to quantise them, for instance."""
        return self.w13, self.w2

    def forward(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        w13, w2 = self._ready(x_TD)
        return grouped_swiglu(x_TD.to(w13.dtype), ids_TK, gates_TK, w13, w2, backend=self.backend)

    def in_parts(self, parts: Sequence[Tensor], compute: Callable[[int, Tensor, Run], Tensor]) -> list[Tensor]:
        """[compute(n, part, run) for each part]; `run` is `forward`, with weights that are made ready once for all."""
        w13, w2 = self._ready(parts[0])

        def run(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
            return grouped_swiglu(x_TD.to(w13.dtype), ids_TK, gates_TK, w13, w2, backend=self.backend)

        return [compute(n, part, run) for n, part in enumerate(parts)]

    def _ready(self, x_TD: Tensor) -> list[Tensor]:
        """Of the experts computed here, in the dtype to compute in: grouped_mm does not follow autocast by itself."""
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        stored = [_on_this_rank(weight).to(dtype) for weight in self.weights()]
        return [self.fetch(weight) for weight in stored] if self.fetch else stored


def _on_this_rank(weight: Tensor) -> Tensor:
    """Of experts that are shared out over ranks (DTensor), those that live here."""
    return weight.to_local() if hasattr(weight, "to_local") else weight
