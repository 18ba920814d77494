"""What an expert is worth: the loss without it, when its tokens go to the next best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sigma_lite.config import require
from sigma_lite.serve.marked import Marked, Routed, route
from sigma_lite.serve.trained import Trained


@contextlib.contextmanager
def without(router: nn.Module, expert: int) -> Iterator[None]:
    """No token chooses this expert inside the block: its score's bias is -inf."""
    before = router.bias.clone()
    router.bias[expert] = -torch.inf
    try:
        yield
    finally:
        router.bias.copy_(before)


def ablated(trained: Trained, marked: Marked, base: Routed) -> Iterator[tuple[int, int, Tensor]]:
    """(layer, expert, rise of each token's cost in nats, fp64 [T]) for every expert that some token chose.

    Each takes a whole forward pass of `marked`; `base` is what it costs with all experts.

    Raises: ConfigError where a layer chooses all its experts, or a router does not heed the bias.
    """
    E, routers = trained.model.config.n_experts, [block.moe.router for block in trained.model.blocks]
    for layer, router in enumerate(routers):
        spare = router.top_k < E and isinstance(getattr(router, "bias", None), Tensor)
        require(spare, f"layer {layer} chooses {router.top_k} of {E} experts ({type(router).__name__}): it can spare none")
    for layer, router in enumerate(routers):
        for expert in range(E):
            if not (base.experts[layer] == expert).any():
                continue  # without it nothing changes
            with without(router, expert):
                changed = route(trained, marked)
            still = bool((changed.experts[layer] == expert).any())
            require(not still, f"{type(router).__name__} does not heed a bias: expert {expert} of layer {layer} stays")
            yield layer, expert, (changed.nats_T - base.nats_T).double()


def agreement(shares_EG: np.ndarray, rises_EG: np.ndarray, own_E: np.ndarray, least: int = 20) -> float:
    """Correlation, over experts and labels, of an expert's share of a label's tokens with how much that label suffers
    without it: -1..1, NaN where nothing varies. Experts with fewer than `least` tokens are left out: they are noise."""
    used = own_E >= least
    shares, rises = shares_EG[used].ravel(), rises_EG[used].ravel()
    known = np.isfinite(shares) & np.isfinite(rises)
    varies = known.sum() > 2 and shares[known].std() > 0 and rises[known].std() > 0
    return float(np.corrcoef(shares[known], rises[known])[0, 1]) if varies else float("nan")
