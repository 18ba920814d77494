"""All-to-all in two steps: inside every node, then between nodes (SE-MoE, 2205.10034; also HetuMoE, 2203.14685).

The R ranks form n nodes of G *places*. A row that must go to place j of another node first goes to place j of its own;
rank (node, j) then sends what all of its node has for that other rank in one message. So between nodes only ranks of the
same place talk, which in many clusters share a switch.

                                    flat exchange      two steps
    messages to other nodes, a rank     R - G            n - 1         G times fewer, each G times longer
    rows to other nodes             (R - G) / R       (R - G) / R      the same
    rows inside the node            (G - 1) / R       (G - 1) / G      n times as many

(The rows are shares of a rank's own, for even loads.) So two steps save nothing but the start of messages, and pay for it
on the fast links: `pays_below`. With several experts for each token, other systems (2508.09591) send a token once to a
node of which it wants several experts, and so save bytes too; with one expert there is nothing to save.

SE-MoE's 15.5 % of its communication was measured on 32 GPUs. Ours counts messages and rows, on ranks whose nodes are only
said to be nodes. It is no setting of the strategy: give a block `two_level(...)` as its dispatch to use it. Confidence:
the two steps are the paper's (read in summary); the bound is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sigma_lite.kernels.plan import combine, routing_plan
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing
from sigma_lite.scale.expert_parallel import as_computed, counts_of, exchange


def two_level(mesh: DeviceMesh, n_experts: int) -> Dispatch:
    """As `expert_parallel`, over a mesh [node, place] whose ranks r = node * G + place are neighbours in their node."""
    (n, G), (node, place) = mesh.shape, mesh.get_coordinate()
    R, me, own = n * G, node * G + place, n_experts // (n * G)

    def dispatch(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        plan = routing_plan(routing.ids, n_experts)
        counts_RE = counts_of_all(counts_of(plan), mesh)
        sends_RR = counts_RE.view(R, R, own).sum(2).cpu()  # the host waits here, as in `agree`, and nowhere else
        mine_N, comes = counts_RE[:, me * own : (me + 1) * own].flatten(), int(sends_RR[:, me].sum())
        expert_M = torch.arange(own, device=x_TD.device).repeat(R).repeat_interleave(mine_N, output_size=comes)
        x_ND = as_computed(x_TD).index_select(0, plan.token_N)  # sorted by expert, hence by rank
        x_MD = exchange_in_two(x_ND, sends_RR, mesh)
        y_MD = experts(x_MD, expert_M[:, None], torch.ones_like(expert_M[:, None], dtype=x_MD.dtype))
        y_ND = exchange_in_two(y_MD, sends_RR.T, mesh)
        return combine(y_ND, plan, routing.gates.to(y_ND.dtype))

    return dispatch


@torch.no_grad()
def counts_of_all(counts_E: Tensor, mesh: DeviceMesh) -> Tensor:
    """Rows of every rank for every expert, int64 [R, E], gathered in two steps as well."""
    for axis in (1, 0):  # of the node, then of all nodes
        group = mesh.get_group(axis)
        gathered = counts_E.new_empty(dist.get_world_size(group) * counts_E.numel())
        dist.all_gather_into_tensor(gathered, counts_E.flatten(), group=group)
        counts_E = gathered
    return counts_E.view(mesh.size(), -1)


def exchange_in_two(rows_ND: Tensor, sends_RR: Tensor, mesh: DeviceMesh) -> Tensor:
    """Rows of this rank, sorted by the rank that they go to; returns those that come, in order of the rank they come from.

    Args:
        sends_RR: rows from each rank (first) to each (second), int64 on the host, the same on all ranks.
    """
    (n, G), (a, i) = mesh.shape, mesh.get_coordinate()
    sends_nGnG = sends_RR.reshape(n, G, n, G)
    out_nG, held_Gn, come_nG = sends_nGnG[a, i], sends_nGnG[a, :, :, i], sends_nGnG[:, :, a, i]
    rows_ND = regrouped(rows_ND, out_nG)  # by place, and by node within a place
    rows_ND = exchange(rows_ND, out_nG.sum(0).tolist(), held_Gn.sum(1).tolist(), mesh.get_group(1))
    rows_ND = regrouped(rows_ND, held_Gn)  # by node, and within a node by the neighbour that they came from
    return exchange(rows_ND, held_Gn.sum(0).tolist(), come_nG.sum(1).tolist(), mesh.get_group(0))


def regrouped(rows_ND: Tensor, sizes_PQ: Tensor) -> Tensor:
    """Blocks of these sizes, in order (p, q), put into order (q, p)."""
    P, Q = sizes_PQ.shape
    blocks = rows_ND.split(sizes_PQ.flatten().tolist())
    return torch.cat([blocks[p * Q + q] for q in range(Q) for p in range(P)])


# ------------------------------------------------------------------------------------------------------------- laws


class Links(NamedTuple):
    """Of one exchange, over all ranks. What a rank keeps for itself is on no link."""

    near_rows: int  # to another rank of the same node
    far_rows: int  # to another node
    far_messages: int  # pairs of ranks in different nodes of which one sends to the other


def flat_links(sends_RR: Tensor, per_node: int) -> Links:
    """Every rank sends to every other."""
    R = len(sends_RR)
    node_R = torch.arange(R) // per_node
    far_RR = node_R[:, None] != node_R
    stay = int(sends_RR.diagonal().sum())
    far = int(sends_RR[far_RR].sum())
    return Links(int(sends_RR.sum()) - far - stay, far, R * (R - per_node))


def two_level_links(sends_RR: Tensor, per_node: int) -> Links:
    """Rows change their place inside the node first, and their node then."""
    R = len(sends_RR)
    place_R = torch.arange(R) % per_node
    near = int(sends_RR[place_R[:, None] != place_R].sum())
    return Links(near, flat_links(sends_RR, per_node).far_rows, R * (R // per_node - 1))


def pays_below(latency_s: float, near_gbps: float) -> float:
    """Bytes of one flat message (a rank's rows for one other rank) below which two steps are faster.

    With even loads, B bytes a rank and messages that start one after another, two steps save (n - 1)(G - 1) starts and send
    B (n - 1)(G - 1) / R bytes more on the fast links. So B / R counts, whatever n and G: what a fast link carries in the
    time that a message to another node needs to start.

    Args:
        latency_s: seconds until a message to another node is on its way.
        near_gbps: GB/s of a rank inside its node.
    """
    return latency_s * near_gbps * 1e9
