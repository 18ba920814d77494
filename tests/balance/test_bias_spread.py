"""How far apart the loss-free biases can drift, whatever the router does: laws for scores that change at will.

K = 1. m is the expert with the largest bias, L = T / E a fair share. An expert e with a load of L or more has L tokens that
prefer it to m by s_e - s_m >= b_m - b_e. So if b_m - b_e exceeds the largest such gap, the *fair gap*, e has fewer
than L tokens and rises by u, the most that any expert rises: its distance from the top does not grow. Any other grows by 2u
at most. Hence after each sign step

    spread' <= max(spread, fair gap + 2u) < 1 + 2u      for scores in (0, 1), from bias 0.

A proportional step takes up to u (E - 1) from an expert, so there 1 + u E stands for 1 + 2u.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step, spread
from sigma_lite.balance.dual import choose

T, E = 56, 8  # 56 tokens make 8 fair shares, and 7 equal loads above one


def fair_gap(scores_TE: Tensor, bias_E: Tensor) -> Tensor:
    """The largest gap by which a fair share of the tokens prefers one and the same expert to that of the largest bias."""
    T, E = scores_TE.shape
    over_TE = scores_TE - scores_TE[:, bias_E.argmax(), None]
    return over_TE.topk(math.ceil(T / E), dim=0).values[-1].max()


Router = Callable[[Tensor], Tensor]  # bias [E] -> scores [T, E]: a router may answer the bias, as training does


def follow(router: Router, K: int, steps: int, rate: float, rule: str = "sign") -> list[tuple[Tensor, ...]]:
    """(scores, bias before, loads, bias after) of each step; float64, so that rounding hides nothing."""
    bias_E, seen = torch.zeros(E, dtype=torch.float64), []
    for _ in range(steps):
        scores_TE = router(bias_E)
        loads_E = choose(scores_TE, bias_E, K).loads
        seen.append((scores_TE, bias_E, loads_E, bias_E + bias_step(loads_E, rule, rate)))
        bias_E = seen[-1][-1]
    return seen


def restless(seed: int) -> Router:
    """Another router every ten steps: some almost indifferent, some nearly one-hot on few favourites."""
    generator, calls, kept = torch.Generator().manual_seed(seed), 0, torch.zeros(0)

    def router(bias_E: Tensor) -> Tensor:
        nonlocal calls, kept
        if calls % 10 == 0:
            size = 10 ** float(torch.empty(()).uniform_(-1, 1.5, generator=generator))
            kept = size * (torch.randn(T, E, generator=generator) + 2 * torch.randn(E, generator=generator))
        calls += 1
        return kept.double().sigmoid().clamp(1e-9, 1 - 1e-9)

    return router


def contrary(K: int) -> Router:
    """Against the bias, as far as scores in (0, 1) can be: every token prefers the experts with the lowest."""

    def router(bias_E: Tensor) -> Tensor:
        liked = torch.zeros(E, dtype=torch.bool).index_fill(0, bias_E.topk(K, largest=False).indices, True)
        return torch.where(liked, 0.999, 0.001).double().expand(T, E)

    return router


@pytest.mark.parametrize("seed", range(4))
def test_the_spread_grows_only_as_far_as_a_fair_share_of_tokens_holds_out(seed):
    u, grew = 0.01, 0
    for scores_TE, before, _, after in follow(restless(seed), 1, 600, u):
        assert spread(after) <= max(spread(before), fair_gap(scores_TE, before) + 2 * u) + 1e-12
        grew += int(spread(after) > spread(before))
    assert grew > 30, "a spread that never grows would obey anything"


@pytest.mark.parametrize("u", [0.001, 0.01, 0.03])
def test_no_router_drives_the_sign_rule_beyond_1_and_2_rates(u):
    peak = max(spread(after) for *_, after in follow(contrary(1), 1, round(0.6 / u), u)).item()
    assert 0.998 <= peak < 1 + 2 * u, "and this one comes as far as its scores reach"
    assert max(spread(after) for *_, after in follow(restless(0), 1, 300, u)) < 1 + 2 * u


def test_a_proportional_step_overshoots_by_as_much_as_an_expert_is_too_full():
    u = 0.02
    for router in (contrary(1), restless(0)):
        peak = max(spread(after) for *_, after in follow(router, 1, 200, u, "proportional")).item()
        assert peak < 1 + u * E
    assert max(spread(after) for *_, after in follow(contrary(1), 1, 200, u, "proportional")) > 1 + 2 * u


@pytest.mark.parametrize("K", [2, 3])
def test_with_more_experts_a_token_the_bound_holds_around_the_Kth(K):
    """K experts that stand 1 above e leave it nothing; e that stands 1 above all but K - 1 gets every token."""
    u = 0.01
    for router in (contrary(K), contrary(1), restless(1)):
        for *_, after in follow(router, K, 200, u):
            ordered = after.sort(descending=True).values
            assert ordered[K - 1] - ordered[-1] < 1 + 2 * u and ordered[0] - ordered[K] < 1 + 2 * u


def test_no_expert_stays_too_full_beside_idle_ones_for_longer_than_a_rate_allows():
    """Their biases approach by 2u a step, from at most 1 + 2u on one side to as much on the other: 1 / u + 2 steps."""
    u, starved, turn = 0.01, True, torch.arange(T) % (E - 1) + 1

    def stubborn(bias_E: Tensor) -> Tensor:
        """Gives expert 0 nothing until the bias forbids that, and from then on everything."""
        nonlocal starved
        starved = starved and bool(bias_E[0] - bias_E[1] < 0.998)
        liked_T = turn if starved else torch.zeros(T, dtype=torch.int64)
        return torch.full((T, E), 0.001, dtype=torch.float64).scatter(1, liked_T[:, None], 0.999)

    longest, run = 0, 0
    for _, _, loads_E, _ in follow(stubborn, 1, 200, u):
        run = run + 1 if loads_E[0] == T else 0
        longest = max(longest, run)
    assert 1 / u - 2 <= longest <= 1 / u + 2
