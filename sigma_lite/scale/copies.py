"""Experts that compute elsewhere than they are stored, and in several places at once.

Weights, gradients and moments of an expert stay on the rank that stores it. Before a layer runs, weights go to the ranks
that compute it, as FasterMoE's shadow experts do (PPoPP 2022); in the backward pass their gradients come home and are
summed there, in fp32 whatever they travel in. So a placement may change between any two steps, nothing has to be moved
for it, and no checkpoint knows it.

The price is weights on the wire, in every forward and backward pass, for each expert that is not at home. Sizes follow from
the placement, which every rank knows: nobody waits for them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sigma_lite.kernels.plan import routing_plan
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing
from sigma_lite.scale.expert_parallel import all_to_all


class Copies:
    """One layer's placement as one rank of `group` sees it.

    Args:
        expert_P: the expert in each spot; rank r has the r-th part of them.
    """

    def __init__(self, expert_P: np.ndarray, n_experts: int, group: dist.ProcessGroup, device: torch.device):
        R, self.group, self.rank = dist.get_world_size(group), group, dist.get_rank(group)
        self.n_experts, stored = n_experts, n_experts // R
        needed_R = [np.unique(spots) for spots in expert_P.reshape(R, -1)]
        mine, first = needed_R[self.rank], self.rank * stored
        sends_R = [needed[(needed >= first) & (needed < first + stored)] - first for needed in needed_R]
        self.sent_R = [len(sends) for sends in sends_R]
        self.received_R = np.bincount(mine // stored, minlength=R).tolist()
        self.send_U = torch.as_tensor(np.concatenate(sends_R), device=device)
        spots_S = expert_P.reshape(R, -1)[self.rank]
        self.spot_S = torch.as_tensor(np.searchsorted(mine, spots_S), device=device)
        count_E = np.bincount(expert_P, minlength=n_experts)
        spots_EC = np.zeros((n_experts, count_E.max()), dtype=np.int64)
        for expert in range(n_experts):
            spots_EC[expert, : count_E[expert]] = np.flatnonzero(expert_P == expert)
        self.count_E = torch.as_tensor(count_E, device=device)
        self.spots_EC = torch.as_tensor(spots_EC, device=device)

    def fetch(self, weight: Tensor) -> Tensor:
        """Weights of this rank's spots, [S, ...], from those that it stores, [E / R, ...]; gradients go home and add up."""
        return _Fetch.apply(weight, self)

    def spread(self, ids_TK: Tensor) -> Tensor:
        """The spot of each choice, int64 [T, K]: an expert's rows go to its copies in turn, each rank begins elsewhere."""
        plan = routing_plan(ids_TK, self.n_experts)
        begin_E = torch.cat((plan.ends_E.new_zeros(1), plan.ends_E[:-1])).long()
        turn_TK = plan.row_TK - begin_E[ids_TK] + self.rank
        return self.spots_EC[ids_TK, turn_TK % self.count_E[ids_TK]]


class _Fetch(torch.autograd.Function):
    """Weights out, gradients home. Those of copies are added in fp32: bf16 keeps 8 bits, so that of 256 + 1 + 1 + 1 the
    ones would be lost. torch's index_add does so by itself on a CPU, and on a GPU adds in the dtype that it is given. On
    the wire gradients have the weights' own bytes."""

    @staticmethod
    def forward(ctx, weight: Tensor, copies: Copies) -> Tensor:
        ctx.copies, ctx.stored = copies, len(weight)
        sent = weight.index_select(0, copies.send_U)
        return all_to_all(sent, copies.sent_R, copies.received_R, copies.group)[0].index_select(0, copies.spot_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, dspots: Tensor) -> tuple[Tensor, None]:
        copies = ctx.copies
        dsent = _added(dspots, copies.spot_S, sum(copies.received_R))
        home = all_to_all(dsent, copies.received_R, copies.sent_R, copies.group)[0]
        return _added(home, copies.send_U, ctx.stored), None


def _added(gradients: Tensor, index: Tensor, size: int) -> Tensor:
    """Entries of the same index added up in fp32, [size, ...], rounded once."""
    total = gradients.new_zeros(size, *gradients.shape[1:], dtype=torch.float32)
    return total.index_add_(0, index, gradients.float()).to(gradients.dtype)


def placed(dispatch: Dispatch, copies: Copies) -> Dispatch:
    """A dispatch over spots in the place of experts."""

    def to_spots(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        return dispatch(x_TD, routing.with_tensors(ids=copies.spread(routing.ids)), experts)

    return to_spots
