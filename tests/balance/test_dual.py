"""The bias rule as dual ascent: what convexity promises, what it does not, and where the price ends."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step
from sigma_lite.balance.dual import Ascent, ascend, choose, cycle_length

RULES = [("sign", 1e-2), ("proportional", 1e-2), ("proportional", 0.05)]


def scores(T: int, E: int, seed: int) -> Tensor:
    """Sigmoid scores of experts that are not equally liked; fp64, so that g can be compared between steps."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator) + torch.randn(E, generator=generator)
    return logits.double().sigmoid()


def steps_by_hand(gamma: Tensor, K: int, steps: int, rule: str, rate: float):
    """(choice, next choice, D) of each step, written out as the rule of 2512.03915: p_e += eps_e (L - A_e)."""
    T, E = gamma.shape
    L, price = T * K / E, torch.zeros(E, dtype=torch.float64)
    for _ in range(steps):
        now = choose(gamma, price, K)
        short = L - now.loads.double()
        D = rate * short.sign() if rule == "sign" else rate * short / L
        yield now, choose(gamma, price + D, K), D, L
        price = price + D


# --------------------------------------------------------------------------------------------------------- the dual


@pytest.mark.parametrize("K", [1, 3])
def test_the_dual_is_what_its_definition_says(K):
    """By brute force over all choices of K experts: no topk."""
    gamma, price = scores(20, 6, 0), torch.linspace(-0.3, 0.4, 6, dtype=torch.float64)
    best = sum(max(float((g + price)[list(c)].sum()) for c in itertools.combinations(range(6), K)) for g in gamma)
    now = choose(gamma, price, K)
    assert now.dual == pytest.approx(best - 20 * K / 6 * float(price.sum()), rel=1e-12)
    assert now.chosen.sum(1).tolist() == [K] * 20 and now.loads.tolist() == now.chosen.sum(0).tolist()
    shifted = choose(gamma, price + 0.7, K)
    assert shifted.dual == pytest.approx(now.dual, rel=1e-12) and torch.equal(shifted.chosen, now.chosen)


def test_the_dual_lies_above_every_balanced_assignment():
    gamma = scores(24, 4, 1)
    generator = torch.Generator().manual_seed(0)
    experts = torch.arange(24) % 4
    values = [float(gamma[torch.randperm(24, generator=generator), experts].sum()) for _ in range(200)]
    for price in torch.randn(20, 4, generator=generator, dtype=torch.float64):
        assert choose(gamma, price, 1).dual >= max(values)


@pytest.mark.parametrize("K", [1, 3])
def test_the_dual_is_convex(K):
    gamma, generator = scores(60, 8, 2), torch.Generator().manual_seed(0)
    for a, b in torch.randn(50, 2, 8, generator=generator, dtype=torch.float64):
        middle, ends = choose(gamma, 0.3 * a + 0.7 * b, K).dual, (choose(gamma, p, K).dual for p in (a, b))
        assert middle <= sum(w * g for w, g in zip((0.3, 0.7), ends, strict=True)) + 1e-9


@pytest.mark.parametrize(("rule", "rate"), RULES)
@pytest.mark.parametrize("K", [1, 3])
def test_subgradient_inequality_and_the_condition_of_decrease(rule, rate, K):
    """<A - L, D> <= g(p') - g(p) <= <A' - L, D>: so while the new loads have not crossed L, on balance, g falls."""
    gamma, crossed = scores(128, 16, 3), []
    for now, after, D, L in steps_by_hand(gamma, K, 150, rule, rate):
        change, bound = after.dual - now.dual, float(((after.loads - L) * D).sum())
        assert float(((now.loads - L) * D).sum()) - 1e-9 <= change <= bound + 1e-9
        crossed.append(bound > 0)
        assert crossed[-1] or change <= 1e-9
    assert {True, False} == set(crossed), "both sides of the condition must occur, or nothing was shown"


@pytest.mark.parametrize(("rule", "rate"), RULES)
@pytest.mark.parametrize("K", [1, 3])
def test_no_token_moves_to_an_expert_whose_price_rose_less(rule, rate, K):
    """The preference rule: 0 <= margin of what is left over what is taken <= D of the taken - D of the left."""
    gamma, price, moves = scores(128, 16, 4), torch.zeros(16, dtype=torch.float64), 0
    for now, after, D, _ in steps_by_hand(gamma, K, 100, rule, rate):
        left, taken, value = now.chosen & ~after.chosen, after.chosen & ~now.chosen, gamma + price
        token, k, to = (left[:, :, None] & taken[:, None, :]).nonzero(as_tuple=True)
        margin = value[token, k] - value[token, to]
        assert (margin >= -1e-12).all() and (margin <= D[to] - D[k] + 1e-12).all()
        assert (now.loads[k] > now.loads[to]).all(), "from an expert with more tokens to one with fewer"
        moves, price = moves + len(token), price + D
    assert moves > 100


@pytest.mark.parametrize("seed", range(3))
def test_steps_smaller_than_every_gap_end_within_E_minus_1_of_balance(seed):
    gamma = scores(16, 4, seed)
    gaps = [(gamma[:, a] - gamma[:, b]).sort().values.diff().min() for a, b in itertools.combinations(range(4), 2)]
    found = ascend(gamma, 1, 6000, rate=0.49 * float(min(gaps)))
    assert found.loads.diff(dim=0).abs().max() <= 3
    assert found.imbalance[0] > 3 >= found.imbalance[-500:].max()


