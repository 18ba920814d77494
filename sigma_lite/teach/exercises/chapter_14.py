"""The family: experts that choose tokens, and what paired differences of a few seeds show."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from torch import Tensor

from sigma_lite.lab import seeds
from sigma_lite.papers import choice
from sigma_lite.teach.exercises.exercise import Exercise


def taken(scores_TE: Tensor, k: int) -> Tensor:
    """[T, E] bool: which tokens each expert takes."""
    capacity = choice.capacity(*scores_TE.shape, k)
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, scores_TE.topk(capacity, dim=0).indices, True)


def _tokens_choose(scores_TE: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, scores_TE.topk(k, dim=1).indices, True)


def _without_k(scores_TE: Tensor, k: int) -> Tensor:
    return taken(scores_TE, 1)


def _layers() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(17)
    shapes = ((6, 3, 1), (12, 4, 2), (10, 4, 1))
    return [(torch.rand(T, E, generator=generator), k) for T, E, k in shapes]


def difference(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    """Mean, low and high of the paired relative differences."""
    mean, reach = seeds.interval((one_N / other_N - 1).tolist())
    return mean, mean - reach, mean + reach


def _unpaired(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    mean = statistics.mean(one_N / other_N - 1)
    n = len(one_N)
    error = ((statistics.variance(one_N) + statistics.variance(other_N)) / n) ** 0.5 / statistics.mean(other_N)
    return mean, mean - seeds.T95[n - 2] * error, mean + seeds.T95[n - 2] * error


def _normal(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    differences = one_N / other_N - 1
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - 1.96 * error, mean + 1.96 * error


def _seeds() -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.array([1.71, 1.76, 1.73]), np.array([1.74, 1.78, 1.755])),
        (np.array([1.60, 1.66]), np.array([1.61, 1.65])),
        (np.array([2.0, 2.1, 1.9, 2.05]), np.array([2.0, 2.0, 2.0, 2.0])),
    ]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="expert_choice",
        chapter=14,
        solution=taken,
        inputs=_layers,
        mistake=_tokens_choose,
        says="that is token choice: each row has k. Here each column has k T / E, so sort along dimension 0",
        others=((_without_k, "almost: an expert takes k T / E tokens, not T / E"),),
    ),
    Exercise(
        name="paired_difference",
        chapter=14,
        solution=difference,
        inputs=_seeds,
        mistake=_unpaired,
        says="you took the spread of each arm over seeds; a pair shares its seed, so take the spread of the differences",
        others=((_normal, "almost: 1.96 is for many seeds; with n of them it is seeds.T95[n - 2], 4.3 for three"),),
    ),
)
