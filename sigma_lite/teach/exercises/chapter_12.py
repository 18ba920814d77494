"""Why layer 0: what one token's frequency forbids, how lumps fall, and how large a layer's lumps are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sigma_lite.balance import information, zipf
from sigma_lite.teach.exercises.exercise import Exercise


def floor(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return zipf.token_floor(counts_V, n_experts, k).single


def _floor_in_words(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    fair_share = k * counts_V.sum() / n_experts
    return max(0.0, float(counts_V.max() / fair_share - 1))


def _without_k(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return max(0.0, float(n_experts * counts_V.max() / counts_V.sum() - 1))


def _below_0(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return float(n_experts * counts_V.max() / counts_V.sum() / k - 1)


def loads_of(counts_V: np.ndarray, homes_V: np.ndarray, n_experts: int) -> np.ndarray:
    loads_E = np.bincount(homes_V, weights=counts_V, minlength=n_experts)
    return n_experts * loads_E / counts_V.sum()


def _loads_in_a_loop(counts_V: np.ndarray, homes_V: np.ndarray, n_experts: int) -> np.ndarray:
    loads_E = np.zeros(n_experts)
    for count, home in zip(counts_V, homes_V, strict=True):
        loads_E[home] += count
    return loads_E / loads_E.mean()


def _kinds_not_tokens(counts_V: np.ndarray, homes_V: np.ndarray, n_experts: int) -> np.ndarray:
    return loads_of(np.ones(len(counts_V)), homes_V, n_experts)


def _shares(counts_V: np.ndarray, homes_V: np.ndarray, n_experts: int) -> np.ndarray:
    return loads_of(counts_V, homes_V, n_experts) / n_experts


def packing(counts_V: np.ndarray, n_experts: int) -> float:
    return zipf.token_floor(counts_V, n_experts).packed


def _packing_in_a_loop(counts_V: np.ndarray, n_experts: int) -> float:
    loads_E = np.zeros(n_experts)
    for count in np.sort(counts_V)[::-1]:
        loads_E[loads_E.argmin()] += count
    return float(loads_E.max() / loads_E.mean() - 1)


def _unsorted(counts_V: np.ndarray, n_experts: int) -> float:
    loads_E = np.zeros(n_experts)
    for count in counts_V:
        loads_E[loads_E.argmin()] += count
    return float(loads_E.max() / loads_E.mean() - 1)


def _in_turn(counts_V: np.ndarray, n_experts: int) -> float:
    homes_V = np.arange(len(counts_V)) % n_experts
    return float(loads_of(np.sort(counts_V)[::-1], homes_V, n_experts).max() - 1)


def _variance_of_one_expert(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    p_V, chance = counts_V / counts_V.sum(), k / n_experts  # that an expert is one of a token's homes
    of_slots = (p_V**2 * chance * (1 - chance)).sum()  # variance of an expert's load in tokens
    return float(of_slots / chance**2)  # in fair shares


def _one_home(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return zipf.lump_variance(counts_V, n_experts) / k


def _always_one(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return zipf.lump_variance(counts_V, n_experts)


def _counts_not_shares(counts_V: np.ndarray, n_experts: int, k: int) -> float:
    return zipf.lump_variance(counts_V, n_experts, k) * counts_V.sum() ** 2


def lumps_of(table_VE: np.ndarray) -> float:
    facts = zipf.load_variance(table_VE)
    return float(facts["own"] * facts["std"] ** 2)


def _lumps_token_by_token(table_VE: np.ndarray) -> float:
    E, total = table_VE.shape[1], table_VE.sum()
    return float(sum((E * row_E / total).var() for row_E in table_VE))


def _all_of_the_load(table_VE: np.ndarray) -> float:
    E = table_VE.shape[1]
    return float((E * table_VE.sum(0) / table_VE.sum()).var())


def _in_shares(table_VE: np.ndarray) -> float:
    return lumps_of(table_VE) / table_VE.shape[1] ** 2


def _each_row_alone(table_VE: np.ndarray) -> float:
    E = table_VE.shape[1]
    return float(sum((E * row_E / row_E.sum()).var() for row_E in table_VE))


def explained(table_VE: np.ndarray) -> float:
    token_N, expert_N = (np.repeat(x.ravel(), table_VE.ravel().astype(int)) for x in np.indices(table_VE.shape))
    known = information.mutual_information(expert_N, [token_N], corrected=False)
    return known / information.entropy(expert_N, corrected=False)


def _two_entropies(table_VE: np.ndarray) -> float:
    def entropy(counts: np.ndarray) -> float:
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    share_V = table_VE.sum(1) / table_VE.sum()
    before = entropy(table_VE.sum(0))
    after = sum(share * entropy(row_E) for share, row_E in zip(share_V, table_VE, strict=True))
    return 1 - after / before


def _unweighted_rows(table_VE: np.ndarray) -> float:
    rows = [_entropy(row_E) for row_E in table_VE]
    return float(1 - np.mean(rows) / _entropy(table_VE.sum(0)))


def _entropy(counts_E: np.ndarray) -> float:
    """Entropy in nats of what was counted."""
    return information.entropy(np.repeat(np.arange(len(counts_E)), counts_E.astype(int)), corrected=False)


def _what_is_left(table_VE: np.ndarray) -> float:
    return 1 - explained(table_VE)


def _of_ln_e(table_VE: np.ndarray) -> float:
    left = (1 - explained(table_VE)) * _entropy(table_VE.sum(0))
    return 1 - left / float(np.log(table_VE.shape[1]))


def _largest_heap_first(lumps_L: Sequence[float], budget: int) -> tuple[int, ...]:
    k = [1] * len(lumps_L)
    while sum(k) < budget:
        worst = max(range(len(k)), key=lambda layer: lumps_L[layer] / k[layer])
        k[worst] += 1
    return tuple(k)


def _all_to_one(lumps_L: Sequence[float], budget: int) -> tuple[int, ...]:
    worst = int(np.argmax(lumps_L))
    return tuple(1 + (budget - len(lumps_L)) * (layer == worst) for layer in range(len(lumps_L)))


def _evenly(lumps_L: Sequence[float], budget: int) -> tuple[int, ...]:
    each, more = divmod(budget, len(lumps_L))
    return tuple(each + (layer < more) for layer in range(len(lumps_L)))


def _texts() -> list:
    frequent, even = np.array([50.0, 20, 10, 10, 5, 5]), np.ones(40)
    return [(frequent, 8, 1), (frequent, 8, 3), (frequent, 2, 1), (even, 16, 1), (even, 16, 4)]


def _thrown() -> list:
    return [
        (np.array([50.0, 30, 20]), np.array([1, 0, 1]), 4),
        (np.array([5.0, 1, 1, 3, 2]), np.array([2, 0, 0, 4, 2]), 6),
    ]


def _packed() -> list:
    return [(np.array([3.0, 2, 6, 2, 5]), 2), (np.array([1.0, 1, 1, 9, 4, 4, 3]), 3), (np.array([7.0, 7, 5, 5, 4]), 3)]


def _tables() -> list:
    spread = np.array([[6, 2, 0, 0], [1, 1, 1, 1], [0, 0, 8, 0]])
    return [(spread,), (np.array([[3, 1], [0, 2], [5, 4]]),)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="token_floor",
        chapter=12,
        asks="the floor of one token",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=floor,
        also=_floor_in_words,
        source="balance.zipf.token_floor",
        hint="A fair share is K times all tokens, divided by E. The most frequent token puts all its occurrences on each of"
        " its homes.",
        inputs=_texts,
        mistake=_without_k,
        says="that is the floor at K = 1: with K homes a token fills K experts, and a fair share is K / E",
        others=((_below_0, "a token below a fair share forbids nothing: no floor is below 0"),),
    ),
    Exercise(
        name="loads_of",
        chapter=12,
        asks="lumps on experts",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=loads_of,
        also=_loads_in_a_loop,
        source="teach.exercises.chapter_12.loads_of",
        hint="Begin with a zero for each expert, and add each token's count at its home. Then divide by the mean.",
        inputs=_thrown,
        mistake=_kinds_not_tokens,
        says="you count the kinds of tokens: an expert works for every occurrence, so add up counts_V",
        others=((_shares, "those are shares of the text: divide by a fair share, which is 1 / E"),),
        axes="E",
    ),
    Exercise(
        name="packing",
        chapter=12,
        asks="pack, largest first",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=packing,
        also=_packing_in_a_loop,
        source="balance.zipf.longest_first",
        hint="Sort the counts, largest first. Give each to the expert that has least so far: argmin finds it.",
        inputs=_packed,
        mistake=_unsorted,
        says="you take the tokens as they come: sort them, the largest first",
        others=((_in_turn, "you deal the tokens out in turn: give each to the expert that has least at that moment"),),
    ),
    Exercise(
        name="lump_variance",
        chapter=12,
        asks="lumps at random",
        minutes=15,
        difficulty=3,
        importance=5,
        solution=zipf.lump_variance,
        also=_variance_of_one_expert,
        source="balance.zipf.lump_variance",
        hint="Begin with one token: an expert is among its K homes with chance c = K / E. Such a yes or no has the variance"
        " c (1 - c). Tokens are thrown independently, so variances add up. Then go over to fair shares.",
        inputs=_texts,
        mistake=_one_home,
        says="almost: the K homes of a token are different experts, which makes it E / K - 1, not (E - 1) / K",
        others=(
            (_always_one, "that is right for K = 1: with K homes, a token is K smaller lumps"),
            (_counts_not_shares, "you square the counts: p holds shares of the text, so divide by all tokens first"),
        ),
    ),
    Exercise(
        name="lumps_of",
        chapter=12,
        asks="how large are a layer's lumps?",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=lumps_of,
        also=_lumps_token_by_token,
        source="balance.zipf.load_variance",
        hint="A row of the table, divided by all tokens and multiplied by E, is what one token gives to each expert in fair"
        " shares. Take the variance of each row over experts, and add the rows up.",
        inputs=_tables,
        mistake=_all_of_the_load,
        says="that is the variance of the load, in which tokens also add up or make up for each other:"
        " take the variance of each row first, and then the sum",
        others=(
            (_in_shares, "right in shares of the text: a fair share is 1 / E, so multiply by E squared"),
            (_each_row_alone, "you divide each row by its own sum, so a rare token weighs as much: divide by all tokens"),
        ),
    ),
    Exercise(
        name="explained",
        chapter=12,
        asks="what the token explains",
        minutes=15,
        difficulty=3,
        importance=3,
        solution=explained,
        also=_two_entropies,
        source="balance.information.mutual_information",
        hint="Two entropies: of the experts of all tokens together, and of the experts of one token, averaged over tokens"
        " with their frequencies. 1 minus the second divided by the first. 0 log 0 counts as 0.",
        inputs=_tables,
        mistake=_unweighted_rows,
        says="you average over kinds of tokens: a frequent token must weigh as much as it is frequent",
        others=(
            (_what_is_left, "that is what the token leaves open: take 1 minus it"),
            (_of_ln_e, "you divide by ln E, as if all experts were equally busy: divide by the entropy of all experts"),
        ),
    ),
    Exercise(
        name="k_list",
        chapter=12,
        asks="a list of K",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=zipf.k_list,
        also=_largest_heap_first,
        source="balance.zipf.k_list",
        hint="Begin with one expert in each layer. Give the next one to the layer whose lumps, divided by its K so far, are"
        " largest, until the budget is spent.",
        inputs=lambda: [([0.42, 0.2, 0.09], 9), ([0.1, 0.9, 0.3, 0.2], 4), ([0.3, 0.05, 0.25], 6)],
        mistake=_all_to_one,
        says="you give all to the layer with the largest lumps: divide its lumps by its K before you compare again",
        others=((_evenly, "you share the budget out evenly: more belongs where lumps are larger"),),
    ),
)