# --------------------------------------------------------------------------------------------------------- the ascent


def test_ascend_is_the_rule_written_out():
    gamma = scores(96, 8, 5)
    for rule, rate in (("sign", 1e-2), ("proportional", 1e-2)):
        found, moved = ascend(gamma, 2, 40, rule, rate), [0]
        price = torch.zeros(8, dtype=torch.float64)
        for step, (now, after, D, _) in enumerate(steps_by_hand(gamma, 2, 40, rule, rate)):
            assert torch.equal(found.loads[step], now.loads)
            assert found.dual[step].item() == pytest.approx(now.dual, rel=1e-6)
            assert found.spread[step].item() == pytest.approx(float(price.max() - price.min()), abs=1e-6)
            moved.append(sum(len(set(a) - set(b)) for a, b in zip(experts(now), experts(after), strict=True)))
            price = price + D
        assert found.moved.tolist() == moved
        torch.testing.assert_close(found.price, price, atol=1e-6, rtol=0)
        assert torch.equal(found.max_load, found.loads.max(1).values) and found.loads.shape == (41, 8)
        assert found.imbalance[7] == (found.loads[7] - 24).abs().max()


def experts(choice) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in choice.chosen]


def arm(seed: int, rule: str, rate: float, decay: str = "none") -> Ascent:
    return ascend(scores(256, 32, seed), 1, 1500, rule, rate, decay)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_table_of_rules(seed):
    """Signs of a constant size never settle; smaller ones, decayed ones and proportional ones do."""
    small, large = arm(seed, "sign", 1e-3), arm(seed, "sign", 1e-2)
    decayed, proportional = arm(seed, "sign", 1e-2, "sqrt"), arm(seed, "proportional", 1e-3)
    assert small.imbalance[0] > 20, "unbalanced to begin with: 8 tokens an expert are even"
    assert 1 <= small.imbalance[-100:].max() < large.imbalance[-100:].max() <= 8
    assert decayed.imbalance[-100:].max() == 0
    assert proportional.imbalance[-100:].max() == 0
    rises = [(found.dual.diff() > 1e-9).double().mean().item() for found in (large, proportional)]
    assert rises[0] > 0.4 and rises[1] < 0.1, "a cycle goes up as often as down"
    assert small.dual.min() < large.dual.min() and proportional.dual.min() < small.dual.min()


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_the_sign_rule_ends_in_a_cycle(rate):
    found = arm(0, "sign", rate)
    length = cycle_length(found.loads)
    assert length is not None and 1 < length < 100
    tail = found.loads[-4 * length :]
    assert torch.equal(tail[length:], tail[:-length])
    assert cycle_length(found.loads[:20]) is None, "on the way down nothing repeats"
    moved = torch.stack([bias_step(loads, "sign", 1.0) for loads in tail[-length:]]).cumsum(0)
    back = (moved == moved[:, :1]).all(1).tolist()
    assert back == [False] * (length - 1) + [True], "after one cycle, not earlier, the price is back, up to a constant"


def test_a_cycle_in_which_all_prices_drift_is_a_cycle():
    """One rich expert in turn: two of three prices rise in each step, and after three all are higher by one."""
    turns = torch.tensor([[4, 1, 1], [1, 4, 1], [1, 1, 4]]).repeat(4, 1)
    assert cycle_length(turns) == 3
    assert cycle_length(turns[:3]) is None


def test_the_price_at_the_start_counts():
    """Two tokens that prefer expert 0 by less than a step of the price go over, and come back: all is as at price 0."""
    found = ascend(torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64), 1, 2, rate=0.6)
    assert found.loads.tolist() == [[2, 0], [0, 2], [2, 0]] and cycle_length(found.loads) == 2
    assert cycle_length(found.loads[:2]) is None


def test_a_balanced_state_is_a_cycle_of_one():
    gamma = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    found = ascend(gamma, 1, 5)
    assert cycle_length(found.loads) == 1 and found.moved.sum() == found.imbalance.sum() == 0


def test_collapse_is_undone_only_after_the_spread_has_passed_the_gap():
    """All tokens prefer expert 0 by 0.5: with signs of u = 0.01 nobody moves before the spread, 2u a step, reaches it."""
    gamma = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)).double() * 0.01
    gamma[:, 0] += 0.5
    found = ascend(gamma, 1, 40, rate=0.01)
    first = int(found.moved.nonzero()[0])
    assert (found.max_load[:first] == 30).all() and first == 25
    assert found.spread[first] == pytest.approx(2 * 0.01 * 25)


def test_the_last_dual_value_is_the_optimum_of_the_linear_program():
    """200 tokens, 8 experts, against an independent solver of the assignment problem itself."""
    optimize = pytest.importorskip("scipy.optimize")
    gamma, T, E = scores(200, 8, 6), 200, 8
    each_token, each_expert = torch.eye(T).repeat_interleave(E, 1), torch.eye(E).repeat(1, T)
    best = optimize.linprog(
        -gamma.flatten().numpy(),
        A_eq=torch.cat([each_token, each_expert]).numpy(),
        b_eq=[1] * T + [T / E] * E,
        bounds=(0, 1),
    )
    found = ascend(gamma, 1, 2000, "proportional", 1e-2, "sqrt")
    assert -best.fun <= found.dual.min().item() + 1e-6
    assert found.dual[-1].item() == pytest.approx(-best.fun, rel=1e-5)
    assert found.dual[0].item() > -best.fun * 1.02
