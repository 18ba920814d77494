"""Expert parallelism: experts live on different ranks, tokens travel to them and back (GShard, 2006.16668).

Each of R ranks holds E / R experts, rank r those from r E / R on. One layer exchanges twice in the forward pass and twice
in the backward pass: rows out, results back. How many rows go where depends on the routing, so ranks first tell each
other; nothing is dropped and nothing padded.

The host therefore waits once a layer, and this cannot be avoided: a message of unknown size cannot be received. It is not
told a second time when the layer is computed again (`agreed_once`). scale/pipelined.py exchanges one part of the tokens
while experts compute another; scale/padded.py makes all messages alike, so that nobody must be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sigma_lite.kernels.plan import Plan, combine, routing_plan
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
        [traffic] = agree([plan], group)
        x_ND = as_computed(x_TD).index_select(0, plan.token_N)  # sorted by expert, hence by rank
        x_MD = exchange(x_ND, traffic.sent_R, traffic.received_R, group)
        ids_M1 = traffic.expert_M[:, None]
        y_MD = experts(x_MD, ids_M1, torch.ones_like(ids_M1, dtype=x_MD.dtype))  # the gates stay at home
        y_ND = exchange(y_MD, traffic.received_R, traffic.sent_R, group)
        return combine(y_ND, plan, routing.gates.to(y_ND.dtype))

    return dispatch


@torch.no_grad()
def agree(plans: list[Plan], group: dist.ProcessGroup) -> list[Traffic]:
    """Tell every rank how many rows each of its experts will get. The host waits: it must know the sizes to come.

    One message and one wait, however many parts the tokens are cut into, each with a plan of its own.
    """
    known = _AGREED.get()
    if known and known.again:
        return next(known.again)
    R = dist.get_world_size(group)
    counts_CE = torch.stack([counts_of(plan) for plan in plans])
    sends_RCE = counts_CE.view(len(plans), R, -1).transpose(0, 1).contiguous()
    comes_RCE = torch.empty_like(sends_RCE)
    dist.all_to_all_single(comes_RCE, sends_RCE, group=group)
    sent_CR, received_CR = torch.stack((sends_RCE.sum(2).T, comes_RCE.sum(2).T)).tolist()
    experts = torch.arange(comes_RCE.shape[2], device=comes_RCE.device).repeat(R)
    traffics = [
        Traffic(sent_R, received_R, experts.repeat_interleave(comes_RCE[:, c].flatten(), output_size=sum(received_R)))
        for c, (sent_R, received_R) in enumerate(zip(sent_CR, received_CR, strict=True))
    ]
    if known:
        known.told.append(traffics)
    return traffics


def counts_of(plan: Plan) -> Tensor:
    """Rows of each expert, int64 [E]."""
    return plan.ends_E.diff(prepend=plan.ends_E.new_zeros(1)).long()


def exchange(rows_ND: Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `sent_R[r]` consecutive rows to each rank r; returns the rows that come, in order of rank.

    Gradients of the rows travel the same way back.
    """
    return _Exchange.apply(rows_ND, sent_R, received_R, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, sent_R, received_R, group):
        ctx.back = received_R, sent_R, group
        return all_to_all(rows_ND, sent_R, received_R, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_MD):
        return all_to_all(drows_MD, *ctx.back)[0], None, None, None


def all_to_all(
    rows_ND: Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup, wait: bool = True
) -> tuple[Tensor, dist.Work | None]:
    """The rows that come, and without `wait` what must be waited for before anybody looks at them."""
    out_MD = rows_ND.new_empty(sum(received_R), *rows_ND.shape[1:])
    work = dist.all_to_all_single(out_MD, rows_ND.contiguous(), received_R, sent_R, group=group, async_op=not wait)
    return out_MD, work


def as_computed(x_TD: Tensor) -> Tensor:
    """In the dtype that the experts compute in: bf16 rows are half the bytes on the wire."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD


# ----------------------------------------------------------------------------------------------------- recomputation


class _Agreed:
    """What one checkpointed block agrees in its forward pass, in order. A context, entered anew in each recomputation."""

    def __init__(self, told: list[list[Traffic]], recomputing: bool):
        self.told, self.recomputing = told, recomputing
        self.again: Iterator[list[Traffic]] | None = None

    def __enter__(self) -> None:
        self.again = iter(self.told) if self.recomputing else None
        self._token = _AGREED.set(self)

    def __exit__(self, *error: object) -> None:
        _AGREED.reset(self._token)


_AGREED: ContextVar[_Agreed | None] = ContextVar("agreed", default=None)


def agreed_once() -> tuple[_Agreed, _Agreed]:
    """`context_fn` of torch's checkpoint: the second forward pass takes the sizes of the first, without message or wait.

    The same input makes the same choices, so the sizes are the same.
    """
    told: list[list[Traffic]] = []
    return _Agreed(told, recomputing=False), _Agreed(told, recomputing=True)
