"""The routing plan: which row goes to which expert, and back. Shared by every backend that sorts tokens by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Which row goes where. Slots are (token, choice) pairs flattened: slot n belongs to token n // K."""

    slot_N: Tensor  # int64: the slot in each sorted row; sorted by expert, ties in token order
    row_TK: Tensor  # int64: the sorted row of each slot, the inverse of slot_N
    ends_E: Tensor  # int32: expert e owns rows ends[e-1] .. ends[e] - 1

    @property
    def token_N(self) -> Tensor:
        """The token in each sorted row."""
        return self.slot_N.div(self.row_TK.shape[1], rounding_mode="floor")


def routing_plan(ids_TK: Tensor, n_experts: int) -> Plan:
    """Group slots by expert, on the device of `ids_TK` and without waiting for it."""
    flat_N = ids_TK.flatten()
    slot_N = flat_N.argsort(stable=True)
    row_N = torch.empty_like(slot_N).scatter_(0, slot_N, torch.arange(len(slot_N), device=slot_N.device))
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=ids_TK.device)
    counts_E = counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N))
    return Plan(slot_N, row_N.view_as(ids_TK), counts_E.cumsum(0).to(torch.int32))


def combine(rows_ND: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
    """Undo the sort and add each token's K rows, weighted: the order of the sum is fixed, hence so are its bits."""
    if not len(rows_ND):
        return rows_ND  # embedding_bag refuses an empty table
    return F.embedding_bag(plan.row_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)
