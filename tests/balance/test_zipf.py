"""The floor against brute force, informations against tables whose information is known, and the exact variance split."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_lite.balance import information as info
from sigma_lite.balance.zipf import k_list, layer_facts, load_variance, lump_variance, smallest_k, thrown, token_floor

# ---------------------------------------------------------------------------------------------------------- the floor


def best_by_brute_force(counts, E, K):
    """(smallest max, largest min) deviation over every assignment of tokens to K-subsets of experts."""
    highest, lowest = math.inf, -math.inf
    for homes in itertools.product(itertools.combinations(range(E), K), repeat=len(counts)):
        loads = np.zeros(E)
        for count, home in zip(counts, homes, strict=True):
            loads[list(home)] += count
        relative = E * loads / loads.sum() - 1
        highest, lowest = min(highest, relative.max()), max(lowest, relative.min())
    return highest, lowest


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(2, 4), st.integers(1, 3))
def test_the_best_assignment_lies_between_bound_and_packed(counts, E, K):
    K = min(K, E)
    highest, lowest = best_by_brute_force(counts, E, K)
    floor = token_floor(counts, E, K)
    tiny = 1e-9
    assert 0 <= floor.single <= floor.bound + tiny and floor.bound <= highest + tiny and highest <= floor.packed + tiny
    assert floor.packed_min <= lowest + tiny and lowest <= floor.bound_min + tiny and floor.bound_min <= 0


def test_pigeonhole_sees_what_the_most_frequent_token_does_not():
    """Four equal tokens on three experts: two must share one, 2 / (4/3) - 1. With three homes each of four: even."""
    floor = token_floor([5, 5, 5, 5], 3)
    assert floor.single == 0 and floor.bound == pytest.approx(0.5) == floor.packed
    assert token_floor([5, 5, 5, 5], 4, 3) == pytest.approx((0, 0, 0, 0, 0))


def test_hand_computed_zipf():
    """A token of 30 % on 10 experts: three times the mean. The other 70 % share nine experts: 7/9 of it."""
    counts = [300] + [1] * 700
    floor = token_floor(counts, 10)
    assert floor.single == floor.bound == pytest.approx(2) and floor.packed == pytest.approx(2)
    assert floor.bound_min == pytest.approx(7 / 9 - 1) and floor.packed_min == pytest.approx(77 * 10 / 1000 - 1)
    assert token_floor(counts, 10, 3).packed == pytest.approx(0, abs=1e-3)  # three homes of 10 %


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 100))
def test_freedom_can_only_help(counts, E, seed):
    purity = np.random.default_rng(seed).random(len(counts))
    bound, free, half = (token_floor(counts, E, 1, p) for p in (None, 0 * purity, purity))
    assert free == pytest.approx((0, 0, 0, 0, 0), abs=1e-9)
    assert half.single <= bound.single + 1e-9 and half.bound <= bound.bound + 1e-9
    assert half.bound <= half.packed + 1e-9 and half.packed_min <= half.bound_min + 1e-9
    assert half.single == pytest.approx(max(0, E * max(purity * counts) / sum(counts) - 1))


def test_purity_one_is_the_default_and_scale_does_not_matter():
    counts = np.random.default_rng(0).zipf(1.3, 500).clip(max=10_000)
    assert token_floor(counts, 24, 2) == token_floor(counts, 24, 2, np.ones(500))
    assert token_floor(counts, 24, 2) == pytest.approx(token_floor(7 * counts, 24, 2))


def test_no_floor_where_every_expert_is_a_home():
    assert token_floor([9, 4, 1], 4, 4) == pytest.approx((0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    "arguments, says",
    [(([1, 2], 4, 5), "k=5"), (([0, 0], 4), "counts"), (([-1, 2], 4), "counts"), (([3, 1], 4, 1, [1.5, 1]), "purity")],
)
def test_impossible_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        token_floor(*arguments)


def test_smallest_k_is_the_first_that_fits():
    counts = 10_000 // np.arange(1, 2000)
    k = smallest_k(counts, 96)
    deviations = [token_floor(counts, 96, i).packed for i in range(1, k + 1)]
    assert deviations[-1] <= 0.25 and all(d > 0.25 for d in deviations[:-1]) and k > 1


def test_smallest_k_counts_what_cannot_be_packed():
    """No token of four is above the mean of three experts, yet one expert gets two of them; with two homes 3, 3, 2."""
    assert smallest_k([5, 5, 5, 5], 3) == 2 and token_floor([5, 5, 5, 5], 3, 2).packed == pytest.approx(1 / 8)
    assert smallest_k([5, 5, 5, 5], 3, limit=0.5) == 1


@pytest.mark.parametrize("k", [1, 3, 8])
def test_lumps_at_random_vary_as_the_formula_says(k):
    counts = 10_000 // np.arange(1, 200)
    loads = np.array([thrown(counts, 24, k, seed) for seed in range(400)])
    assert loads.sum(1) == pytest.approx(k * counts.sum())
    assert (24 * loads / loads.sum(1, keepdims=True)).var(1).mean() == pytest.approx(lump_variance(counts, 24, k), rel=0.05)


def test_as_many_experts_per_token_as_there_are_leave_nothing_to_chance():
    assert lump_variance([5, 3, 1], 4, 4) == 0 and thrown([5, 3, 1], 4, 4).tolist() == [9, 9, 9, 9]


def test_the_lumps_of_a_pure_router_are_those_of_the_text():
    """`load_variance` of a table in which each token has one home, homes drawn at random: all of it is the lumps' own."""
    counts, rng = 10_000 // np.arange(1, 200), np.random.default_rng(0)
    table = np.zeros((199, 24))
    table[np.arange(199), rng.integers(0, 24, 199)] = counts
    facts = load_variance(table)
    assert facts["own"] * facts["std"] ** 2 == pytest.approx(lump_variance(counts, 24))


