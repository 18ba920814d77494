"""What experts know: tables of experts and labels, how sure one can be of them, and what is lost without an expert."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sigma_lite.serve import ablate, inside, specialise
from sigma_lite.teach.exercises.exercise import Exercise

# ----------------------------------------------------------------------------------------------------------- counts


def counts(ids_TK: Tensor, labels_T: Tensor, E: int, G: int) -> Tensor:
    return torch.from_numpy(specialise.counted(ids_TK.numpy()[None], labels_T.numpy()[None], E, G))


def counts_plain(ids_TK: Tensor, labels_T: Tensor, E: int, G: int) -> Tensor:
    found_EG = torch.zeros(E, G, dtype=torch.int64)
    for experts, label in zip(ids_TK.tolist(), labels_T.tolist(), strict=True):
        for expert in experts:
            if expert >= 0 and label >= 0:
                found_EG[expert, label] += 1
    return found_EG


def _from_the_end(ids_TK: Tensor, labels_T: Tensor, E: int, G: int) -> Tensor:
    found_EG = torch.zeros(E, G, dtype=torch.int64)
    for experts, label in zip(ids_TK.tolist(), labels_T.tolist(), strict=True):
        for expert in experts:
            found_EG[expert, label] += 1
    return found_EG


def _first_choice(ids_TK: Tensor, labels_T: Tensor, E: int, G: int) -> Tensor:
    return counts_plain(ids_TK[:, :1], labels_T, E, G)


def _marked() -> list:
    draw = torch.Generator().manual_seed(15)
    ids, labels = torch.randint(-1, 6, (40, 2), generator=draw), torch.randint(-1, 3, (40,), generator=draw)
    return [(torch.tensor([[0, 2], [2, -1], [1, 0]]), torch.tensor([1, 0, -1]), 4, 2), (ids, labels, 6, 3)]


# ------------------------------------------------------------------------------------------------------------- lift


def lift(counts_EG: Tensor) -> Tensor:
    usual_G = counts_EG.sum(0) / counts_EG.sum()
    return counts_EG / counts_EG.sum(1, keepdim=True) / usual_G


def lift_plain(counts_EG: Tensor) -> Tensor:
    found_EG, total = torch.zeros(counts_EG.shape), float(counts_EG.sum())
    for e in range(len(counts_EG)):
        for g in range(counts_EG.shape[1]):
            expected = float(counts_EG[e].sum()) * float(counts_EG[:, g].sum()) / total
            found_EG[e, g] = float(counts_EG[e, g]) / expected
    return found_EG


def _share(counts_EG: Tensor) -> Tensor:
    return counts_EG / counts_EG.sum(1, keepdim=True)


def _of_the_label(counts_EG: Tensor) -> Tensor:
    return counts_EG / counts_EG.sum(0)


def _tables() -> list:
    draw = torch.Generator().manual_seed(15)
    return [(torch.tensor([[30, 10], [10, 30], [5, 15]]),), (torch.randint(1, 50, (7, 4), generator=draw),)]


# ------------------------------------------------------------------------------------------------------ information


def bits(counts_EG: Tensor) -> float:
    return specialise.information(counts_EG.numpy())


def bits_plain(counts_EG: Tensor) -> float:
    total, found = float(counts_EG.sum()), 0.0
    for e in range(len(counts_EG)):
        for g in range(counts_EG.shape[1]):
            p = float(counts_EG[e, g]) / total
            apart = float(counts_EG[e].sum()) / total * float(counts_EG[:, g].sum()) / total
            if p > 0:
                found += p * math.log2(p / apart)
    return found


def _nats(counts_EG: Tensor) -> float:
    return bits(counts_EG) * math.log(2)


def _entropy(counts_EG: Tensor) -> float:
    p_N = (counts_EG / counts_EG.sum()).flatten()
    return float(-(p_N[p_N > 0] * p_N[p_N > 0].log2()).sum())


def _with_zeros() -> list:
    draw = torch.Generator().manual_seed(15)
    return [(torch.tensor([[8, 0], [0, 8]]),), (torch.randint(0, 30, (6, 4), generator=draw),)]


# ----------------------------------------------------------------------------------------------------------- chance


def p_value(measured: float, by_chance: Tensor) -> float:
    return (1 + int((by_chance >= measured).sum())) / (1 + len(by_chance))


def p_value_plain(measured: float, by_chance: Tensor) -> float:
    as_large = 1  # the measured one itself
    for value in by_chance.tolist():
        as_large += value >= measured
    return as_large / (len(by_chance) + 1)


def _never_zero(measured: float, by_chance: Tensor) -> float:
    return int((by_chance >= measured).sum()) / len(by_chance)


def _below(measured: float, by_chance: Tensor) -> float:
    return (1 + int((by_chance < measured).sum())) / (1 + len(by_chance))


def _deals() -> list:
    return [(0.5, torch.tensor([0.1, 0.2, 0.7, 0.3])), (0.9, torch.tensor([0.1, 0.2, 0.3])), (0.2, torch.tensor([0.2, 0.1]))]


# ------------------------------------------------------------------------------------------------------- favourites


def score(n: int, of_expert: int, of_token: int, total: int) -> float:
    return n * math.log(n * total / (of_expert * of_token))


def score_plain(n: int, of_expert: int, of_token: int, total: int) -> float:
    expected = of_expert * of_token / total
    return n * (math.log(n) - math.log(expected))


def _rare_wins(n: int, of_expert: int, of_token: int, total: int) -> float:
    return math.log(n * total / (of_expert * of_token))


def _common_wins(n: int, of_expert: int, of_token: int, total: int) -> float:
    return n / of_expert


def _pairs() -> list:
    return [(1, 100, 1, 10_000), (40, 100, 400, 10_000), (3, 60, 300, 10_000)]


# ---------------------------------------------------------------------------------------------------------- without


def next_best(scores_TE: Tensor, expert: int) -> Tensor:
    bias_E = torch.zeros(scores_TE.shape[1])
    bias_E[expert] = -torch.inf
    return (scores_TE + bias_E).argmax(-1)


def next_best_plain(scores_TE: Tensor, expert: int) -> Tensor:
    found = []
    for scores_E in scores_TE.tolist():
        others = [e for e in range(len(scores_E)) if e != expert]
        found.append(max(others, key=lambda e, of=scores_E: of[e]))
    return torch.tensor(found)


def _zeroed(scores_TE: Tensor, expert: int) -> Tensor:
    scores_TE = scores_TE.clone()
    scores_TE[:, expert] = 0
    return scores_TE.argmax(-1)


def _second(scores_TE: Tensor, expert: int) -> Tensor:
    return scores_TE.topk(2).indices[:, 1]


def _scores() -> list:
    draw = torch.Generator().manual_seed(15)
    low_TE = torch.randn(12, 5, generator=draw).float() - 4
    return [(low_TE, 2), (torch.randn(9, 4, generator=draw), 0), (low_TE, int(low_TE[0].argmax()))]


# ---------------------------------------------------------------------------------------------------- who suffers


def rise_by_label(rises_T: Tensor, labels_T: Tensor, G: int) -> Tensor:
    every_T = torch.ones(len(labels_T), dtype=torch.bool)
    return torch.from_numpy(inside.mean_by(rises_T.detach(), labels_T, every_T, G)).float()


def rise_by_label_plain(rises_T: Tensor, labels_T: Tensor, G: int) -> Tensor:
    return torch.stack([rises_T.detach()[labels_T == label].mean() for label in range(G)])


def _over_all_tokens(rises_T: Tensor, labels_T: Tensor, G: int) -> Tensor:
    sums_G = torch.zeros(G).index_add(0, labels_T[labels_T >= 0], rises_T.detach()[labels_T >= 0])
    return sums_G / len(labels_T)


def _sums_only(rises_T: Tensor, labels_T: Tensor, G: int) -> Tensor:
    return torch.zeros(G).index_add(0, labels_T[labels_T >= 0], rises_T.detach()[labels_T >= 0])


def _rises() -> list:
    draw = torch.Generator().manual_seed(15)
    labels = torch.tensor([0, 1, 2, -1, 1, 0, 2, 2, -1])
    return [(torch.randn(9, generator=draw), labels, 3), (torch.arange(4.0), torch.tensor([1, 0, 0, 1]), 2)]


# -------------------------------------------------------------------------------------------------------- agreement


def agree(shares_EG: Tensor, rises_EG: Tensor, own_E: Tensor) -> float:
    return ablate.agreement(shares_EG.detach().numpy(), rises_EG.detach().numpy(), own_E.numpy(), least=20)


def agree_plain(shares_EG: Tensor, rises_EG: Tensor, own_E: Tensor) -> float:
    x, y = shares_EG.detach()[own_E >= 20].flatten().double(), rises_EG.detach()[own_E >= 20].flatten().double()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt())


def _with_idle(shares_EG: Tensor, rises_EG: Tensor, own_E: Tensor) -> float:
    return float(np.corrcoef(shares_EG.detach().flatten().numpy(), rises_EG.detach().flatten().numpy())[0, 1])


def _evidence() -> list:
    draw = torch.Generator().manual_seed(15)
    own = torch.tensor([50, 3, 80, 20, 0, 31])
    shares = torch.rand(6, 4, generator=draw)
    rises = shares + 0.5 * torch.randn(6, 4, generator=draw)
    return [(shares, rises, own), (shares, -rises, own.flip(0))]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="expert_label_counts",
        chapter=15,
        asks="a table of experts and labels",
        minutes=8,
        difficulty=2,
        importance=4,
        solution=counts,
        also=counts_plain,
        source="serve.specialise.counted",
        hint="Each slot adds 1 to the cell of its expert and its token's label. Leave out slots and labels that are -1.",
        inputs=_marked,
        mistake=_from_the_end,
        says="-1 is an empty slot, or no label. As an index it means the last one: leave it out first",
        others=((_first_choice, "all K experts of a token count, not only the first"),),
        axes="EG",
    ),
    Exercise(
        name="lift",
        chapter=15,
        asks="how much more often",
        minutes=6,
        difficulty=2,
        importance=5,
        solution=lift,
        also=lift_plain,
        source="figures.known._lift",
        hint="Compare the share of a label among an expert's own slots with its share among all slots.",
        inputs=_tables,
        mistake=_share,
        says="that is the label's share among the expert's slots: divide it by its share among all slots",
        others=((_of_the_label, "that is the expert's share of a label. It is large for busy experts, whatever they like"),),
        axes="EG",
    ),
    Exercise(
        name="information",
        chapter=15,
        asks="what the number of an expert tells",
        minutes=8,
        difficulty=3,
        importance=4,
        solution=bits,
        also=bits_plain,
        source="serve.specialise.information",
        hint="Divide the table by its sum. Compare each cell with the product of its row's and its column's share: sum"
        " p log2(p / product) over the cells that are not 0.",
        inputs=_with_zeros,
        mistake=_nats,
        says="that is in nats: take the logarithm to the base 2 for bits",
        others=((_entropy, "that is the entropy of expert and label together: compare with the product of their shares"),),
    ),
    Exercise(
        name="p_value",
        chapter=15,
        asks="could it be chance?",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=p_value,
        also=p_value_plain,
        source="serve.specialise.specialisation",
        hint="If only chance is at work, the measured value is one more deal. Count it on both sides of the fraction.",
        inputs=_deals,
        mistake=_never_zero,
        says="the measured value is one of the deals too: count it in numerator and denominator, or p can be 0",
        others=((_below, "count the deals that are as large or larger: those speak for chance"),),
    ),
    Exercise(
        name="favourite_score",
        chapter=15,
        asks="a favourite token",
        minutes=6,
        difficulty=2,
        importance=2,
        solution=score,
        also=score_plain,
        source="serve.specialise.favourites",
        hint="If expert and token had nothing to do with each other, of_expert x of_token / total slots would be expected.",
        inputs=_pairs,
        mistake=_rare_wins,
        says="without the factor n a token that came once beats all others: weigh the logarithm by n",
        others=((_common_wins, "that is largest for common tokens, which all experts get: compare with what is expected"),),
    ),
    Exercise(
        name="next_best",
        chapter=15,
        asks="take an expert away",
        minutes=6,
        difficulty=2,
        importance=4,
        solution=next_best,
        also=next_best_plain,
        source="serve.ablate.without",
        hint="Give the expert a score that can never be the largest.",
        inputs=_scores,
        mistake=_zeroed,
        says="a score of 0 may still be the largest: logits can all be negative. Use minus infinity",
        others=((_second, "tokens that did not choose this expert keep their first choice"),),
        axes="T",
    ),
    Exercise(
        name="rise_by_label",
        chapter=15,
        asks="who suffers",
        minutes=6,
        difficulty=2,
        importance=4,
        solution=rise_by_label,
        also=rise_by_label_plain,
        source="serve.inside.mean_by",
        hint="The mean over the tokens of each label; tokens without a label (-1) are in none.",
        inputs=_rises,
        mistake=_over_all_tokens,
        says="divide by the number of tokens with that label, not by all: a rare kind would seem not to suffer",
        others=((_sums_only, "that is the sum: divide by how many tokens the label has"),),
        axes="G",
    ),
    Exercise(
        name="agreement",
        chapter=15,
        asks="do those suffer who were served?",
        minutes=6,
        difficulty=2,
        importance=3,
        solution=agree,
        also=agree_plain,
        source="serve.ablate.agreement",
        hint="Keep the experts with 20 tokens or more, flatten both tables, and correlate.",
        inputs=_evidence,
        mistake=_with_idle,
        says="experts with fewer than 20 tokens are noise: leave their rows out",
    ),
)
