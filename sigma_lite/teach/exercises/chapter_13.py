"""A balance loss of your own: a loss that does not see the size of the logits, and what a few seeds say about it."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.scale_free import scale_free_load_balancing_loss
from sigma_lite.lab import seeds
from sigma_lite.teach.exercises.exercise import Exercise

TEMPERATURE = 0.3


def spread(logits_TE: Tensor) -> Tensor:
    """Root mean square of a layer's logits, each token's mean subtracted."""
    return (logits_TE - logits_TE.mean(-1, keepdim=True)).square().mean().sqrt()


def _spread_in_a_loop(logits_TE: Tensor) -> Tensor:
    squares = [(z - row.mean()) ** 2 for row in logits_TE for z in row]
    return (sum(squares) / len(squares)) ** 0.5


def _with_the_shift(logits_TE: Tensor) -> Tensor:
    return logits_TE.square().mean().sqrt()


def _one_mean(logits_TE: Tensor) -> Tensor:
    return (logits_TE - logits_TE.mean()).square().mean().sqrt()


def _estimated(logits_TE: Tensor) -> Tensor:
    return (logits_TE - logits_TE.mean(-1, keepdim=True)).std()


def _of_each_token(logits_TE: Tensor) -> Tensor:
    return (logits_TE - logits_TE.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def loss(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    return scale_free_load_balancing_loss(logits_TE, f_E, temperature).detach()  # either gradient is right


def _loss_in_a_loop(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    centred = [row - row.mean() for row in logits_TE]
    squares = [z.item() ** 2 for row in centred for z in row]
    sigma = (sum(squares) / len(squares)) ** 0.5  # a number: no gradient passes
    q_E = sum((row / (temperature * sigma)).softmax(-1) for row in centred) / len(centred)
    return len(f_E) * sum(share * mean for share, mean in zip(f_E, q_E, strict=True))


def _spread_with_the_shift(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    return len(f_E) * (f_E * (logits_TE / (temperature * _with_the_shift(logits_TE))).softmax(-1).mean(0)).sum()


def _estimated_spread(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    z_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    return len(f_E) * (f_E * (z_TE / (temperature * z_TE.std())).softmax(-1).mean(0)).sum()


def _spread_of_each_token(logits_TE: Tensor, f_E: Tensor, temperature: float) -> Tensor:
    z_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    return len(f_E) * (f_E * (z_TE / (temperature * _of_each_token(logits_TE)[:, None])).softmax(-1).mean(0)).sum()


def along(logits_TE: Tensor, gradient_TE: Tensor) -> Tensor:
    """The slope of a loss when all logits grow in proportion: sum of z * gradient."""
    return (logits_TE * gradient_TE).sum().detach()


def _along_token_by_token(logits_TE: Tensor, gradient_TE: Tensor) -> Tensor:
    total = torch.zeros(())
    for z_E, gradient_E in zip(logits_TE, gradient_TE, strict=True):
        total = total + (z_E * gradient_E).sum()
    return total


def _all_alike(logits_TE: Tensor, gradient_TE: Tensor) -> Tensor:
    return gradient_TE.sum()


def _averaged(logits_TE: Tensor, gradient_TE: Tensor) -> Tensor:
    return (logits_TE * gradient_TE).mean()


def slope(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    """E mean_t cov_{p_t}(f, z_t): the slope of the usual loss along the logits."""
    p_TE = logits_TE.softmax(-1)
    leaning_TE = p_TE * (logits_TE - (p_TE * logits_TE).sum(-1, keepdim=True))
    return (len(f_E) * (f_E * leaning_TE.mean(0)).sum()).detach()  # asked for as a value


def _slope_token_by_token(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    total = torch.zeros(())
    for z_E in logits_TE.detach():
        p_E = z_E.softmax(0)
        mean_f, mean_z = (p_E * f_E).sum(), (p_E * z_E).sum()
        total = total + (p_E * (f_E - mean_f) * (z_E - mean_z)).sum()  # a covariance under the token's probabilities
    return len(f_E) * total / len(logits_TE)


def _without_the_mean(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    return len(f_E) * (f_E * (logits_TE.softmax(-1) * logits_TE).mean(0)).sum()


def through(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    return scale_free_load_balancing_loss(logits_TE, f_E, TEMPERATURE, through_spread=True)


def _through_plainly(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    z_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    z_TE = z_TE / z_TE.square().mean().sqrt()  # no detach: the spread moves with the logits
    q_E = (z_TE / 0.3).softmax(-1).mean(0)
    return len(f_E) * (f_E * q_E).sum()


def _held_fixed(logits_TE: Tensor, f_E: Tensor) -> Tensor:
    return scale_free_load_balancing_loss(logits_TE, f_E, TEMPERATURE)


def busiest(loads_WE: Tensor) -> float:
    """How much the busiest expert has above its share, over all windows together: 0 is even, E - 1 a collapse."""
    return (loads_WE.shape[1] * loads_WE.mean(0).max() - 1).item()


def _busiest_expert_by_expert(loads_WE: Tensor) -> float:
    W, E = loads_WE.shape
    pooled = [sum(loads_WE[w, e].item() for w in range(W)) / W for e in range(E)]
    return E * max(pooled) - 1


def _busiest_of_each(loads_WE: Tensor) -> float:
    return (loads_WE.shape[1] * loads_WE.max(1).values.mean() - 1).item()


def _shares(loads_WE: Tensor) -> float:
    return busiest(loads_WE) + 1


def gains(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Differences in per cent, seed by seed, of the seeds that both have."""
    shared = sorted(mine.keys() & theirs.keys())
    return [100 * (mine[seed] / theirs[seed] - 1) for seed in shared]