def test_k_list_spends_its_budget_where_lumps_are_largest():
    assert k_list([3, 1, 1, 1], 6) == (3, 1, 1, 1) and k_list([1, 1, 1], 9) == (3, 3, 3)
    lumps = np.array([0.9, 0.5, 0.4, 0.1])
    ks = np.array(k_list(lumps, 40))
    assert ks.sum() == 40 and (np.abs(ks - 40 * lumps / lumps.sum()) < 1).all()
    worst = max(lumps / ks)  # no exchange of one expert makes the worst layer better
    assert all(max(lumps / (ks + np.eye(4)[i] - np.eye(4)[j])) >= worst for i in range(4) for j in range(4) if ks[j] > 1)
    with pytest.raises(ValueError, match="at least one expert each"):
        k_list([1, 1, 1], 2)


# -------------------------------------------------------------------------------------------------------- information

T, E, V = 60_000, 16, 40


def tokens(seed=0):
    p = 1 / np.arange(1, V + 1)
    return np.random.default_rng(seed).choice(V, T, p=p / p.sum())


def test_entropy_of_known_tables():
    assert info.entropy([3, 3, 3]) == 0
    assert info.entropy([0, 1, 2, 3] * 50, corrected=False) == pytest.approx(math.log(4))
    assert info.entropy([0, 0, 1, 1] * 50, [0, 1, 0, 1] * 50, corrected=False) == pytest.approx(math.log(4))
    assert info.entropy([0, 1] * 50) == pytest.approx(math.log(2) + 1 / 200)


def test_miller_madow_removes_most_of_the_bias():
    """500 values, 2000 samples: the plain entropy is 0.125 too low."""
    sample = np.random.default_rng(0).integers(0, 500, 2000)
    plain, corrected = info.entropy(sample, corrected=False), info.entropy(sample)
    assert plain < math.log(500) - 0.1 and corrected == pytest.approx(math.log(500), abs=0.02)


def test_independent_experts_tell_nothing():
    v, e = tokens(), np.random.default_rng(1).integers(0, E, T)
    found = info.information(e, [v])
    assert abs(found["excess"]) < 3e-3 and abs(found["share"]) < 1e-3 and abs(found["nats"]) < 3e-3
    assert info.heldout_information(e, [v])[0] < 1e-3


def test_an_expert_decided_by_the_token_tells_its_whole_entropy():
    v = tokens()
    e = v % E
    found = info.information(e, [v])
    assert found["nats"] == pytest.approx(info.entropy(e), rel=1e-3) and found["share"] == pytest.approx(1, abs=0.01)
    assert info.heldout_information(e, [v])[0] == pytest.approx(info.entropy(e), rel=0.01)


def test_information_of_a_noisy_copy():
    """With probability 1/2 the token's home, else any of E: I = log E - H(e | v) for a uniform home."""
    rng = np.random.default_rng(2)
    v = rng.integers(0, E, T)
    e = np.where(rng.random(T) < 0.5, v, rng.integers(0, E, T))
    q = 0.5 + 0.5 / E
    truth = math.log(E) + q * math.log(q) + (1 - q) * math.log(0.5 / E)
    assert info.information(e, [v])["excess"] == pytest.approx(truth, abs=0.02)
    assert info.heldout_information(e, [v])[0] == pytest.approx(truth, abs=0.02)


def test_conditional_information_tells_the_predecessor_from_the_token():
    """The expert is token + predecessor modulo E: neither alone says anything, both say all."""
    v, u = (np.random.default_rng(s).integers(0, E, T) for s in (3, 4))
    e = (v + u) % E
    assert abs(info.information(e, [u])["excess"]) < 0.01
    assert info.information(e, [u], [v])["share"] == pytest.approx(1, abs=0.02)
    first, second = info.heldout_information(e, [v, u])
    assert abs(first) < 0.01 and second == pytest.approx(math.log(E), rel=0.1)
    assert info.information((v + 1) % E, [u], [v])["excess"] == pytest.approx(0, abs=1e-9)


def test_heldout_information_by_hand():
    """Places 0, 2 see only x = 0: p = (3/4, 1/4), sharpened to (5/6, 1/6) and scored on x = 0, 1. Places 1, 3 see both."""
    gain = (math.log((5 / 6) / (3 / 4)) + math.log((1 / 6) / (1 / 4))) / 2
    assert info.heldout_information([0, 0, 0, 1], [[7, 7, 7, 7]]) == pytest.approx([gain / 2])


