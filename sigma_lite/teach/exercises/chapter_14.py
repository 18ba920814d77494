"""The family: choices that see the batch, choices that do not, and what paired differences of a few seeds show."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from sigma_lite.lab import seeds
from sigma_lite.lab.standing import Floor, Row
from sigma_lite.lab.standing import verdict as verdict_of
from sigma_lite.papers import choice
from sigma_lite.papers.base import sinkhorn
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise


def taken(scores_TE: Tensor, k: int) -> Tensor:
    """[T, E] bool: which tokens each expert takes."""
    capacity = choice.capacity(*scores_TE.shape, k)
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, scores_TE.topk(capacity, dim=0).indices, True)


def _taken_in_a_loop(scores_TE: Tensor, k: int) -> Tensor:
    T, E = scores_TE.shape
    taken_TE = torch.zeros(T, E, dtype=torch.bool)
    for e in range(E):
        best = sorted(range(T), key=lambda t: -scores_TE[t, e].item())
        for t in best[: round(k * T / E)]:
            taken_TE[t, e] = True
    return taken_TE


def _tokens_choose(scores_TE: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, scores_TE.topk(k, dim=1).indices, True)


def _without_k(scores_TE: Tensor, k: int) -> Tensor:
    return taken(scores_TE, 1)


def plan(logits_TE: Tensor, rounds: int) -> Tensor:
    """[T, E]: exp(logits) with rows and columns scaled in turn, columns last."""
    return sinkhorn(logits_TE, rounds).exp().detach()  # asked for as a value


def _plan_by_division(logits_TE: Tensor, rounds: int) -> Tensor:
    plan_TE = logits_TE.detach().exp()
    T, E = plan_TE.shape
    for _ in range(rounds):
        plan_TE = plan_TE / plan_TE.sum(dim=1, keepdim=True)  # each token gives 1
        plan_TE = plan_TE / plan_TE.sum(dim=0) * T / E  # each expert gets T / E
    return plan_TE


def _columns_to_one(logits_TE: Tensor, rounds: int) -> Tensor:
    T, E = logits_TE.shape
    return plan(logits_TE, rounds) * E / T


def _rows_last(logits_TE: Tensor, rounds: int) -> Tensor:
    plan_TE = logits_TE.detach().exp()
    for _ in range(rounds):
        plan_TE = plan_TE / plan_TE.sum(0)
        plan_TE = plan_TE / plan_TE.sum(1, keepdim=True)
    return plan_TE


def _once(logits_TE: Tensor, rounds: int) -> Tensor:
    return plan(logits_TE, 1)


def changed(before_TK: Tensor, after_TK: Tensor) -> float:
    """Share of a row's tokens, the last one aside, that have another set of experts; -1 is an empty slot."""
    E = int(max(before_TK.max(), after_TK.max())) + 1
    before_TE, after_TE = (one_hot(ids_TK + 1, E + 1).sum(1)[:, 1:] for ids_TK in (before_TK, after_TK))
    return (before_TE != after_TE).any(1)[:-1].float().mean().item()


def _changed_by_sets(before_TK: Tensor, after_TK: Tensor) -> float:
    earlier = range(len(before_TK) - 1)
    count = 0
    for t in earlier:
        count += set(before_TK[t].tolist()) - {-1} != set(after_TK[t].tolist()) - {-1}
    return count / len(earlier)


def _slot_by_slot(before_TK: Tensor, after_TK: Tensor) -> float:
    wide = max(before_TK.shape[1], after_TK.shape[1])
    before, after = (pad(ids_TK, (0, wide - ids_TK.shape[1]), value=-1) for ids_TK in (before_TK, after_TK))
    return (before != after).any(1)[:-1].float().mean().item()


def _with_the_last(before_TK: Tensor, after_TK: Tensor) -> float:
    return changed(*(torch.cat((ids_TK, ids_TK[:1])) for ids_TK in (before_TK, after_TK)))


def _empty_is_an_expert(before_TK: Tensor, after_TK: Tensor) -> float:
    pairs = list(zip(before_TK.tolist(), after_TK.tolist(), strict=True))[:-1]
    return sum(set(before) != set(after) for before, after in pairs) / len(pairs)


def thresholds(scores_TE: Tensor, k: int) -> Tensor:
    """[E]: the lowest score that each expert still takes, if it takes its k T / E best."""
    return scores_TE.detach().topk(choice.capacity(*scores_TE.shape, k), dim=0).values[-1]


