"""What the processes of benchmarks/exchange.py do: a module of its own, because they cannot see the one that was started."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from sigma_lite.balance.balancer import GlobalLBL
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.scale.counted import Messages, as_row
from sigma_lite.scale.shard import make_mesh, shard

NET = ModelConfig(
    vocab_size=256, n_layers=2, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, n_experts=32, d_expert=64, top_k=2
)
WAYS = {
    "as a whole": {},
    "recompute": {"recompute": True},
    "2 parts": {"exchange_parts": 2},
    "4 parts": {"exchange_parts": 4},
    "padded, capacity 2": {"capacity": 2.0},
    "padded, always fits": {"capacity": 4.0},
}


def step(model: Transformer, ids_BS: torch.Tensor) -> None:
    lm, routings = model.loss(ids_BS, ids_BS.roll(-1, 1))
    Objective(GlobalLBL(), 0.01, 0.0, len(routings))(lm, routings, PooledCounts(), len(ids_BS)).total.backward()


def measured(rank: int, rounds: int) -> dict[str, Any]:
    """Messages of one step and seconds of `rounds` others, for each way."""
    R = dist.get_world_size()
    ids_BS = torch.randint(0, NET.vocab_size, (8, 128), generator=torch.Generator().manual_seed(rank))
    models, found = {}, {}
    for name, options in WAYS.items():
        torch.manual_seed(0)
        with torch.device("meta"):
            models[name] = Transformer(NET)
        shard(models[name], make_mesh("cpu", R, R), **options)
        step(models[name], ids_BS)
        with Messages() as messages:
            step(models[name], ids_BS)
        found[name] = {"row": as_row(messages), "seconds": []}
    for _ in range(rounds):
        for name, model in models.items():
            dist.barrier()
            begun = time.perf_counter()
            step(model, ids_BS)
            found[name]["seconds"].append(time.perf_counter() - begun)
    return found
