"""Expert parallelism without waiting: every message has the same size, whatever the routing.

Each rank has room for C rows in each message: `capacity` times its share, a rank's N = T K rows divided by R ranks. Counts
travel from device to device and no host reads them, so a GPU never runs dry while its host waits for a router. The price
is bytes and work for rows that are empty: `capacity` times as many of both as rows that are even, and R times as many
where nothing may ever overflow.

Nothing is dropped in silence. A rank whose rows do not fit makes its own result NaN: the loss is then no number, and the
step is refused on all ranks together, as any step with a NaN gradient is (train/callbacks/spike_guard.py). Other systems
drop such rows (GShard, 2006.16668; Switch, 2101.03961). Without gradients, so in validation, sizes are told.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from sigma_lite.kernels.plan import combine, routing_plan
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing
from sigma_lite.scale.expert_parallel import as_computed, counts_of, exchange, expert_parallel


def padded(group: dist.ProcessGroup, n_experts: int, capacity: float) -> Dispatch:
    """As `expert_parallel` with messages of equal size. All ranks must have as many tokens as each other."""
    told, R = expert_parallel(group, n_experts), dist.get_world_size(group)

    def dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if not torch.is_grad_enabled():
            return told(x_TD, routing, experts)
        plan = routing_plan(routing.ids, n_experts)
        room = rows_of_room(routing.ids.numel(), R, capacity)
        sizes = [room] * R
        counts_RE = counts_of(plan).view(R, -1)
        place_N, fits = places(counts_RE.sum(1), room, len(plan.slot_N))
        x_ND = as_computed(x_TD).index_select(0, plan.token_N)
        x_MD = exchange(x_ND.new_zeros(R * room, x_ND.shape[1]).index_copy(0, place_N, x_ND), sizes, sizes, group)
        ids_M1 = owners(_counts_that_come(counts_RE, group), room)[:, None]
        y_MD = experts(x_MD, ids_M1, torch.ones_like(ids_M1, dtype=x_MD.dtype))  # an empty row of zeros gives zeros
        y_ND = exchange(y_MD, sizes, sizes, group).index_select(0, place_N)
        return combine(y_ND, plan, routing.gates.to(y_ND.dtype)) * torch.where(fits, 1.0, torch.nan).to(y_ND.dtype)

    return dispatch


def rows_of_room(rows: int, ranks: int, capacity: float) -> int:
    """Rows of each message, when a rank has so many in all. More than all rows are never needed."""
    return min(rows, math.ceil(capacity * rows / ranks))


def places(sent_R: Tensor, room: int, rows: int) -> tuple[Tensor, Tensor]:
    """Where each row, sorted by rank, stands in R messages of `room` rows: int64 [N]; and whether all fit, bool."""
    ends_R = sent_R.cumsum(0)
    row_N = torch.arange(rows, device=sent_R.device)
    rank_N = torch.searchsorted(ends_R, row_N, right=True)
    within_N = row_N - (ends_R - sent_R)[rank_N]
    return rank_N * room + within_N.clamp(max=room - 1), (sent_R <= room).all()


def owners(comes_RE: Tensor, room: int) -> Tensor:
    """The expert of each received row, int64 [R * room]; an empty row goes to the last expert."""
    row_RC = torch.arange(room, device=comes_RE.device).expand(len(comes_RE), room).contiguous()
    expert_RC = torch.searchsorted(comes_RE.cumsum(1), row_RC, right=True)
    return expert_RC.clamp(max=comes_RE.shape[1] - 1).flatten()


@torch.no_grad()
def _counts_that_come(sends_RE: Tensor, group: dist.ProcessGroup) -> Tensor:
    comes_RE = torch.empty_like(sends_RE)
    dist.all_to_all_single(comes_RE, sends_RE.contiguous(), group=group)
    return comes_RE