def _thresholds_in_a_loop(scores_TE: Tensor, k: int) -> Tensor:
    T, E = scores_TE.shape
    lowest = []
    for e in range(E):
        best_first = sorted(scores_TE[:, e].tolist(), reverse=True)
        lowest.append(best_first[round(k * T / E) - 1])
    return torch.tensor(lowest)


def _of_each_token(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.detach().topk(k, dim=1).values[:, -1]


def _interpolated(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.detach().quantile(1 - k / scores_TE.shape[1], dim=0)


def _first_not_taken(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.detach().topk(choice.capacity(*scores_TE.shape, k) + 1, dim=0).values[-1]


def difference(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    """Mean, low and high of the paired relative differences."""
    mean, reach = seeds.interval((one_N / other_N - 1).tolist())
    return mean, mean - reach, mean + reach


def _difference_step_by_step(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    pairs = [one / other - 1 for one, other in zip(one_N.tolist(), other_N.tolist(), strict=True)]
    n = len(pairs)
    mean = sum(pairs) / n
    variance = sum((pair - mean) ** 2 for pair in pairs) / (n - 1)
    reach = seeds.T95[n - 2] * (variance / n) ** 0.5
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


def _divided_by_n(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    (mean, low, _), n = difference(one_N, other_N), len(one_N)
    reach = (mean - low) * ((n - 1) / n) ** 0.5
    return mean, mean - reach, mean + reach


def _without_root_n(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    mean, low, _ = difference(one_N, other_N)
    reach = (mean - low) * len(one_N) ** 0.5
    return mean, mean - reach, mean + reach


def verdict(mean: float, low: float, high: float, machines: float) -> str:
    """ "better", "worse" or "within noise": of an arm with several seeds, in bits per byte."""
    nothing = {"by_seed": {}, "heldout": [], "leak": {}, "assumes": {}}
    zeros = dict.fromkeys(("bits", "trained", "layers", "dead", "token_share", "step_seconds"), 0.0)
    row = Row(arm="an arm", difference=seeds.Difference(mean, low, high, 3), **zeros, **nothing)
    return verdict_of(row, Floor(0.0, (machines,)))


def _verdict_plainly(mean: float, low: float, high: float, machines: float) -> str:
    if low <= 0 <= high:
        return "within noise"  # zero is inside of the interval
    if abs(mean) <= machines:
        return "within noise"  # another machine changes as much
    return "worse" if mean > 0 else "better"


def _by_the_mean(mean: float, low: float, high: float, machines: float) -> str:
    return "worse" if mean > 0 else "better"


def _upside_down(mean: float, low: float, high: float, machines: float) -> str:
    return {"better": "worse", "worse": "better"}.get(found := verdict(mean, low, high, machines), found)


def _machines_forgotten(mean: float, low: float, high: float, machines: float) -> str:
    return verdict(mean, low, high, 0.0)


def _sign_of_the_size(mean: float, low: float, high: float, machines: float) -> str:
    return "within noise" if mean <= machines else verdict(mean, low, high, machines)


def _layers() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(17)
    shapes = ((6, 3, 1), (12, 4, 2), (10, 4, 1))
    return [(torch.rand(T, E, generator=generator), k) for T, E, k in shapes]


def _logits() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(17)
    return [(2 * torch.randn(T, E, generator=generator), rounds) for T, E, rounds in ((6, 3, 4), (8, 2, 3))]


def _before_and_after() -> list[tuple[Tensor, Tensor]]:
    one = torch.tensor([[0, 2], [3, -1], [1, 0], [2, 1]]), torch.tensor([[2, 0], [3, 1], [1, 0], [0, 3]])
    two = torch.tensor([[4], [1], [0], [2], [3]]), torch.tensor([[4, 0], [1, -1], [3, -1], [2, -1], [0, -1]])
    return [one, two]


def _seeds() -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.array([1.71, 1.76, 1.73]), np.array([1.74, 1.78, 1.755])),
        (np.array([1.60, 1.66]), np.array([1.61, 1.65])),
        (np.array([2.0, 2.1, 1.9, 2.05]), np.array([2.0, 2.0, 2.0, 2.0])),
    ]


def _intervals() -> list[tuple[float, float, float, float]]:
    return [
        (-0.02, -0.03, -0.01, 0.0),
        (0.04, 0.01, 0.07, 0.005),
        (-0.01, -0.03, 0.01, 0.0),
        (-0.004, -0.006, -0.002, 0.005),
    ]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="expert_choice",
        chapter=14,
        asks="experts choose",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=taken,
        also=_taken_in_a_loop,
        source="papers.choice.ExpertChoice",
        hint="An expert looks down its column and takes the tokens with the highest scores. Each expert takes as many."
        " topk along dimension 0 gives the rows, and scatter_ along dimension 0 sets them to True.",
        inputs=_layers,
        mistake=_tokens_choose,
        says="that is token choice: each row has k. Here each column has k T / E, so sort along dimension 0",
        others=((_without_k, "almost: an expert takes k T / E tokens, not T / E"),),
        axes="TE",
    ),
    Exercise(
        name="sinkhorn_plan",
        chapter=14,
        asks="a solver plans",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=plan,
        also=_plan_by_division,
        source="papers.base.sinkhorn",
        hint="Begin with exp(logits), so that all entries are positive. Divide each row by its sum. Then divide each column"
        " by its sum and multiply by T / E. Repeat.",
        inputs=_logits,
        mistake=_columns_to_one,
        says="your columns sum to 1: an expert's fair share is T / E tokens",
        others=(
            (_rows_last, "you scale the columns first: begin each round with the rows, so that the columns end exact"),
            (_once, "that is one round: repeat both divisions `rounds` times"),
        ),
        axes="TE",
        tolerance=Tolerance(1e-3, 1e-5),
    ),
    Exercise(
        name="changed_tokens",
        chapter=14,
        asks="who has seen the last token?",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=changed,
        also=_changed_by_sets,
        source="lab.measure.leak",
        hint="A token's experts are a set: their order says nothing, and -1 is no expert. Compare the two sets of each"
        " token, leave the last token out, and divide by how many tokens you compared.",
        inputs=_before_and_after,
        mistake=_slot_by_slot,
        says="you compare slot by slot, but experts 0 and 2 are the same set as experts 2 and 0: compare sets",
        others=(
            (_with_the_last, "the last token was changed on purpose: leave it out of both numbers"),
            (_empty_is_an_expert, "almost: -1 is an empty slot and no expert, so take it out of both sets"),
        ),
    ),
    Exercise(
        name="expert_thresholds",
        chapter=14,
        asks="thresholds for later",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=thresholds,
        also=_thresholds_in_a_loop,
        source="papers.threshold.Thresholds",
        hint="Sort each expert's column, highest first. It takes k T / E tokens: you want the score of the last one.",
        inputs=_layers,
        mistake=_of_each_token,
        says="that is a threshold for each token: you want one for each expert, so look along dimension 0",
        others=(
            (_interpolated, "almost: quantile() goes between two scores. Take the lowest score that is still taken"),
            (_first_not_taken, "off by one: that is the highest score that is not taken"),
        ),
        axes="E",
    ),
    Exercise(
        name="paired_difference",
        chapter=14,
        asks="what three seeds show",
        minutes=10,
        difficulty=3,
        importance=5,
        solution=difference,
        also=_difference_step_by_step,
        source="lab.seeds.interval",
        hint="First compute one / other - 1 for each seed. Then take the mean and the standard deviation of these numbers"
        " (divided by n - 1). The interval reaches Student's quantile times the standard deviation over the root of n.",
        inputs=_seeds,
        mistake=_unpaired,
        says="you took the spread of each arm over seeds; a pair shares its seed, so take the spread of the differences",
        others=(
            (_normal, "almost: 1.96 is for many seeds; with n of them it is seeds.T95[n - 2], 4.3 for three"),
            (_divided_by_n, "almost: numpy's std divides by n. Here it is n - 1: std(ddof=1)"),
            (_without_root_n, "that is how far single seeds spread: divide the standard deviation by the root of n"),
        ),
    ),
    Exercise(
        name="arm_verdict",
        chapter=14,
        asks="better, worse or noise?",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=verdict,
        also=_verdict_plainly,
        source="lab.standing.verdict",
        hint="Ask twice whether the difference may be nothing: zero may lie in the interval, and another machine may change"
        " as much. Only then look at the sign. Fewer bits per byte are better.",
        inputs=_intervals,
        mistake=_by_the_mean,
        says="you look at the sign only: where the interval holds 0, another set of seeds may give the other sign",
        others=(
            (_upside_down, "upside down: bits per byte are a cost, so a negative difference is better"),
            (_machines_forgotten, "right for the seeds: a difference not larger than `machines` is noise as well"),
            (_sign_of_the_size, "compare the size of the mean with `machines`, abs(mean): a better arm has a negative mean"),
        ),
    ),
)
