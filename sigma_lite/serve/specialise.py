"""Which experts serve which tokens, kinds and domains, and how sure one can be of it.

Tokens of a text are no independent draws: neighbours share kind and expert. So chance is measured, not assumed: the rows'
labels are dealt to other rows, whole rows at a time, which keeps how labels and choices run on within a row and breaks only
what ties them together.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from torch import Tensor

LEAST = 10  # slots that a pair of expert and label needs before it is called a specialisation


class Favourite(NamedTuple):
    token: int
    count: int  # slots of this expert that it fills
    of_expert: float  # share of the expert's slots
    of_token: float  # share of this token's slots that come here


class Specialisation(NamedTuple):
    """Of one layer: E experts x G labels, such as kinds or domains."""

    counts_EG: np.ndarray  # int64, slots
    z_EG: np.ndarray  # how many standard deviations of chance above its mean; 0 where chance does not vary
    bits: float  # mutual information of expert and label, per slot, 0 .. entropy of the labels
    chance: float  # the same of dealt labels, mean
    p: float  # share of the deals with as much information, one more counted on both sides
    entropy: float  # of the labels, in bits: what `bits` could be at most

    @property
    def surprising(self) -> float:
        """The z from which a cell is no chance: 5 % for all cells of the table together (Bonferroni), both directions."""
        return NormalDist().inv_cdf(1 - 0.05 / (2 * max(self.z_EG.size, 1)))

    def pairs(self) -> list[tuple[int, int]]:
        """(expert, label) of all cells above chance, the surest first."""
        sure = (self.z_EG >= self.surprising) & (self.counts_EG >= LEAST)
        return sorted(zip(*map(list, sure.nonzero()), strict=True), key=lambda cell: -self.z_EG[cell])


def specialisation(ids_TK: Tensor, labels_BS: Tensor, E: int, G: int, deals: int = 200, seed: int = 0) -> Specialisation:
    """Experts and labels of one layer.

    Args:
        ids_TK: experts of each token, T = B * S; -1 is an empty slot.
        labels_BS: 0..G-1, -1 for none.
        deals: how often rows' labels are dealt anew, for z and p.
    """
    experts, labels = ids_TK.numpy().reshape(*labels_BS.shape, -1), labels_BS.numpy()
    counts_EG = counted(experts, labels, E, G)
    rng = np.random.default_rng(seed)
    dealt = np.stack([counted(experts, labels[rng.permutation(len(labels))], E, G) for _ in range(deals)])
    mean_EG, sd_EG = dealt.mean(0), dealt.std(0)
    z_EG = np.divide(counts_EG - mean_EG, sd_EG, out=np.zeros_like(mean_EG), where=sd_EG > 0)
    bits, by_chance = information(counts_EG), np.array([information(one) for one in dealt])
    p = (1 + int((by_chance >= bits - 1e-12).sum())) / (1 + deals)
    share_G = counts_EG.sum(0) / max(counts_EG.sum(), 1)
    entropy = float(-(share_G[share_G > 0] * np.log2(share_G[share_G > 0])).sum())
    return Specialisation(counts_EG, z_EG, bits, float(by_chance.mean()), p, entropy)


def counted(experts_BSK: np.ndarray, labels_BS: np.ndarray, E: int, G: int) -> np.ndarray:
    """Slots of each expert and label, int64 [E, G]."""
    labels_BSK = np.broadcast_to(labels_BS[..., None], experts_BSK.shape)
    known = (experts_BSK >= 0) & (labels_BSK >= 0)
    return np.bincount(experts_BSK[known] * G + labels_BSK[known], minlength=E * G).reshape(E, G)


def information(counts_EG: np.ndarray) -> float:
    """Mutual information of row and column in bits, 0 or more."""
    total = counts_EG.sum()
    if total == 0:
        return 0.0
    p_EG = counts_EG / total
    apart_EG = p_EG.sum(1, keepdims=True) * p_EG.sum(0, keepdims=True)
    some = p_EG > 0
    return max(0.0, float((p_EG[some] * np.log2(p_EG[some] / apart_EG[some])).sum()))


def favourites(ids_TK: Tensor, tokens_T: Tensor, E: int, most: int = 12) -> list[list[Favourite]]:
    """Of each expert the tokens that say most about it: n log(n / expected), so neither rare chances nor what all get."""
    tokens_TK = np.broadcast_to(tokens_T.numpy()[:, None], ids_TK.shape)
    known = ids_TK.numpy() >= 0
    experts_N, tokens_N = ids_TK.numpy()[known], tokens_TK[known]
    V = int(tokens_N.max(initial=0)) + 1
    of_expert_E, of_token_V = np.bincount(experts_N, minlength=E), np.bincount(tokens_N, minlength=V)
    pairs, counts = np.unique(experts_N.astype(np.int64) * V + tokens_N, return_counts=True)
    found: list[list[tuple[float, Favourite]]] = [[] for _ in range(E)]
    for pair, n in zip(pairs.tolist(), counts.tolist(), strict=True):
        expert, token = divmod(pair, V)
        lift = n * len(experts_N) / (int(of_expert_E[expert]) * int(of_token_V[token]))
        own = Favourite(token, n, n / int(of_expert_E[expert]), n / int(of_token_V[token]))
        found[expert].append((n * math.log(lift), own))
    return [[own for _, own in sorted(of_one, key=lambda scored: -scored[0])[:most]] for of_one in found]