def _gains_in_a_loop(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    found = []
    for seed in sorted(mine):
        if seed in theirs:
            found.append(100 * (mine[seed] - theirs[seed]) / theirs[seed])
    return found


def _best_with_best(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [100 * (a / b - 1) for a, b in zip(sorted(mine.values()), sorted(theirs.values()), strict=False)]


def _as_shares(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [gain / 100 for gain in gains(mine, theirs)]


def needed(deviation: float, effect: float) -> int:
    """Fewest pairs whose 95 % interval reaches at most `effect` to either side; 31 if 30 are too few."""
    return seeds.pairs_needed(deviation, effect) or 31


def _needed_by_counting(deviation: float, effect: float) -> int:
    n = 2
    while n <= 30 and seeds.T95[n - 2] * deviation / n**0.5 > effect:
        n += 1
    return n


def _with_the_normal(deviation: float, effect: float) -> int:
    return next((n for n in range(2, 31) if 1.96 * deviation / n**0.5 <= effect), 31)


def _whole_width(deviation: float, effect: float) -> int:
    return needed(2 * deviation, effect)


def _layers() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(16)
    logits = [shift + torch.randn(9, 5, generator=generator) for shift in (0.0, 3.0)]
    return [(logits_TE, torch.rand(5, generator=generator).softmax(-1)) for logits_TE in logits]


def _logits() -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(16)
    shifts_T1 = torch.arange(6.0)[:, None]  # each token's logits are shifted by another number
    return [(torch.randn(6, 4, generator=draw) + shifts_T1,), (0.1 * torch.randn(6, 3, generator=draw) - shifts_T1,)]


def _with_temperature() -> list:
    return [(*layer, temperature) for layer, temperature in zip(_layers(), (0.3, 1.0), strict=True)]


def _with_gradient() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(16)
    return [tuple(torch.randn(2, T, 4, generator=draw)) for T in (3, 5)]


def _windows() -> list[tuple[Tensor]]:
    draw = torch.Generator().manual_seed(16)
    return [(torch.rand(W, E, generator=draw).softmax(-1),) for W, E in ((3, 6), (2, 10))]


def _results() -> list[tuple[dict, dict]]:
    one = {0: 1.571, 1: 1.602, 2: 1.559}, {0: 1.598, 1: 1.571, 2: 1.569}
    return [one, ({3: 1.5, 1: 1.7}, {1: 1.6, 2: 1.4, 3: 1.65})]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="logit_spread",
        chapter=13,
        asks="the spread of the logits",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=spread,
        also=_spread_in_a_loop,
        source="teach.exercises.chapter_13.spread",
        hint="A softmax does not see a shift that all logits of a token share, so subtract the token's own mean first. Then"
        " square, take one mean over all tokens and experts, and the root.",
        inputs=_logits,
        mistake=_with_the_shift,
        says="your spread grows when all logits of a token are shifted: subtract each token's mean before you square",
        others=(
            (_one_mean, "you subtract one mean for the whole layer: each token has a mean of its own, over its experts"),
            (_estimated, "almost: std() divides by n - 1, as an estimate from a sample would. These are all logits: mean()"),
            (_of_each_token, "that is a spread for each token: the loss measures the whole layer in one unit"),
        ),
    ),
    Exercise(
        name="scale_free_loss",
        chapter=13,
        asks="the scale-free loss",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=loss,
        also=_loss_in_a_loop,
        source="balance.scale_free.scale_free_load_balancing_loss",
        hint="Subtract each token's mean, divide by the spread of step 1 and by the temperature, take the softmax, and"
        " average over tokens. That is q. Then it is the usual loss with q in the place of P.",
        inputs=_with_temperature,
        mistake=_spread_with_the_shift,
        says="your spread grows when all logits of a token are shifted: subtract each token's mean before you square",
        others=(
            (
                _estimated_spread,
                "almost: std() divides by n - 1, as an estimate from a sample would, with n = T E. These are all logits:"
                " std(correction=0), or the root of the mean square",
            ),
            (_spread_of_each_token, "that is a spread for each token; the loss measures all of a layer's in one unit"),
        ),
    ),
    Exercise(
        name="slope_along",
        chapter=13,
        asks="the slope along the logits",
        minutes=3,
        difficulty=1,
        importance=4,
        solution=along,
        also=_along_token_by_token,
        source="teach.exercises.chapter_13.along",
        hint="If every logit z grows by a small share of itself, the loss changes by that share times the sum of z times its"
        " gradient.",
        inputs=_with_gradient,
        mistake=_all_alike,
        says="so it would be if all logits grew by the same number; they grow in proportion, so multiply by the logits",
        others=((_averaged, "that is the mean: the slope is the sum over all tokens and experts"),),
    ),
    Exercise(
        name="size_slope",
        chapter=13,
        asks="the strength of the shortcut",
        minutes=15,
        difficulty=4,
        importance=3,
        solution=slope,
        also=_slope_token_by_token,
        source="teach.exercises.chapter_13.slope",
        hint="When all logits of a token are multiplied by g, the derivative of p_e at g = 1 is p_e times (z_e minus the"
        " mean of z under p). Put that in the place of p in the usual loss.",
        inputs=_layers,
        mistake=_without_the_mean,
        says="a softmax's derivative has a second term: subtract the mean of z under p, or a common shift would count",
    ),
    Exercise(
        name="through_the_spread",
        chapter=13,
        asks="ten lines for the trainer",
        minutes=5,
        difficulty=2,
        importance=5,
        solution=through,
        also=_through_plainly,
        source="balance.scale_free.scale_free_load_balancing_loss",
        hint="It is step 2 at temperature 0.3, in tensor operations only: the spread must stay a tensor that depends on the"
        " logits, without detach() and without item().",
        inputs=_layers,
        mistake=_held_fixed,
        says="right value, but your spread is held fixed: no gradient passes through it. Leave out detach() and item()",
    ),
    Exercise(
        name="busiest_of_windows",
        chapter=13,
        asks="the busiest expert of some windows",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=busiest,
        also=_busiest_expert_by_expert,
        source="teach.exercises.chapter_13.busiest",
        hint="First pool: average each expert's share over the windows. Then take the largest share, and compare it with the"
        " fair share 1 / E.",
        inputs=_windows,
        mistake=_busiest_of_each,
        says="you take the busiest of each window, which may be another expert each time: average over windows first",
        others=((_shares, "that is the load in fair shares: an even layer should give 0, so subtract 1"),),
    ),
    Exercise(
        name="paired_gains",
        chapter=13,
        asks="seed by seed",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=gains,
        also=_gains_in_a_loop,
        source="lab.seeds.paired",
        hint="Take the seeds that both dicts have, in order. For each seed divide mine by theirs, subtract 1, times 100.",
        inputs=_results,
        mistake=_best_with_best,
        says="you pair the lowest result with the lowest: pair the results that have the same seed",
        others=((_as_shares, "right as fractions: the answer is in per cent, so multiply by 100"),),
    ),
    Exercise(
        name="pairs_needed",
        chapter=13,
        asks="how many seeds?",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=needed,
        also=_needed_by_counting,
        source="lab.seeds.pairs_needed",
        hint="The interval of n pairs reaches T95[n - 2] times the deviation over the root of n to either side. Try n = 2,"
        " 3, 4 and so on until it is small enough.",
        inputs=lambda: [(1.0, 1.0), (0.4, 1.0), (2.0, 1.0), (9.0, 1.0)],
        mistake=_with_the_normal,
        says="1.96 is for many seeds; n of them hardly know their own spread: use T95[n - 2], which is 12.7 for two",
        others=((_whole_width, "you ask for the whole interval: `effect` is how far it reaches to either side"),),
    ),
)
