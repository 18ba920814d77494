"""Loss-free balance: choice and gate, two rules, a price, and how far the biases drift apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step, spread
from sigma_lite.teach.exercises.exercise import Exercise


def choose(score_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """(expert of each token, its gate); K = 1."""
    ids_T = (score_TE + bias_E).detach().argmax(-1)
    return ids_T, score_TE.detach().gather(1, ids_T[:, None])[:, 0]


def _choose_token_by_token(score_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    ids = [int((score_E + bias_E).argmax()) for score_E in score_TE]
    gates = [score_E[e].item() for score_E, e in zip(score_TE, ids, strict=True)]
    return torch.tensor(ids), torch.tensor(gates)


def _biased_gate(score_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    gate_T, ids_T = (score_TE + bias_E).detach().max(-1)
    return ids_T, gate_T


def _no_bias(score_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    return choose(score_TE, torch.zeros_like(bias_E))


def sign_step(counts_E: Tensor, rate: float) -> Tensor:
    return bias_step(counts_E, "sign", rate)


def _sign_by_comparison(counts_E: Tensor, rate: float) -> Tensor:
    fair, moves = sum(counts_E.tolist()) / len(counts_E), []
    for count in counts_E.tolist():
        moves.append(rate if count < fair else -rate if count > fair else 0.0)
    return torch.tensor(moves)


def _other_sign(counts_E: Tensor, rate: float) -> Tensor:
    return -sign_step(counts_E, rate)


def proportional(counts_E: Tensor, rate: float) -> Tensor:
    return bias_step(counts_E, "proportional", rate)


def _proportional_plainly(counts_E: Tensor, rate: float) -> Tensor:
    return rate * (1 - counts_E / counts_E.float().mean())


def _load_minus_mean(counts_E: Tensor, rate: float) -> Tensor:
    return -proportional(counts_E, rate)


def dual(score_TE: Tensor, bias_E: Tensor) -> float:
    """g(b) = sum over tokens of max (s + b) - T / E * sum of b."""
    T, E = score_TE.shape
    return ((score_TE + bias_E).amax(-1).sum() - T / E * bias_E.sum()).item()


def _dual_by_choice(score_TE: Tensor, bias_E: Tensor) -> float:
    ids_T, gate_T = choose(score_TE, bias_E)
    paid = bias_E[ids_T].sum().item()
    return gate_T.sum().item() + paid - len(score_TE) * bias_E.mean().item()


def _nothing_paid_back(score_TE: Tensor, bias_E: Tensor) -> float:
    return (score_TE + bias_E).amax(-1).sum().item()


def spreads(counts_NE: Tensor, rate: float) -> Tensor:
    return spread(bias_step(counts_NE, "sign", rate).cumsum(0))


def _spreads_in_a_loop(counts_NE: Tensor, rate: float) -> Tensor:
    bias_E, found = torch.zeros(counts_NE.shape[1]), []
    for counts_E in counts_NE:
        bias_E = bias_E + _sign_by_comparison(counts_E, rate)
        found.append(bias_E.max() - bias_E.min())
    return torch.stack(found)


def _largest(counts_NE: Tensor, rate: float) -> Tensor:
    return bias_step(counts_NE, "sign", rate).cumsum(0).abs().amax(-1)


def first_step(reach: float, rate: float) -> int:
    """The first step after which two biases can differ by `reach`."""
    return math.ceil(round(reach / (2 * rate), 6))


def _first_step_by_walking(reach: float, rate: float) -> int:
    steps = 0
    while 2 * rate * steps < reach - 1e-9:
        steps += 1
    return steps


def _one_moves(reach: float, rate: float) -> int:
    return math.ceil(round(reach / rate, 6))


def fair_gap(score_TE: Tensor, bias_E: Tensor) -> float:
    """Largest lead over the expert with the largest bias that a fair share of tokens has, over all experts."""
    lead_TE = score_TE.detach() - score_TE.detach()[:, bias_E.argmax(), None]
    fair = -(-len(lead_TE) // lead_TE.shape[1])
    return lead_TE.topk(fair, dim=0).values[-1].max().item()


def _fair_gap_sorted(score_TE: Tensor, bias_E: Tensor) -> float:
    T, E = score_TE.shape
    top, gaps = int(bias_E.argmax()), []
    for e in range(E):
        leads = sorted((score_TE[:, e] - score_TE[:, top]).tolist(), reverse=True)
        gaps.append(leads[math.ceil(T / E) - 1])
    return max(gaps)


def _widest_lead(score_TE: Tensor, bias_E: Tensor) -> float:
    return (score_TE - score_TE[:, bias_E.argmax(), None]).max().item()


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def _scores() -> list:
    draw = _draw()
    made = [(torch.randn(T, E, generator=draw), torch.randn(E, generator=draw)) for T, E in ((9, 4), (14, 6))]
    return [(logits_TE.sigmoid(), 0.3 * bias_E) for logits_TE, bias_E in made]


def _loads() -> list:
    return [(torch.tensor([9, 0, 3, 4]), 0.01), (torch.tensor([5, 5, 5]), 0.01), (torch.tensor([0, 0, 0, 0, 7]), 0.5)]


def _histories() -> list:
    draws = torch.randint(6, (12, 40), generator=_draw())
    counts_NE = torch.stack([torch.bincount(row, minlength=6) for row in draws])
    return [(counts_NE, 0.01), (torch.tensor([[8, 0, 4], [10, 14, 0]]), 0.1)]  # rows of other totals


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="choose_with_bias",
        chapter=9,
        asks="the choice and the gate",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=choose,
        also=_choose_token_by_token,
        source="model.router.Router.routing",
        hint="The sum of score and bias decides who is chosen. The gate is then looked up among the scores.",
        inputs=_scores,
        mistake=_biased_gate,
        says="your gates hold the bias: it is added for the choice only, and the gate is the score",
        others=((_no_bias, "you chose by the scores alone: add the bias before you take the largest"),),
    ),
    Exercise(
        name="sign_step",
        chapter=9,
        asks="the sign rule",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=sign_step,
        also=_sign_by_comparison,
        source="balance.bias.bias_step",
        hint="Compare each load with the mean load. Too few tokens: plus the rate. Too many: minus the rate.",
        inputs=_loads,
        mistake=_other_sign,
        says="the sign is the other way round: an expert with too many tokens must lose bias",
        axes="E",
    ),
    Exercise(
        name="proportional_step",
        chapter=9,
        asks="the gentle rule",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=proportional,
        also=_proportional_plainly,
        source="balance.bias.bias_step",
        hint="What is missing, as a share of the fair load, is 1 minus load over mean load.",
        inputs=_loads,
        mistake=_load_minus_mean,
        says="the sign is the other way round: an expert with too many tokens must lose bias",
        axes="E",
    ),
    Exercise(
        name="dual_value",
        chapter=9,
        asks="the value of a price",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=dual,
        also=_dual_by_choice,
        source="balance.dual.ascend",
        hint="Each token takes its best score plus bias. Add these up, and take away T / E times the sum of the biases.",
        inputs=_scores,
        mistake=_nothing_paid_back,
        says="subtract T / E times the sum of the biases: without it, a larger bias for all would look better",
    ),
    Exercise(
        name="bias_spread",
        chapter=9,
        asks="how far apart?",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=spreads,
        also=_spreads_in_a_loop,
        source="balance.bias.spread",
        hint="A bias is the running sum of its steps. Only differences of biases decide anything.",
        inputs=_histories,
        mistake=_largest,
        says="this is the largest bias; only differences decide, so take largest minus smallest",
        axes="N",
    ),
    Exercise(
        name="first_step",
        chapter=9,
        asks="how soon?",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=first_step,
        also=_first_step_by_walking,
        source="teach.exercises.chapter_09.first_step",
        hint="In one step one bias can rise by the rate while the other one falls by the rate.",
        inputs=lambda: [(1.0, 0.001), (1.0, 0.003), (0.35, 0.01), (0.41, 0.02)],
        mistake=_one_moves,
        says="twice too long: both biases move, one up and one down",
    ),
    Exercise(
        name="fair_gap",
        chapter=9,
        asks="the fair gap",
        minutes=15,
        difficulty=3,
        importance=3,
        solution=fair_gap,
        also=_fair_gap_sorted,
        source="teach.exercises.chapter_09.fair_gap",
        hint="For each expert sort the tokens by their lead over the expert with the largest bias. Read it at the place"
        " of a fair share, T / E rounded up. The answer is the largest of these.",
        inputs=_scores,
        mistake=_widest_lead,
        says="that is the lead of the single best token: read it at the place of a fair share, T / E rounded up",
    ),
)
