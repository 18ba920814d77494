"""One model over many ranks: a mesh, the parameters of a Transformer on it, and their first values.

The ranks form a grid, data x expert. An expert belongs to one column of it, and the ranks of the column share the storage
of its weights; everything else is shared out over all ranks. Each rank reads rows of its own, so data parallelism spans
the whole grid. Storage is FSDP2's (`fully_shard`): a layer's weights are gathered when they are needed, and gradients are
averaged into the shards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Transformer
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.scale.copies import Copies, placed
from sigma_lite.scale.expert_parallel import agreed_once, expert_parallel
from sigma_lite.scale.padded import padded
from sigma_lite.scale.pipelined import pipelined
from sigma_lite.scale.placement import check


class Mesh(NamedTuple):
    """Both views of the same ranks. Neighbours lie along the expert axis: tokens travel inside a machine if they can."""

    all: DeviceMesh  # [ranks]: attention, routers, norms, embedding
    grid: DeviceMesh  # [data, expert]: experts


def make_mesh(device_type: str, ranks: int, expert_ranks: int) -> Mesh:
    """Raises ConfigError when `ranks` do not form a grid with `expert_ranks` columns."""
    fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
    require(
        expert_ranks in fits,
        f"expert_parallel={expert_ranks} does not divide the {ranks} rank(s) of this run; choose from {fits}",
    )
    grid = init_device_mesh(device_type, (ranks // expert_ranks, expert_ranks), mesh_dim_names=("data", "expert"))
    return Mesh(init_device_mesh(device_type, (ranks,), mesh_dim_names=("all",)), grid)


def check_grid(net: ModelConfig, data: int, expert: int) -> None:
    """ConfigError when the experts of `net` cannot be cut into data x expert pieces."""
    E = net.n_experts
    fits = [n for n in range(1, E + 1) if E % n == 0]
    require(E % expert == 0, f"expert_parallel={expert} does not divide n_experts={E}; choose from {fits}")
    for name, size in (("d_model", net.d_model), ("2 d_expert", 2 * net.d_expert)):
        require(
            size % data == 0,
            f"{name}={size} cannot be cut into {data} equal pieces, one for each rank that shares an expert's weights;"
            " raise expert_parallel or change the number of ranks",
        )


def refuse_custom(custom: Iterable[str]) -> None:
    """ConfigError where a model has parts that nobody has shown to compute the same in pieces."""
    names = ", ".join(f"model.parts.{name}" for name in custom)
    require(not names, f"the strategy ExpertParallel does not serve {names}: leave the strategy out, or train without them")


def shard(
    model: Transformer,
    mesh: Mesh,
    *,
    recompute: bool = False,
    compute_dtype: torch.dtype | None = None,
    exchange_parts: int = 1,
    capacity: float | None = None,
) -> None:
    """Lay a model out over the mesh, in place. A model on the meta device is given storage on the mesh's devices.

    Args:
        model: the same on all ranks. One that has values keeps them; one on the meta device gets, piece by piece, those
            that it would have had on one device.
        recompute: keep only each block's input for the backward pass, and compute the block again there (activation
            checkpointing, 1604.06174).
        compute_dtype: gather experts' weights in this dtype; their gradients are summed in fp32.
        exchange_parts, capacity: how tokens travel to experts; see scale/strategy.py.
    """
    refuse_custom(model.parts.custom)
    data, expert = mesh.grid["data"], mesh.grid["expert"]
    check_grid(model.config, data.size(), expert.size())
    on_meta = any(p.is_meta for p in model.parameters())
    for block in model.blocks:
        _shard_experts(block.moe.experts, data, expert, compute_dtype)
        if expert.size() > 1:
            block.moe.dispatch = travel(expert.get_group(), model.config.n_experts, exchange_parts, capacity)
        if recompute:
            again = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": agreed_once}
            block.forward = functools.partial(checkpoint, block.forward, **again)
        fully_shard(block, mesh=mesh.all)
    fully_shard(model, mesh=mesh.all)
    for method in ("loss", "nats"):  # which use the head's weight without calling the head
        register_fsdp_forward_method(model, method)
    if on_meta:
        _materialise(model, mesh)


def travel(group: dist.ProcessGroup, spots: int, exchange_parts: int = 1, capacity: float | None = None) -> Dispatch:
    """The dispatch over a line of ranks that these settings ask for."""
    if capacity is not None:
        return padded(group, spots, capacity)
    return pipelined(group, spots, exchange_parts) if exchange_parts > 1 else expert_parallel(group, spots)


def place(
    model: Transformer,
    mesh: Mesh,
    experts_LP: np.ndarray | None,
    exchange_parts: int = 1,
    capacity: float | None = None,
) -> None:
    """Let the experts of a sharded model compute where a placement says, from the next forward pass on.

    Only who computes changes: parameters, gradients and the optimizer's state stay where they are. All ranks call this with
    the same placement.

    Args:
        experts_LP: the expert in each spot, for every layer; see scale/placement.py. None: where they are stored.
    """
    expert, E = mesh.grid["expert"], model.config.n_experts
    group, device = expert.get_group(), torch.device(mesh.all.device_type)
    if experts_LP is not None:
        check(experts_LP, len(model.blocks), E, expert.size(), np.shape(experts_LP)[-1])
    for layer, block in enumerate(model.blocks):
        if experts_LP is None:
            block.moe.dispatch, block.moe.experts.fetch = travel(group, E, exchange_parts, capacity), None
            continue
        copies = Copies(experts_LP[layer], E, group, device)
        to_spots = travel(group, experts_LP.shape[1], exchange_parts, capacity)
        block.moe.dispatch, block.moe.experts.fetch = placed(to_spots, copies), copies.fetch


def _shard_experts(experts: Experts, data: DeviceMesh, expert: DeviceMesh, compute_dtype: torch.dtype | None) -> None:
    """Experts along dimension 0 over the expert axis, each of them along dimension 1 over the data axis."""
    for name, weight in list(experts.named_parameters()):
        piece = distribute_tensor(weight.data, expert, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(piece))
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    fully_shard(experts, mesh=data, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
    register_fsdp_forward_method(experts, "in_parts")
    # An expert's gradient already sums the rows of all ranks of its line; the mean over all ranks is what is wanted.
    experts.set_gradient_divide_factor(data.size() * expert.size())
    if data.size() > 1 and dist.get_backend(data.get_group()) == "gloo":  # which cannot scale while it sums;
        experts.set_force_sum_reduction_for_comms(True)  # with one rank torch 2.13 would then divide twice


@torch.no_grad()
def _materialise(model: Transformer, mesh: Mesh) -> None:
    """Every rank draws each whole parameter and keeps its piece, so weights do not depend on the layout."""
    device = torch.device(mesh.all.device_type)
    model.to_empty(device=device)
    for block in model.blocks:
        block.moe.router.bias.zero_()
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        model.initialise(name, whole)
        parameter.to_local().copy_(as_sharded_like(parameter, whole).to_local())


def as_sharded_like(parameter: DTensor, whole: torch.Tensor) -> DTensor:
    """A tensor that every rank has in full, laid out as a parameter is; nothing is sent."""
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
