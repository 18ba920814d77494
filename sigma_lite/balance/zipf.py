"""The balance floor: how evenly a router can load its experts when all it sees is the token, and tokens are Zipfian.

All of a token's occurrences then go to the same K experts. One expert gets at least the share of the most frequent token:
with E = 96, K = 1 and a token of 3 % that is 96 * 0.03 = 2.9 times the mean load, whatever is learned. A real router sees
a mixture of token and context, so `purity` weakens the floor: only that share of a token is bound to its home.
These bounds and the K list drawn from them are this project's own, not Sigma-MoE-Tiny's (2512.16248).

Deviations are E f_e - 1: 0 is uniform, max lies in 0 .. E - 1, min in -1 .. 0.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sigma_lite.balance import information as info


class Floor(NamedTuple):
    """0 <= single <= bound <= best possible max deviation <= packed; packed_min <= best possible min <= bound_min <= 0."""

    single: float  # the most frequent token alone: max(0, E f_max / K - 1)
    bound: float  # no assignment does better
    packed: float  # a good assignment, longest first, does this
    bound_min: float  # the most starved expert can have no more
    packed_min: float  # and in the good assignment has this


def token_floor(counts_V: ArrayLike, n_experts: int, k: int = 1, purity_V: ArrayLike | None = None) -> Floor:
    """The balance that is possible when each token has K home experts.

    Args:
        counts_V: occurrences of each token, or of whatever else the router sees, such as pairs of tokens.
        n_experts: E >= k.
        k: experts per token; each of a token's K homes gets purity * its occurrences.
        purity_V: share of each token's occurrences that must go to its homes, 0 .. 1; the rest may go anywhere, in any
            parts. Default 1: a router of token identity. For K > 1 the free rest ignores that the experts of one
            occurrence must differ, so `packed` is then only nearly possible.

    Returns: a Floor. For `bound`, of the t most frequent tokens with t K > j E some expert is home to j + 1, and has
        at least the j + 1 least of them (the classic bound of scheduling on identical machines, for every j).
    """
    pieces_V, free = _pieces(counts_V, n_experts, k, purity_V)
    mean = (k * pieces_V.sum() + free) / n_experts
    loads_E = _filled(longest_first(pieces_V, n_experts, k), free)
    single, bound = pieces_V[0] / mean - 1, _pigeonhole(pieces_V, n_experts, k) / mean - 1
    highest_min = min(0.0, _most_for_the_poorest(pieces_V, free, n_experts, k) / mean - 1)
    deviations = max(0.0, single), max(0.0, bound), loads_E.max() / mean - 1, highest_min, loads_E.min() / mean - 1
    return Floor(*(float(d) for d in deviations))


def _pieces(counts_V: ArrayLike, n_experts: int, k: int, purity_V: ArrayLike | None) -> tuple[np.ndarray, float]:
    """What must stay together, largest first, [V] float; and the slots that may go anywhere."""
    counts_V = np.asarray(counts_V, np.float64)
    if not 1 <= k <= n_experts:
        raise ValueError(f"k={k} must lie in 1..n_experts={n_experts}: a token has k different homes")
    if not counts_V.size or counts_V.min() < 0 or counts_V.sum() == 0:
        raise ValueError("counts_V must hold counts >= 0 of at least one token that occurs")
    pieces_V = counts_V * (1.0 if purity_V is None else np.asarray(purity_V, np.float64))
    if (pieces_V < 0).any() or (pieces_V > counts_V * (1 + 1e-9)).any():
        raise ValueError("purity_V must lie in 0..1: it is the share of a token's occurrences at its home")
    return -np.sort(-pieces_V), float(k * (counts_V - pieces_V).sum())


def _pigeonhole(pieces_V: np.ndarray, E: int, k: int) -> float:
    """Highest load that some expert must have, over all j of `token_floor`'s bound."""
    before_V = np.concatenate([[0.0], np.cumsum(pieces_V)])
    j = np.arange(k * len(pieces_V) // E + 1)
    t = j * E // k + 1
    j, t = j[t <= len(pieces_V)], t[t <= len(pieces_V)]
    return float((before_V[t] - before_V[t - j - 1]).max())


def _most_for_the_poorest(pieces_V: np.ndarray, free: float, E: int, k: int) -> float:
    """The j largest tokens reach at most j K experts; the others share what is left."""
    before_V = np.concatenate([[0.0], np.cumsum(pieces_V)])
    j = np.arange(min((E - 1) // k, len(pieces_V)) + 1)
    return float(((k * (before_V[-1] - before_V[j]) + free) / (E - j * k)).min())


def longest_first(pieces_V: ArrayLike, n_experts: int, k: int = 1) -> np.ndarray:
    """Loads [E], ascending, after giving each token, largest first, to the K least loaded experts (LPT; Graham 1969)."""
    heap, pieces_V = [(0.0, e) for e in range(n_experts)], -np.sort(-np.asarray(pieces_V, np.float64))
    for piece in pieces_V[pieces_V > 0].tolist():
        for load, e in [heapq.heappop(heap) for _ in range(k)]:
            heapq.heappush(heap, (load + piece, e))
    return np.array(sorted(load for load, _ in heap))


def _filled(loads_E: np.ndarray, free: float) -> np.ndarray:
    """Ascending loads after pouring `free` where they are lowest."""
    E = len(loads_E)
    level_E = (np.cumsum(loads_E) + free) / np.arange(1, E + 1)  # of the first n experts, if they share it
    n = int((loads_E < level_E).sum())  # true for the experts under water, which come first
    return np.maximum(loads_E, level_E[n - 1]) if n else loads_E


# ---------------------------------------------------------------------------------------------------- lumps at random


def thrown(pieces_V: ArrayLike, n_experts: int, k: int = 1, seed: int = 0) -> np.ndarray:
    """Loads [E] after giving each token to K different experts drawn at random: packing left to chance."""
    pieces_V, loads_E = np.asarray(pieces_V, np.float64), np.zeros(n_experts)
    homes_VK = np.random.default_rng(seed).random((len(pieces_V), n_experts)).argpartition(k - 1, axis=1)[:, :k]
    np.add.at(loads_E, homes_VK, pieces_V[:, None])
    return loads_E


def lump_variance(counts_V: ArrayLike, n_experts: int, k: int = 1) -> float:
    """Variance over experts of E f_e when each token goes to K experts drawn at random: (E / K - 1) sum_v p(v)^2, >= 0.

    Known from the text alone, before any training. K experts per token divide it by about K.
    """
    counts_V = np.asarray(counts_V, np.float64)
    return float((n_experts / k - 1) * ((counts_V / counts_V.sum()) ** 2).sum())


# ----------------------------------------------------------------------------------------------------------- K lists


def smallest_k(counts_V: ArrayLike, n_experts: int, limit: float = 0.25, purity_V: ArrayLike | None = None) -> int:
    """The smallest K whose packed floor is at most +limit: at least E f_max purity / (1 + limit), at most E."""
    pieces_V, free = _pieces(counts_V, n_experts, 1, purity_V)
    share = pieces_V[0] / (pieces_V.sum() + free)
    k = max(1, math.ceil(n_experts * share / (1 + limit) - 1e-9))
    while k < n_experts and token_floor(counts_V, n_experts, k, purity_V).packed > limit:
        k += 1
    return k


def k_list(lumps_L: Sequence[float], budget: int) -> tuple[int, ...]:
    """Experts per token of each layer, `budget` in all and at least 1 each, that make lumps / K as equal as can be.

    Our formula. A layer's load varies about as much as its lumps would if thrown at random (`load_variance`), and K
    experts per token break each lump into K smaller ones, which divides that variance by about K. Equal variance in all
    layers for a given compute so asks for K in proportion to the lumps.

    Args:
        lumps_L: variance of E f_e that each layer's lumps alone give at K = 1: own * std^2 of `load_variance`.

    Raises: ValueError for a budget below one expert a layer.
    """
    lumps_L = np.asarray(lumps_L, np.float64)
    if budget < len(lumps_L):
        raise ValueError(f"budget={budget}: {len(lumps_L)} layers need at least one expert each")
    k_L = np.ones(len(lumps_L), int)
    for _ in range(budget - len(lumps_L)):
        k_L[(lumps_L / k_L).argmax()] += 1  # one more where the lumps are largest
    return tuple(k_L.tolist())


# -------------------------------------------------------------------------------------------- what a layer really did


def load_variance(table_VE: np.ndarray, draws: int = 20, seed: int = 0) -> dict[str, float]:
    """Does the load vary because single tokens are lumps, or because tokens agree on which experts are popular?

    With p(v) a token's frequency and a load f_e = sum_v p(v) p(e | v), exactly:
        Var_e f = sum_v p(v)^2 Var_e p(e | v)  +  sum over v != w of p(v) p(w) Cov_e[p(e | v), p(e | w)]
    The first sum is what the lumps alone would give if each fell on experts at random. The second is what tokens do
    together: negative where the router compensates one token's lump with others, positive where they crowd.

    Returns: std (of E f_e - 1), own and together (the two sums as shares of the variance; they add up to 1), and
        max_at_random: the max deviation, mean of `draws`, when each token keeps its p(e | v) but with experts renamed
        at random: above the measured one if the router balances, below it if tokens crowd.
    """
    V, E = table_VE.shape
    p_VE = table_VE / table_VE.sum()
    variance, own = p_VE.sum(0).var(), p_VE.var(1).sum()
    rng, highest = np.random.default_rng(seed), []
    seen_VE = p_VE[p_VE.sum(1) > 0]
    for _ in range(draws):
        highest.append(E * rng.permuted(seen_VE, axis=1).sum(0).max() - 1)
    share = float(own / variance) if variance > 0 else 0.0
    return {
        "std": float(E * variance**0.5),
        "own": share,
        "together": 1 - share,
        "max_at_random": float(np.mean(highest)),
    }


def layer_facts(
    experts_T: ArrayLike, tokens_T: ArrayLike, previous_T: ArrayLike, positions_T: ArrayLike, n_experts: int, seed: int = 0
) -> dict:
    """Every measure of one layer, ready for JSON.

    Args:
        experts_T: the experts chosen, [T], or [T, K]: then each slot counts as a sample of its own.
        tokens_T, previous_T: token ids at and before each position (any number where there is none).
        positions_T: place in the row, 0 .. S - 1.
        n_experts: E.

    Returns: tokens, k, max_deviation, min_deviation, dead; floor (token identity) and floor_purity (as bound as measured),
        each a Floor as a dict; entropy H(e); information with token, previous, position, pair, previous_given_token
        (each as `information` returns it); heldout (nats of token, and of previous given token, from below);
        purity (classes by frequency); busiest; variance (`load_variance`).
    """
    experts_TK = np.asarray(experts_T).reshape(len(np.asarray(tokens_T)), -1)
    K = experts_TK.shape[1]
    e, v, u, s = experts_TK.ravel(), *(np.repeat(np.asarray(x), K) for x in (tokens_T, previous_T, positions_T))
    table_VE = info.token_table(e, v, n_experts)
    f_E, counts_V = table_VE.sum(0) / len(e), table_VE.sum(1)
    heldout = info.heldout_information(e, [v, u])
    return {
        "tokens": len(experts_TK),
        "k": K,
        "max_deviation": float(n_experts * f_E.max() - 1),
        "min_deviation": float(n_experts * f_E.min() - 1),
        "dead": int((f_E == 0).sum()),
        "floor": token_floor(counts_V, n_experts, K)._asdict(),
        "floor_purity": token_floor(counts_V, n_experts, K, info.purity(table_VE, K))._asdict(),
        "entropy": info.entropy(e),
        "information": {
            "token": info.information(e, [v], seed=seed),
            "previous": info.information(e, [u], seed=seed),
            "position": info.information(e, [s], seed=seed),
            "pair": info.information(e, [v, u], seed=seed),
            "previous_given_token": info.information(e, [u], [v], seed=seed),
        },
        "heldout": {"token": heldout[0], "previous_given_token": heldout[1]},
        "purity": info.purity_by_frequency(e, v, n_experts, seed),
        "busiest": info.busiest(table_VE),
        "variance": load_variance(table_VE, seed=seed),
    }
