"""Why layer 0: what one token's frequency forbids, and how much lumps at random vary."""

from __future__ import annotations

import numpy as np

from sigma_lite.balance import zipf
from sigma_lite.teach.exercises.exercise import Exercise


def floor(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return zipf.token_floor(counts_V, n_experts, k).single


def _without_k(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return max(0.0, n_experts * counts_V.max() / counts_V.sum() - 1)


def _one_home(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return zipf.lump_variance(counts_V, n_experts) / k


def _texts() -> list:
    frequent, even = np.array([50.0, 20, 10, 10, 5, 5]), np.ones(40)
    return [(frequent, 8, 1), (frequent, 8, 3), (frequent, 2, 1), (even, 16, 1), (even, 16, 4)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="token_floor",
        chapter=12,
        solution=floor,
        inputs=_texts,
        mistake=_without_k,
        says="that is the floor at K = 1: with K homes a token fills K experts, and a fair share is K / E",
    ),
    Exercise(
        name="lump_variance",
        chapter=12,
        solution=zipf.lump_variance,
        inputs=_texts,
        mistake=_one_home,
        says="almost: the K homes of a token are different experts, which makes it E / K - 1, not (E - 1) / K",
    ),
)
