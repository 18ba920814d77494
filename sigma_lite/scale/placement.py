"""Placement: on which rank each expert computes, and which experts have copies on several.

A rank of R has P / R *spots*, and a placement says which expert is in each of the P spots of a layer: spot p belongs to
rank p R // P. Rows of an expert are shared out evenly over its copies. A *planner* makes one from loads:

    planner(loads_LE, ranks, spots) -> experts_LP

Where weights are *stored* is another matter and never changes (scale/copies.py): checkpoints and optimizer know nothing of
a placement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sigma_lite.config import require

Planner = Callable[[np.ndarray, int, int], np.ndarray]
"""(loads [L, E], ranks, spots of all ranks) -> the expert of each spot, int64 [L, spots]."""


def identity(loads_LE: np.ndarray, ranks: int, spots: int) -> np.ndarray:
    """Every expert where it is stored; spots that are left over hold the rank's first experts a second time."""
    L, E = loads_LE.shape
    own = np.arange(E).reshape(ranks, -1)
    per_rank = np.concatenate([own, own[:, np.arange(spots // ranks - own.shape[1]) % own.shape[1]]], axis=1)
    return np.tile(per_rank.reshape(-1), (L, 1))


def copies_of(experts_LP: np.ndarray, n_experts: int) -> np.ndarray:
    """How many spots hold each expert, int64 [L, E]."""
    return np.stack([np.bincount(experts_P, minlength=n_experts) for experts_P in experts_LP])


def rank_loads(experts_LP: np.ndarray, loads_LE: np.ndarray, ranks: int) -> np.ndarray:
    """What each rank has to compute, [L, R], in the unit of the loads."""
    each_LE = loads_LE / np.maximum(copies_of(experts_LP, loads_LE.shape[1]), 1)
    return np.take_along_axis(each_LE, experts_LP, 1).reshape(len(loads_LE), ranks, -1).sum(2)


def makespan(experts_LP: np.ndarray, loads_LE: np.ndarray, ranks: int) -> np.ndarray:
    """Rows of the fullest rank relative to an even share, [L]: 1 is even, R is all on one. Layers wait one after another."""
    loads_LR = rank_loads(experts_LP, loads_LE, ranks)
    return loads_LR.max(1) / np.maximum(loads_LR.mean(1), np.finfo(float).tiny)


def waiting(experts_LP: np.ndarray, loads_LE: np.ndarray, ranks: int) -> float:
    """The fullest ranks' rows over all layers, relative to even shares: time of the experts' work, where 1 is even."""
    loads_LR = rank_loads(experts_LP, loads_LE, ranks)
    return float(loads_LR.max(1).sum() / loads_LR.mean(1).sum())


def check(experts_LP: np.ndarray, n_layers: int, n_experts: int, ranks: int, spots: int) -> None:
    """ConfigError for a placement that loses an expert, or is not of these layers, ranks and spots."""
    given = np.asarray(experts_LP)
    require(spots % ranks == 0, f"{spots} spots do not divide into {ranks} ranks: give every rank as many")
    require(
        given.shape == (n_layers, spots) and np.issubdtype(given.dtype, np.integer),
        f"a placement is {given.dtype} {list(given.shape)}, expected whole numbers [layers, spots] = [{n_layers}, {spots}]",
    )
    require(
        bool(((given >= 0) & (given < n_experts)).all()),
        f"a placement names experts {given.min()}..{given.max()}, and there are 0..{n_experts - 1}",
    )
    for layer, count_E in enumerate(copies_of(given, n_experts)):
        require(bool(count_E.all()), f"layer {layer}: the placement has no spot for expert {int(count_E.argmin())}")


def near_home(experts_LP: np.ndarray, n_experts: int, ranks: int) -> np.ndarray:
    """The same groups of experts on those ranks that store most of them: fewer weights travel, no load changes."""
    L, per_rank = len(experts_LP), n_experts // ranks
    groups_LRS, placed_LRS = np.sort(experts_LP.reshape(L, ranks, -1), axis=2), []
    for groups_RS in groups_LRS:
        at_home_RR = np.array([np.bincount(np.unique(group) // per_rank, minlength=ranks) for group in groups_RS])
        rank_of, free = {}, set(range(ranks))
        for flat in np.argsort(-at_home_RR, axis=None, kind="stable"):
            group, rank = divmod(int(flat), ranks)
            if group not in rank_of and rank in free:
                rank_of[group] = rank
                free.remove(rank)
        placed_LRS.append(groups_RS[sorted(rank_of, key=rank_of.get)])
    return np.stack(placed_LRS).reshape(L, -1)
