"""How far and how fast a bias moves: walks, the quantile that sets it at once, shrinking steps and their regret."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.bias import centred
from sigma_lite.papers import alf
from sigma_lite.teach.exercises.exercise import Exercise


def travel(steps: int, rate: float) -> tuple[float, float]:
    """(widest spread of two biases after some sign steps, root mean square of one bias whose signs are coin tosses)."""
    return 2 * rate * steps, rate * steps**0.5


def _travel_step_by_step(steps: int, rate: float) -> tuple[float, float]:
    high = low = mean_square = 0.0
    for _ in range(steps):
        high, low = high + rate, low - rate
        mean_square += rate**2  # variances of independent steps add up
    return high - low, mean_square**0.5


def _one_bias_moves(steps: int, rate: float) -> tuple[float, float]:
    return rate * steps, rate * steps**0.5


def _straight_by_chance(steps: int, rate: float) -> tuple[float, float]:
    return 2 * rate * steps, rate * steps


def wanted(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    return alf.wanted_bias(score_TE, bias_E, 1)


def _wanted_by_sorting(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    sorted_TE = (score_TE + bias_E).sort(dim=-1).values
    second_T = sorted_TE[:, -2]
    return second_T[:, None] - score_TE


def _against_the_best(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    return (score_TE + bias_E).amax(-1, keepdim=True) - score_TE


def _bias_taken_off_twice(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    return wanted(score_TE, bias_E) - bias_E


def quantile_step(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    """The next bias: of what the tokens want, the (T // E + 1)-th smallest of each expert; mean 0."""
    wanted_TE = wanted(score_TE.detach(), bias_E.detach())
    fair = len(score_TE) // len(bias_E)
    return centred(wanted_TE.kthvalue(fair + 1, dim=0).values)


def _quantile_expert_by_expert(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    T, E = score_TE.shape
    wanted_TE, new = wanted(score_TE, bias_E), []
    for e in range(E):
        new.append(wanted_TE[:, e].sort().values[T // E])
    new_E = torch.stack(new)
    return new_E - new_E.mean()


def _from_the_other_end(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    wanted_TE = wanted(score_TE.detach(), bias_E.detach())
    return centred(wanted_TE.sort(0, descending=True).values[len(score_TE) // len(bias_E)])


def _mean_left_on(score_TE: Tensor, bias_E: Tensor) -> Tensor:
    return wanted(score_TE.detach(), bias_E.detach()).kthvalue(len(score_TE) // len(bias_E) + 1, dim=0).values


def histogram(wanted_TE: Tensor, bias_E: Tensor, bins: int) -> Tensor:
    return alf.histogram(wanted_TE, bias_E, bins)


def _histogram_expert_by_expert(wanted_TE: Tensor, bias_E: Tensor, bins: int) -> Tensor:
    low, high = bias_E.min() - 1, bias_E.max() + 1
    place_TE = ((wanted_TE - low) / (high - low) * bins).long()
    rows = []
    for e in range(len(bias_E)):
        rows.append(torch.bincount(place_TE[:, e], minlength=bins))
    return torch.stack(rows)


def _shares_of_the_batch(wanted_TE: Tensor, bias_E: Tensor, bins: int) -> Tensor:
    return histogram(wanted_TE, bias_E, bins) / len(wanted_TE)


def _bins_first(wanted_TE: Tensor, bias_E: Tensor, bins: int) -> Tensor:
    return histogram(wanted_TE, bias_E, bins).T


def stream_step(price_E: Tensor, loads_E: Tensor, n: int, mu: float) -> Tensor:
    """The price after the n-th batch of a stream: a step of 1 / (mu n) against share of tokens minus 1 / E; mean 0."""
    slope_E = loads_E / loads_E.sum() - 1 / len(loads_E)
    return centred(price_E.detach() - slope_E / (mu * n))


def _stream_step_in_a_loop(price_E: Tensor, loads_E: Tensor, n: int, mu: float) -> Tensor:
    E, total, new = len(loads_E), sum(loads_E.tolist()), []
    for price, load in zip(price_E.tolist(), loads_E.tolist(), strict=True):
        new.append(price - (load / total - 1 / E) / (mu * n))
    mean = sum(new) / E
    return torch.tensor([price - mean for price in new])


def _always_the_first(price_E: Tensor, loads_E: Tensor, n: int, mu: float) -> Tensor:
    return stream_step(price_E, loads_E, 1, mu)


def _towards_the_full(price_E: Tensor, loads_E: Tensor, n: int, mu: float) -> Tensor:
    return stream_step(price_E, loads_E, n, -mu)


def regret(cost_N: Tensor, best_N: Tensor) -> Tensor:
    """[N], what the first n steps have cost above the best."""
    return (cost_N - best_N).detach().cumsum(0)


def _regret_in_a_loop(cost_N: Tensor, best_N: Tensor) -> Tensor:
    total, found = 0.0, []
    for cost, best in zip(cost_N.tolist(), best_N.tolist(), strict=True):
        total += cost - best
        found.append(total)
    return torch.tensor(found)


def _each_step_alone(cost_N: Tensor, best_N: Tensor) -> Tensor:
    return cost_N.detach() - best_N.detach()


def _mean_so_far(cost_N: Tensor, best_N: Tensor) -> Tensor:
    return regret(cost_N, best_N) / torch.arange(1, len(cost_N) + 1)


def overload(score_TE: Tensor, bias_E: Tensor) -> tuple[float, int]:
    """(excess of the busiest expert over a fair share, experts without a token) at a bias that stands still; K = 1."""
    f_E = torch.bincount((score_TE + bias_E).argmax(-1), minlength=len(bias_E)) / len(score_TE)
    return (len(f_E) * f_E.max() - 1).item(), int((f_E == 0).sum())


def _overload_by_counting(score_TE: Tensor, bias_E: Tensor) -> tuple[float, int]:
    T, E = score_TE.shape
    loads = [0] * E
    for score_E in score_TE:
        loads[int((score_E + bias_E).argmax())] += 1
    return max(loads) / (T / E) - 1, loads.count(0)


def _without_the_bias(score_TE: Tensor, bias_E: Tensor) -> tuple[float, int]:
    return overload(score_TE, torch.zeros_like(bias_E))


def _times_a_share(score_TE: Tensor, bias_E: Tensor) -> tuple[float, int]:
    excess, idle = overload(score_TE, bias_E)
    return excess + 1, idle


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(10)


def _scores() -> list:
    draw, cases = _draw(), []
    for T, E in ((12, 4), (31, 6)):
        logits_TE = torch.randn(T, E, generator=draw) + torch.linspace(-1, 1, E)
        cases.append((logits_TE.sigmoid(), 0.2 * torch.randn(E, generator=draw)))
    return cases


def _wishes() -> list:
    return [(wanted(score_TE, bias_E), bias_E, bins) for (score_TE, bias_E), bins in zip(_scores(), (5, 16), strict=True)]


def _streams() -> list:
    return [
        (torch.tensor([0.3, 0.0, 0.1]), torch.tensor([9, 0, 3]), 2, 1.25),
        (torch.tensor([0.0, 0.2, 0.0, -0.1]), torch.tensor([0, 5, 5, 6]), 7, 0.5),
    ]


def _costs() -> list:
    draw = _draw()
    return [tuple(torch.rand(2, N, generator=draw) * torch.tensor([[1.0], [0.2]])) for N in (5, 12)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="bias_travel",
        chapter=10,
        asks="in a line, and by chance",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=travel,
        also=_travel_step_by_step,
        source="balance.bias.bias_step",
        hint="In a straight line distances add up, and two biases move. By chance the squares of the steps add up.",
        inputs=lambda: [(100, 0.001), (500, 0.003), (9, 0.01)],
        mistake=_one_bias_moves,
        says="your spread is half as wide as it can be: one bias rises and the other one falls",
        others=((_straight_by_chance, "coin tosses cancel: their squares add up, so take the root of the number of steps"),),
    ),
    Exercise(
        name="wanted_bias",
        chapter=10,
        asks="what a token wants",
        minutes=10,
        difficulty=3,
        importance=5,
        solution=wanted,
        also=_wanted_by_sorting,
        source="papers.alf.wanted_bias",
        hint="Find the second largest sum of score and bias of each token. An expert must stay above it, so take away the"
        " expert's score.",
        inputs=_scores,
        mistake=_against_the_best,
        says="you compare with the best expert, which is often the expert itself: compare with the second best",
        others=((_bias_taken_off_twice, "take away the score alone: the answer is itself a bias, not a change of one"),),
        axes="TE",
    ),
    Exercise(
        name="quantile_step",
        chapter=10,
        asks="all prices at once",
        minutes=10,
        difficulty=3,
        importance=5,
        solution=quantile_step,
        also=_quantile_expert_by_expert,
        source="papers.alf.QuantileBalancing.next_bias",
        hint="Sort each expert's column of step 2. A bias just above the T / E smallest numbers wins just these tokens.",
        inputs=_scores,
        mistake=_from_the_other_end,
        says="you count from the largest: a bias wins the tokens that want less than it, so count from the smallest",
        others=((_mean_left_on, "right up to a constant: take the mean off, so that the biases do not drift together"),),
        axes="E",
    ),
    Exercise(
        name="wish_histogram",
        chapter=10,
        asks="counts that add up",
        minutes=10,
        difficulty=3,
        importance=3,
        solution=histogram,
        also=_histogram_expert_by_expert,
        source="papers.alf.histogram",
        hint="Turn each number into the number of its bin: how far it lies between low and high, times the bins, rounded"
        " down. Then count each expert's column.",
        inputs=_wishes,
        mistake=_shares_of_the_batch,
        says="these are shares of a batch, and batches may differ in size: leave whole numbers, which add up exactly",
        others=((_bins_first, "the other way round: a row for each expert, a column for each bin"),),
    ),
    Exercise(
        name="stream_step",
        chapter=10,
        asks="steps that shrink",
        minutes=5,
        difficulty=2,
        importance=4,
        solution=stream_step,
        also=_stream_step_in_a_loop,
        source="papers.alf.online",
        hint="The slope is the share of tokens minus 1 / E. Go against the slope, by 1 / (mu n) times it.",
        inputs=_streams,
        mistake=_always_the_first,
        says="your steps do not shrink: divide by n as well",
        others=((_towards_the_full, "uphill: an expert with too many tokens must lose price"),),
        axes="E",
    ),
    Exercise(
        name="regret",
        chapter=10,
        asks="the regret",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=regret,
        also=_regret_in_a_loop,
        source="teach.exercises.chapter_10.regret",
        hint="Subtract step by step. Then take the running sum.",
        inputs=_costs,
        mistake=_each_step_alone,
        says="that is what each step costs too much: add up all steps so far",
        others=((_mean_so_far, "that is the mean so far: a regret is the sum"),),
        axes="N",
    ),
    Exercise(
        name="price_overload",
        chapter=10,
        asks="a price that stands still",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=overload,
        also=_overload_by_counting,
        source="teach.exercises.chapter_10.overload",
        hint="Choose with score plus bias and count. Divide the largest count by a fair one, and take 1 away.",
        inputs=_scores,
        mistake=_without_the_bias,
        says="you chose by the scores alone: add the bias first",
        others=((_times_a_share, "right up to 1: an expert with exactly a fair share has an excess of 0"),),
    ),
)
