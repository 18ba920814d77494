"""What the ranks of the chapter on expert parallelism do. It is here because other processes cannot see a notebook."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sigma_lite.balance.balancer import GlobalLBL
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing
from sigma_lite.scale.expert_parallel import expert_parallel
from sigma_lite.scale.shard import make_mesh, shard


class Travelled(NamedTuple):
    """What one rank saw of a layer whose experts are shared out."""

    y_TD: Tensor  # results of its own tokens
    dx_TD: Tensor  # gradient of its own tokens, for the loss y.square().sum()
    rows: int  # rows that its experts computed


def layer(rank: int, net: ModelConfig, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Travelled:
    """One layer over all ranks. Everybody is given everything and uses its own part of tokens and experts only."""
    R = dist.get_world_size()
    experts = Experts(replace(net, n_experts=net.n_experts // R))
    with torch.no_grad():
        experts.w13.copy_(w13.chunk(R)[rank])
        experts.w2.copy_(w2.chunk(R)[rank])
    seen = []
    experts.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    mine_TD = x_TD.chunk(R)[rank].clone().requires_grad_()
    nothing = torch.empty(0)  # dispatch asks for the choice only
    routing = Routing(probs=nothing, ids=ids_TK.chunk(R)[rank], gates=gates_TK.chunk(R)[rank], logits=nothing)
    y_TD = expert_parallel(dist.group.WORLD, net.n_experts)(mine_TD, routing, experts)
    y_TD.square().sum().backward()
    return Travelled(y_TD.detach(), mine_TD.grad, seen[0])


def gradients(
    rank: int, net: ModelConfig, ids_BS: Tensor, expert_ranks: int, seed: int = 0, forget: bool = False
) -> dict[str, Tensor]:
    """Gradients of a whole model, one step over this rank's rows, on a grid with `expert_ranks` columns.

    Args:
        seed: of the weights, which do not depend on the layout.
        forget: divide experts' gradients by the data ranks only, as FSDP2 does when nobody tells it otherwise.
    """
    R = dist.get_world_size()
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(net)
    shard(model, make_mesh("cpu", R, expert_ranks))
    if forget:
        for block in model.blocks:
            block.moe.experts.set_gradient_divide_factor(R // expert_ranks)
    return step(model, ids_BS.chunk(R)[rank])


def step(model: Transformer, ids_BS: Tensor) -> dict[str, Tensor]:
    """Gradients by name of loss and balance loss on these rows; counts are pooled over ranks, if there are any."""
    lm, routings = model.loss(ids_BS, ids_BS.roll(-1, 1))
    objective = Objective(GlobalLBL(), weight=0.1, z_weight=0.0, n_layers=len(routings))
    objective(lm, routings, PooledCounts(), len(ids_BS)).total.backward()
    return {name: _whole(p.grad) for name, p in model.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
