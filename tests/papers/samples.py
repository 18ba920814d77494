"""What the papers' tests share: a small net, a routed batch of a router, a routing of given logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import ModelConfig
from sigma_lite.model import Router, Routing

NET = ModelConfig(
    vocab_size=50, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8, top_k=4,
    router_init_std=0.5,
)  # fmt: skip


def routed(router: Router, T: int = 60, seed: int = 0) -> Routing:
    torch.manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(0, 0.5)
    return router(torch.randn(T, NET.d_model))


def routing(logits: Tensor, K: int = 1) -> tuple[Routing, Tensor]:
    probs = logits.softmax(-1)
    ids = probs.topk(K).indices
    return Routing(probs, ids, probs.gather(1, ids), logits), load_share(expert_counts(ids, logits.shape[1]))


def sure(ids: Tensor, E: int) -> Tensor:
    return torch.nn.functional.one_hot(ids, E) * 1e4


def skewed(E: int = 16, T: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(T, E, generator=generator) + 2 * torch.randn(E, generator=generator)).requires_grad_()