def test_chain_rule():
    v, u = tokens(5), tokens(6)
    e = (v * u + np.random.default_rng(7).integers(0, 4, T)) % E
    both = info.mutual_information(e, [v, u], corrected=False)
    parts = info.mutual_information(e, [v], corrected=False) + info.mutual_information(e, [u], [v], corrected=False)
    assert both == pytest.approx(parts, abs=1e-9)


def test_a_sparse_table_seems_informative_and_the_shuffle_says_so():
    """30000 values of the predecessor in 60000 samples: the experts are random, yet the plain estimate is above 1 nat."""
    rng = np.random.default_rng(8)
    u, e = rng.integers(0, 30_000, T), rng.integers(0, E, T)
    assert info.mutual_information(e, [u], corrected=False) > 1
    assert abs(info.information(e, [u])["excess"]) < 0.02
    assert info.heldout_information(e, [u])[0] < 0.01


def test_shuffling_within_groups_keeps_each_group():
    v, e = tokens(), np.random.default_rng(9).integers(0, E, T)
    mixed = info.shuffled(e, [v])
    np.testing.assert_array_equal(info.token_table(mixed, v, E), info.token_table(e, v, E))
    assert (mixed != e).mean() > 0.5


# ------------------------------------------------------------------------------------------------- purity and variance


def test_purity_of_a_counted_table():
    table = info.token_table([0, 0, 1, 2], [0, 0, 0, 2], 3)
    assert table.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert info.purity(table).tolist() == pytest.approx([2 / 3, 0, 1])
    wide = np.random.default_rng(0).integers(0, 10**6, (9, 500))
    np.testing.assert_allclose(info.purity(wide, 3), 3 * np.sort(wide)[:, -3] / wide.sum(1))


def test_purity_by_frequency_covers_all_tokens_once():
    v = tokens()
    rows = info.purity_by_frequency(v % E, v, E)
    assert [(r["first"], r["last"]) for r in rows] == [(1, 1), (2, 4), (5, 16), (17, 40)]
    assert sum(r["share"] for r in rows) == pytest.approx(1) and all(r["purity"] == 1 for r in rows)
    assert rows[0]["share"] == pytest.approx((v == 0).mean()) and all(r["shuffled"] < 0.4 for r in rows)


def test_busiest_expert_of_a_lumpy_table():
    table = np.array([[60, 0], [20, 20], [0, 10]])
    found = info.busiest(table)
    assert found["expert"] == 0 and found["deviation"] == pytest.approx(80 / 55 - 1)
    assert [t["id"] for t in found["tokens"]] == [0, 1] and found["tokens"][0]["share"] == pytest.approx(0.75)
    assert found["tokens"][1]["purity"] == 0.5
    assert found["effective_tokens"] == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_load_variance_equals_the_double_sum_over_tokens():
    table = np.random.default_rng(0).integers(0, 50, (7, 5))
    p = table / table.sum()
    covariance = np.cov(p, bias=True)  # of p(v) p(e | v) over experts, [V, V]
    found = load_variance(table)
    assert found["std"] == pytest.approx(5 * math.sqrt(covariance.sum()))
    assert found["own"] == pytest.approx(np.trace(covariance) / covariance.sum())
    assert found["own"] + found["together"] == pytest.approx(1)


def test_crowding_and_compensation_have_opposite_signs():
    crowd = np.tile([[8, 1, 1, 1]], (30, 1))  # thirty small tokens of one mind
    spread = np.array([[40, 0, 0, 0], [0, 39, 0, 0], [0, 0, 39, 0], [0, 0, 0, 39]])  # four lumps, one expert each
    assert load_variance(crowd)["own"] == pytest.approx(1 / 30) and load_variance(spread)["together"] < -100
    assert load_variance(spread)["max_at_random"] > 0.3


def test_one_call_gives_all_facts_of_a_layer():
    v = tokens()
    e = np.where(np.random.default_rng(1).random(T) < 0.7, v % E, (v + 3) % E)
    u = np.concatenate([[-1], v[:-1]])
    facts = layer_facts(torch.tensor(e), torch.tensor(v), torch.tensor(u), torch.arange(T) % 128, E)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["tokens"] == T and facts["k"] == 1 and facts["dead"] == 0
    assert facts["busiest"]["deviation"] == pytest.approx(facts["max_deviation"])
    assert facts["information"]["token"]["share"] > 0.5 > 0.01 > abs(facts["information"]["position"]["share"])
    assert facts["floor_purity"]["bound"] <= facts["floor"]["bound"]
    assert facts["floor_purity"]["bound"] <= facts["max_deviation"] + 1e-9


def test_k_choices_count_as_slots():
    v = tokens()[:2000]
    e = np.stack([v % E, (v + 1) % E], 1)
    facts = layer_facts(e, v, v, v, E)
    load = np.bincount(e.ravel(), minlength=E) / e.size
    assert facts["k"] == 2 and facts["max_deviation"] == pytest.approx(E * load.max() - 1)
    assert facts["floor"]["bound"] <= facts["max_deviation"] + 1e-9
