"""Expert parallelism: experts live on different ranks, tokens travel to them and back (GShard, 2006.16668).

Each of R ranks holds E / R experts, rank r those from r E / R on. One layer exchanges twice in the forward pass and twice
in the backward pass: rows out, results back. How many rows go where depends on the routing, so ranks first tell each
other; nothing is dropped and nothing padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sigma_lite.kernels.plan import combine, routing_plan
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing


class Traffic(NamedTuple):
    """Who sends how many rows to whom in one layer, seen from one of R ranks."""

    sent_R: list[int]  # rows that go to each rank
    received_R: list[int]  # rows that come from each rank
    expert_M: Tensor  # int64: the expert of each received row, counted from this rank's first


def expert_parallel(group: dist.ProcessGroup, n_experts: int) -> Dispatch:
    """A dispatch over the ranks of `group`. All of them must call it together, in the backward pass too."""

    def dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        plan = routing_plan(routing.ids, n_experts)
        traffic = agree(plan.ends_E.diff(prepend=plan.ends_E.new_zeros(1)), group)
        x_ND = _as_computed(x_TD).index_select(0, plan.token_N)  # sorted by expert, hence by rank
        x_MD = exchange(x_ND, traffic.sent_R, traffic.received_R, group)
        ids_M1 = traffic.expert_M[:, None]
        y_MD = experts(x_MD, ids_M1, torch.ones_like(ids_M1, dtype=x_MD.dtype))  # the gates stay at home
        y_ND = exchange(y_MD, traffic.received_R, traffic.sent_R, group)
        return combine(y_ND, plan, routing.gates.to(y_ND.dtype))

    return dispatch


@torch.no_grad()
def agree(counts_E: Tensor, group: dist.ProcessGroup) -> Traffic:
    """Tell every rank how many rows each of its experts will get. The host waits: it must know the sizes to come."""
    R = dist.get_world_size(group)
    sends_RE = counts_E.long().view(R, -1)
    comes_RE = torch.empty_like(sends_RE)
    dist.all_to_all_single(comes_RE, sends_RE, group=group)
    experts = torch.arange(comes_RE.shape[1], device=comes_RE.device).repeat(R)
    sent_R, received_R = torch.stack((sends_RE.sum(1), comes_RE.sum(1))).tolist()
    return Traffic(sent_R, received_R, experts.repeat_interleave(comes_RE.flatten(), output_size=sum(received_R)))


def exchange(rows_ND: Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent_R[r]` consecutive rows to each rank r; returns the rows that come, in order of rank.

    Gradients of the rows travel the same way back.
    """
    return _Exchange.apply(rows_ND, sent_R, received_R, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, sent_R, received_R, group):
        ctx.back = received_R, sent_R, group
        return _all_to_all(rows_ND, sent_R, received_R, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_MD):
        return _all_to_all(drows_MD, *ctx.back), None, None, None


def _all_to_all(rows_ND: Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup) -> Tensor:
    out_MD = rows_ND.new_empty(sum(received_R), rows_ND.shape[1])
    dist.all_to_all_single(out_MD, rows_ND.contiguous(), received_R, sent_R, group=group)
    return out_MD


def _as_computed(x_TD: Tensor) -> Tensor:
    """In the dtype that the experts compute in: bf16 rows are half the bytes on the wire."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
