"""EPLB, the Expert Parallelism Load Balancer of DeepSeek-V3 (2412.19437; its code, deepseek-ai/EPLB, was read in full).

Give busy experts copies until every rank can be given the same load, then pack copies into ranks:

    replicate   the expert whose copies are the busiest gets one more, until all spots are used
    pack        heaviest first into the lightest rank that still has room; every rank holds as many

*Hierarchical*, for routers that choose groups of experts, first packs whole groups into nodes, then does both inside each
node, so that a token's group stays in one node. *Global* is the same with one group and one node.

Theirs: torch, sorting with unstable ties. Ours: numpy, stable ties, checked against the example of their README; every
function takes a single layer or, where it says so, all. `plan`, `replicate_only` and `snake` are planners for
scale/placement.py. Snake is what a search found in "Barbarians at the Gate" (2510.06189): deal sorted copies to the ranks,
forth and back. Confidence: code read; numbers of the search from text about it.
"""

from __future__ import annotations

import numpy as np

from sigma_lite.config import require
from sigma_lite.scale.placement import copies_of


def pack(loads_N: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """(pack of each item, its place there): N items into packs of N / packs each, heaviest first, lightest pack first."""
    N = len(loads_N)
    require(N % packs == 0, f"{N} items do not divide into {packs} packs")
    pack_N, place_N = np.empty(N, dtype=np.int64), np.empty(N, dtype=np.int64)
    filled, weight = [0] * packs, [0.0] * packs
    order = range(N) if packs == N else np.argsort(-loads_N, kind="stable")  # one each: any order is as good
    for item in order:
        open_packs = (p for p in range(packs) if filled[p] < N // packs)
        target = int(item) if packs == N else min(open_packs, key=weight.__getitem__)
        pack_N[item], place_N[item] = target, filled[target]
        filled[target] += 1
        weight[target] += float(loads_N[item])
    return pack_N, place_N


def replicate(loads_N: np.ndarray, spots: int) -> np.ndarray:
    """The expert of each spot, int64 [spots]: every expert once, then copies where copies are busiest."""
    require(spots >= len(loads_N), f"{spots} spots for {len(loads_N)} experts: each needs one")
    counts, extra = np.ones(len(loads_N)), []
    for _ in range(spots - len(loads_N)):
        busiest = int(np.argmax(loads_N / counts))
        extra.append(busiest)
        counts[busiest] += 1
    return np.concatenate([np.arange(len(loads_N)), np.array(extra, dtype=np.int64)])


def balanced(loads_E: np.ndarray, spots: int, ranks: int, groups: int = 1, nodes: int = 1) -> np.ndarray:
    """One layer: the expert of each spot, int64 [spots]; rank r has the r-th part of them.

    Args:
        groups: of neighbouring experts, which stay in one node if `nodes` divides them; otherwise all is global.
        nodes: of ranks.

    Raises: ConfigError for ranks that do not divide into nodes, or experts into groups.
    """
    require(ranks % nodes == 0, f"{ranks} ranks do not divide into {nodes} nodes")
    require(len(loads_E) % groups == 0, f"{len(loads_E)} experts do not divide into {groups} groups")
    require(spots % ranks == 0, f"{spots} spots do not divide into {ranks} ranks")
    if groups % nodes:
        groups = nodes = 1
    size, per_node = len(loads_E) // groups, groups // nodes
    node_G, place_G = pack(loads_E.reshape(groups, size).sum(1), nodes)
    first_E = np.empty(len(loads_E), dtype=np.int64)  # experts in the order of nodes and of their groups there
    for group in range(groups):
        begin = (node_G[group] * per_node + place_G[group]) * size
        first_E[begin : begin + size] = group * size + np.arange(size)
    placed = []
    for experts in first_E.reshape(nodes, -1):
        own = replicate(loads_E[experts], spots // nodes)
        counts = np.bincount(own)
        rank, place = pack((loads_E[experts] / counts)[own], ranks // nodes)
        spot = np.empty_like(own)
        spot[rank * (spots // ranks) + place] = own
        placed.append(experts[spot])
    return np.concatenate(placed)


def plan(loads_LE: np.ndarray, ranks: int, spots: int) -> np.ndarray:
    """EPLB, global: a planner for any number of ranks."""
    return np.stack([balanced(loads_E, spots, ranks) for loads_E in np.asarray(loads_LE, dtype=float)])


def replicate_only(loads_LE: np.ndarray, ranks: int, spots: int) -> np.ndarray:
    """Copies for busy experts, ranks filled in the order of experts: what replication alone is worth."""
    return np.stack([np.sort(replicate(loads_E, spots)) for loads_E in np.asarray(loads_LE, dtype=float)])


def snake(loads_LE: np.ndarray, ranks: int, spots: int) -> np.ndarray:
    """EPLB's copies, sorted by load and dealt forth and back over the ranks, all layers at once."""
    loads_LE = np.asarray(loads_LE, dtype=float)
    own_LP = replicate_all(loads_LE, spots)
    return deal(own_LP, np.take_along_axis(loads_LE / copies_of(own_LP, loads_LE.shape[1]), own_LP, 1), ranks)


def replicate_all(loads_LE: np.ndarray, spots: int) -> np.ndarray:
    """`replicate` of all layers at once: as many numpy calls as there are copies, however many layers."""
    L, E = loads_LE.shape
    counts_LE, layer_L, own = np.ones((L, E)), np.arange(L), [np.tile(np.arange(E), (L, 1))]
    for _ in range(spots - E):
        busiest_L = np.argmax(loads_LE / counts_LE, axis=1)
        counts_LE[layer_L, busiest_L] += 1
        own.append(busiest_L[:, None])
    return np.concatenate(own, axis=1)


def deal(own_LP: np.ndarray, loads_LP: np.ndarray, ranks: int) -> np.ndarray:
    """Copies in ranks 0 .. R-1, R-1 .. 0, 0 .. R-1 and so on, heaviest first."""
    order_LP = np.argsort(-loads_LP, axis=1, kind="stable")
    rounds_LSR = np.take_along_axis(own_LP, order_LP, 1).reshape(len(own_LP), -1, ranks)
    rounds_LSR[:, 1::2] = rounds_LSR[:, 1::2, ::-1]
    return rounds_LSR.transpose(0, 2, 1).reshape(len(own_LP), -1)
