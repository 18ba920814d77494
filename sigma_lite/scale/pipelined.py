"""Expert parallelism in parts: while experts compute one part of the tokens, others are on their way.

    part 0   rows out | experts  | results back
    part 1              rows out | experts      | results back

The backward pass does the same in reverse. With n parts only the first way out and the last way back have nothing to
hide behind: of 2 messages in one part, 2 / n (Tutel, 2206.03382, calls n the degree of pipelining). In exchange there are
n times as many messages, each n times as small, and n matmuls a layer. Experts' gradients are sums of n sums, so they
differ from those of one part in the last bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sigma_lite.kernels.plan import combine, routing_plan
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts, Run
from sigma_lite.model.router import Routing
from sigma_lite.scale.expert_parallel import Traffic, agree, all_to_all, as_computed


def pipelined(group: dist.ProcessGroup, n_experts: int, parts: int) -> Dispatch:
    """As `expert_parallel`, the tokens of a rank cut into so many parts. One agreement for all of them."""

    def dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        plans = [routing_plan(ids_TK, n_experts) for ids_TK in routing.ids.tensor_split(parts)]
        traffics = agree(plans, group)
        x_parts = as_computed(x_TD).tensor_split(parts)
        trips = [Trip(t.sent_R, t.received_R, group) for t in traffics]
        out = [trip.start(x.index_select(0, p.token_N)) for trip, x, p in zip(trips, x_parts, plans, strict=True)]
        returns = [Trip(t.received_R, t.sent_R, group) for t in traffics]

        def compute(n: int, rows_MD: Tensor, run: Run) -> Tensor:
            return returns[n].start(_computed(trips[n].arrive(rows_MD), traffics[n], run))

        back = experts.in_parts(out, compute)
        gates = routing.gates.to(back[0].dtype).tensor_split(parts)
        results = [combine(trip.arrive(y), *rest) for trip, y, *rest in zip(returns, back, plans, gates, strict=True)]
        return torch.cat(results)

    return dispatch


def _computed(x_MD: Tensor, traffic: Traffic, run: Run) -> Tensor:
    ids_M1 = traffic.expert_M[:, None]
    return run(x_MD, ids_M1, torch.ones_like(ids_M1, dtype=x_MD.dtype))


class Trip:
    """An `exchange` in two halves. Nobody may look at what `start` returns before it has gone through `arrive`."""

    def __init__(self, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup):
        self.there, self.back = (sent_R, received_R, group), (received_R, sent_R, group)
        self.work: dist.Work | None = None
        self.gradient: Tensor | None = None

    def start(self, rows_ND: Tensor) -> Tensor:
        """Send; the result fills up later."""
        return _Start.apply(rows_ND, self)

    def arrive(self, rows_MD: Tensor) -> Tensor:
        """Wait for what `start` has promised."""
        return _Arrive.apply(rows_MD, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        rows_MD, trip.work = all_to_all(rows_ND, *trip.there, wait=False)
        return rows_MD

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        ctx.trip.work.wait()
        gradient, ctx.trip.gradient = ctx.trip.gradient, None
        return gradient, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_MD: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.work.wait()
        return rows_MD.view_as(rows_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_MD: Tensor):
        trip = ctx.trip
        trip.gradient, trip.work = all_to_all(drows_MD, *trip.back, wait=False)
        return drows_MD, None  # of the shape that autograd expects; `_Start` takes what arrives instead
