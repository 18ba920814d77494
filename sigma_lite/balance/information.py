"""What an expert's choice tells of the token, its predecessor and its position: entropies and informations from samples.

All values are nats. A table estimated from samples looks more informative than it is: T independent pairs over m filled
cells show about m / 2T nats that are not there (Miller 1955). With a vocabulary of 2048, 96 experts and 300k tokens that
is about 0.1 nats for the expert and the token, and more than 0.5 nats once the previous token joins, where Miller's
correction itself fails. So each information comes with the same estimate on shuffled experts, and `heldout_information`
measures from below what a predictor fitted on one half of the samples knows about the other half.

Arguments are integer arrays or CPU tensors, one sample an entry; any integers will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

HELDOUT_BLOCK = 4096  # tokens: halves are alternating blocks, longer than most contexts, shorter than a corpus drifts


def codes(*columns: ArrayLike) -> np.ndarray:
    """One integer per different combination, 0 .. m-1, [T]."""
    joined_T = np.zeros(len(np.asarray(columns[0])), np.int64)
    for column in columns:
        code_T, values = _dense(np.asarray(column).astype(np.int64))
        joined_T, _ = _dense(joined_T * values + code_T)
    return joined_T


def _dense(x_T: np.ndarray) -> tuple[np.ndarray, int]:
    """x numbered 0 .. m-1 in rising order, and m. Counting beats sorting while the range is not much wider than T."""
    x_T = x_T - x_T.min()
    if x_T.max() > 16 * len(x_T):
        values, code_T = np.unique(x_T, return_inverse=True)
        return code_T.reshape(-1), len(values)
    rank = np.cumsum(np.bincount(x_T) > 0)
    return rank[x_T] - 1, int(rank[-1])


def entropy(*columns: ArrayLike, corrected: bool = True) -> float:
    """Joint entropy of the columns, >= 0. `corrected` adds (m - 1) / 2T for m different values (Miller-Madow)."""
    counts_M = np.bincount(codes(*columns))
    T = counts_M.sum()
    plain = np.log(T) - (counts_M * np.log(counts_M)).sum() / T
    return float(plain + corrected * (len(counts_M) - 1) / (2 * T))


def mutual_information(
    x_T: ArrayLike, y: Sequence[ArrayLike], given: Sequence[ArrayLike] = (), corrected: bool = True
) -> float:
    """I(x; y | given) = H(x, given) + H(y, given) - H(x, y, given) - H(given): 0 (independent) .. H(x).

    Sampling can push the corrected value a little below 0, and the plain one far above the truth.
    """
    with_x, with_y = entropy(x_T, *given, corrected=corrected), entropy(*y, *given, corrected=corrected)
    rest = entropy(*given, corrected=corrected) if given else 0.0
    return with_x + with_y - entropy(x_T, *y, *given, corrected=corrected) - rest


def shuffled(x_T: ArrayLike, given: Sequence[ArrayLike] = (), seed: int = 0) -> np.ndarray:
    """x in random order, within each value of `given`: keeps every p(x | given), destroys the rest."""
    x_T, noise_T = np.asarray(x_T), np.random.default_rng(seed).random(len(np.asarray(x_T)))
    group_T = codes(*given) if given else np.zeros(len(x_T), np.int64)
    mixed_T = np.empty_like(x_T)
    mixed_T[np.lexsort((np.arange(len(x_T)), group_T))] = x_T[np.lexsort((noise_T, group_T))]
    return mixed_T


def information(x_T: ArrayLike, y: Sequence[ArrayLike], given: Sequence[ArrayLike] = (), seed: int = 0) -> dict[str, float]:
    """I(x; y | given) with what to hold against it.

    Returns: nats (Miller-Madow), shuffled (the same after `shuffled`, where the truth is 0), excess = nats - shuffled,
        and share = excess / H(x), 0 .. 1. Read `excess` as a low estimate where the true information is large: shuffling
        fills more cells than the data did. Where `shuffled` is not small, believe `heldout_information`.
    """
    nats = mutual_information(x_T, y, given)
    null = mutual_information(shuffled(x_T, given, seed), y, given)
    H = entropy(x_T)
    return {"nats": nats, "shuffled": null, "excess": nats - null, "share": (nats - null) / H if H > 0 else 0.0}


def heldout_information(x_T: ArrayLike, contexts: Sequence[ArrayLike], strength: float = 4.0) -> list[float]:
    """Nats about x that each context adds, told by a predictor that has not seen the sample. In expectation never too high.

    The first column of `contexts` alone, then the first two together, ...: p(x | c) = (n(x, c) + strength * p(x | shorter
    c)) / (n(c) + strength), fitted on alternating blocks of HELDOUT_BLOCK samples, scored on the others, and again with
    the halves exchanged.

    Returns: [I(x; c1), I(x; c2 | c1), ...] from below; negative where a context only adds noise. Their sum is I(x; all).
    """
    x_T = codes(x_T)
    half_T = (np.arange(len(x_T)) // HELDOUT_BLOCK) % 2 == 0
    if half_T.all():  # too short for blocks
        half_T = np.arange(len(x_T)) % 2 == 0
    levels = [codes(*contexts[: i + 1]) for i in range(len(contexts))]
    one, two = _gains(x_T, levels, half_T, strength), _gains(x_T, levels, ~half_T, strength)
    weight = (~half_T).mean()
    return [float(weight * a + (1 - weight) * b) for a, b in zip(one, two, strict=True)]


def _gains(x_T: np.ndarray, levels: list[np.ndarray], fit_T: np.ndarray, strength: float) -> list[float]:
    """Fall of the mean -log p(x) from level to level on the samples outside `fit_T`."""
    E = x_T.max() + 1
    p_T = (np.bincount(x_T[fit_T], minlength=E)[x_T] + 1) / (fit_T.sum() + E)
    gains = []
    for c_T in levels:
        pair_T = codes(x_T, c_T)
        n_pair_T = np.bincount(pair_T[fit_T], minlength=pair_T.max() + 1)[pair_T]
        n_T = np.bincount(c_T[fit_T], minlength=c_T.max() + 1)[c_T]
        finer_T = (n_pair_T + strength * p_T) / (n_T + strength)
        gains.append(np.log(finer_T[~fit_T] / p_T[~fit_T]).mean())
        p_T = finer_T
    return gains


# ------------------------------------------------------------------------------------------------ tokens and experts


def token_table(experts_T: ArrayLike, tokens_T: ArrayLike, n_experts: int) -> np.ndarray:
    """Occurrences of each token at each expert, int64 [V, E], with V the highest token id + 1."""
    experts_T, tokens_T = np.asarray(experts_T).astype(np.int64), np.asarray(tokens_T).astype(np.int64)
    V = int(tokens_T.max()) + 1
    return np.bincount(tokens_T * n_experts + experts_T, minlength=V * n_experts).reshape(V, n_experts)


def purity(table_VE: np.ndarray, k: int = 1) -> np.ndarray:
    """Share of each token's occurrences that use its k-th commonest expert, [V]: 0 .. 1, and at least 1 / E for k = 1.

    Args:
        table_VE: of `token_table`; with K experts per token it counts slots, K to an occurrence.
        k: experts per token: then each of a token's k homes has at least this share.

    A token that never occurs has 0. One seen n times has at least 1 / n at k = 1: hold it against shuffled experts.
    """
    E = table_VE.shape[1]
    return k * np.partition(table_VE, E - k, axis=1)[:, E - k] / np.maximum(table_VE.sum(1), 1)


def purity_by_frequency(experts_T: ArrayLike, tokens_T: ArrayLike, n_experts: int, seed: int = 0) -> list[dict]:
    """Purity of the most frequent token, the next three, then ranks 5-16, 17-64, ...: each class a mean over occurrences.

    Returns: first and last rank, share of all occurrences, purity, and shuffled: the purity without any preference.
        With K experts per token the samples are slots, and purity is at most 1 / K.
    """
    tables = [token_table(e, tokens_T, n_experts) for e in (experts_T, shuffled(experts_T, seed=seed))]
    counts_V = tables[0].sum(1)
    order_V = np.argsort(-counts_V, kind="stable")[: (counts_V > 0).sum()]
    rows, first = [], 0
    while first < len(order_V):
        here = order_V[first : 4 * first or 1]
        n = counts_V[here].sum()
        means = [float((purity(table_VE)[here] * counts_V[here]).sum() / n) for table_VE in tables]
        ranks = {"first": first + 1, "last": first + len(here)}
        rows.append({**ranks, "share": float(n / counts_V.sum()), "purity": means[0], "shuffled": means[1]})
        first += len(here)
    return rows


def busiest(table_VE: np.ndarray, top: int = 5) -> dict:
    """What makes up the load of the busiest expert.

    Returns: expert, deviation (E f_e - 1), tokens (id, share of this expert's load, purity), and effective_tokens,
        exp of the entropy of its tokens: 1 (one token) .. V.
    """
    counts_E = table_VE.sum(0)
    e, E = int(counts_E.argmax()), len(counts_E)
    share_V = table_VE[:, e] / counts_E[e]
    some_V = share_V[share_V > 0]
    tokens = [
        {"id": int(v), "share": float(share_V[v]), "purity": float(table_VE[v, e] / table_VE[v].sum())}
        for v in np.argsort(-share_V)[:top]
        if share_V[v] > 0
    ]
    effective = float(np.exp(-(some_V * np.log(some_V)).sum()))
    return {
        "expert": e,
        "deviation": float(E * counts_E[e] / counts_E.sum() - 1),
        "tokens": tokens,
        "effective_tokens": effective,
    }
