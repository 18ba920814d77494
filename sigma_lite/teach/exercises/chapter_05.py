"""Collapse: what all tokens share, and the numbers that show where they go."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigma_lite.balance.losses import load_share
from sigma_lite.balance.metrics import entropy, load_deviation
from sigma_lite.figures import series
from sigma_lite.teach.exercises.exercise import Exercise


def parts(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(m [E], shared by all tokens; d [T, E], each token's own)."""
    m_E = logits_TE.detach().mean(0)
    return m_E, logits_TE.detach() - m_E


def _parts_in_a_loop(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    m_E = sum(logits_TE.detach()) / len(logits_TE)
    return m_E, torch.stack([logits_E - m_E for logits_E in logits_TE.detach()])


def _of_each_token(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    m_T = logits_TE.detach().mean(1)
    return m_T, logits_TE.detach() - m_T[:, None]


def spreads(logits_TE: Tensor) -> tuple[float, float]:
    """(spread over experts of the shared part, mean over tokens of the spread over experts of a token's own)."""
    m_E, d_TE = parts(logits_TE)
    return m_E.std().item(), d_TE.std(1).mean().item()


def _spreads_in_a_loop(logits_TE: Tensor) -> tuple[float, float]:
    m_E = logits_TE.mean(dim=0)
    own = [(logits_E - m_E).std().item() for logits_E in logits_TE]
    return m_E.std().item(), sum(own) / len(own)


def _over_tokens(logits_TE: Tensor) -> tuple[float, float]:
    m_E, d_TE = parts(logits_TE)
    return m_E.std().item(), d_TE.std(0).mean().item()


def _whole_logits(logits_TE: Tensor) -> tuple[float, float]:
    return parts(logits_TE)[0].std().item(), logits_TE.std(1).mean().item()


def deviation(f_LE: Tensor) -> tuple[Tensor, Tensor]:
    return load_deviation(f_LE.detach())  # a load has no gradient: nothing to compare


def _deviation_layer_by_layer(f_LE: Tensor) -> tuple[Tensor, Tensor]:
    E = f_LE.shape[1]
    most = torch.stack([E * max(f_E) - 1 for f_E in f_LE])
    least = torch.stack([E * min(f_E) - 1 for f_E in f_LE])
    return most, least


def _flattened(f_LE: Tensor) -> tuple[Tensor, Tensor]:
    relative = f_LE.numel() / len(f_LE) * f_LE - 1
    return relative.max(), relative.min()


def load_entropy(f_E: Tensor) -> float:
    return entropy(f_E.detach()).item()


def _entropy_in_a_loop(f_E: Tensor) -> float:
    return -sum(f * math.log(f) for f in f_E.tolist() if f > 0)


def _in_bits(f_E: Tensor) -> float:
    return load_entropy(f_E) / math.log(2)


def dead(counts_WE: Tensor) -> float:
    return float(series.dead(load_share(counts_WE.sum(0)).numpy()))


def _dead_in_a_loop(counts_WE: Tensor) -> float:
    count = 0
    for counts_W in counts_WE.T:
        count += all(n == 0 for n in counts_W.tolist())
    return float(count)


def _mean_of_batches(counts_WE: Tensor) -> float:
    return (counts_WE == 0).sum(1).float().mean().item()


def _once_a_batch(counts_WE: Tensor) -> float:
    return float((counts_WE == 0).sum())


def chance(n_experts: int, tokens: int) -> float:
    """About how far above its share the busiest expert of a router that draws experts at random is."""
    return math.sqrt(n_experts / tokens) * math.sqrt(2 * math.log(n_experts))


def _chance_in_two_parts(n_experts: int, tokens: int) -> float:
    tokens_of_an_expert = tokens / n_experts
    one_deviation = 1 / tokens_of_an_expert**0.5  # relative: a count of n scatters by the root of n
    return one_deviation * (2 * math.log(n_experts)) ** 0.5


def _one_deviation(n_experts: int, tokens: int) -> float:
    return math.sqrt(n_experts / tokens)


def waiting(f_E: Tensor) -> float:
    """Share of the time that devices wait, one expert on each, for the busiest."""
    return (1 - 1 / (len(f_E) * f_E.detach().max())).item()


def _waiting_by_device(f_E: Tensor) -> float:
    longest = max(f_E.tolist())
    return sum(1 - f / longest for f in f_E.tolist()) / len(f_E)


def _above_the_mean(f_E: Tensor) -> float:
    return (len(f_E) * f_E.detach().max() - 1).item()


def _working(f_E: Tensor) -> float:
    return 1 - waiting(f_E)


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _logits() -> list:
    draw = _draw()
    lean_E = torch.tensor([1.0, 0.0, -1.0, 0.5])
    return [(torch.randn(6, 4, generator=draw) + lean_E,), (torch.randn(9, 8, generator=draw),)]


def _shares() -> list:
    counts_LE = torch.randint(0, 9, (3, 8), generator=_draw())
    return [(load_share(counts_LE),), (load_share(counts_LE[:1, :5]),)]


def _layer() -> list:
    return [(torch.tensor(counts) / sum(counts),) for counts in ([3.0, 1, 0, 4], [5.0, 2, 2, 0, 0, 7], [1.0, 2, 3])]


def _counts() -> list:
    counts_WE = torch.poisson(torch.full((6, 12), 0.4), generator=_draw()).long()
    return [(counts_WE,), (torch.tensor([[2, 0, 0], [0, 3, 0]]),)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="shared_part",
        chapter=5,
        asks="what all tokens share",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=parts,
        also=_parts_in_a_loop,
        source="teach.exercises.chapter_05.parts",
        hint="The shared part has one number for each expert: the mean of its column. The rest is what remains.",
        inputs=_logits,
        mistake=_of_each_token,
        says="you took the mean over the experts of each token: all tokens share the mean over tokens, dimension 0",
    ),
    Exercise(
        name="load_deviation",
        chapter=5,
        asks="the two extremes",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=deviation,
        also=_deviation_layer_by_layer,
        source="balance.metrics.load_deviation",
        hint="Multiply by the number of experts and subtract 1. Then take the largest and the smallest of each row.",
        inputs=_shares,
        mistake=_flattened,
        says="one number for all layers: a layer that collapses then hides behind the others. Work along the last axis",
        axes="L",
    ),
    Exercise(
        name="load_entropy",
        chapter=5,
        asks="the entropy of a load",
        minutes=5,
        difficulty=2,
        importance=2,
        solution=load_entropy,
        also=_entropy_in_a_loop,
        source="balance.metrics.entropy",
        hint="Add up f times log f and change the sign. An expert without tokens adds nothing, although log 0 is infinite.",
        inputs=_layer,
        mistake=_in_bits,
        says="right in bits: nats use the natural logarithm",
    ),
    Exercise(
        name="dead_experts",
        chapter=5,
        asks="dead in the whole window",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=dead,
        also=_dead_in_a_loop,
        source="balance.metrics.ExpertLoad",
        hint="An expert that rests in one batch and works in the next one is not dead. Look at the sum over the batches.",
        inputs=_counts,
        mistake=_mean_of_batches,
        says="that is the mean over batches: it calls an expert dead that only rested. Add the counts first",
        others=((_once_a_batch, "you count an expert once for each batch in which it rests: add up the batches first"),),
    ),
    Exercise(
        name="chance_deviation",
        chapter=5,
        asks="what chance alone does",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=chance,
        also=_chance_in_two_parts,
        source="teach.exercises.chapter_05.chance",
        hint="Multiply the two roots of the text. math.log is the natural logarithm.",
        inputs=lambda: [(96, 2048), (8, 512), (32, 20_480)],
        mistake=_one_deviation,
        says="that is one standard deviation: the largest of E experts lies the root of 2 ln E of them out",
    ),
    Exercise(
        name="spreads",
        chapter=5,
        asks="two spreads",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=spreads,
        also=_spreads_in_a_loop,
        source="teach.exercises.chapter_05.spreads",
        hint="Split the logits as in step 1. A choice compares experts, so both are standard deviations over experts.",
        inputs=_logits,
        mistake=_over_tokens,
        says="your second spread is over tokens: take it over the experts, for each token, and average over tokens",
        others=((_whole_logits, "the second spread is of a token's own part: subtract the shared part first"),),
    ),
    Exercise(
        name="waiting_share",
        chapter=5,
        asks="time spent waiting",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=waiting,
        also=_waiting_by_device,
        source="teach.exercises.chapter_05.waiting",
        hint="Call the busiest device's time 1. How much of this time does the mean device work?",
        inputs=_layer,
        mistake=_above_the_mean,
        says="so much longer than a fair share it takes: divide by the whole time, in which the mean device works 1 / (E f)",
        others=((_working, "that is the share of the time in which devices work: they wait for the rest of it"),),
    ),
)
