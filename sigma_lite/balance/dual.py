"""Loss-free balance as dual ascent on an assignment problem (Han & Zhong, 2512.03915): why the bias rule works.

Fixed scores gamma_TE, K experts for each of T tokens, and the same number L = T * K / E of tokens for each expert:

    maximise sum_te gamma_te x_te   where   sum_e x_te = K for each token,   sum_t x_te = L for each expert,   0 <= x <= 1.

Put a price p_e on a place in expert e (our sign: it is added to the score, so it is the bias, and a high p attracts). Each
token then chooses by itself, top-K of gamma + p, and what is left of the problem is its dual

    g(p) = sum_t (sum of the K largest gamma_te + p_e) - L sum_e p_e    >= the best assignment's value, for every p.

g is a maximum of linear functions of p: convex, piecewise linear, the same for p + constant, with subgradient A(p) - L,
where A_e counts the tokens that chose e. Stepping against it, p_e += eps_e (L - A_e), is the bias rule of
2408.15664 (`balance.bias`): eps_e = u / |L - A_e| gives "sign", eps_e = u / L gives "proportional".

With D = p' - p, the move of the price, and A', the loads after it, three things follow.

Decrease.    Convexity at p and at p' gives <A - L, D> <= g(p') - g(p) <= <A' - L, D>. So g falls for certain when
             <A' - L, D> <= 0: the new loads have not, on balance, crossed to the other side of L.
Preference.  A token leaves k for k' only if gamma_k + p_k >= gamma_k' + p_k' before and <= after. Subtract:
             0 <= (its margin before) <= D_k' - D_k. No token moves to an expert whose price rose less.
Balance.     If 2u is below the gap between any two margins of the same pair of experts, at most one token moves per ordered
             pair and step: a load changes by at most E - 1 a step, and sign steps end within E - 1 of L (K = 1).

In training gamma moves too, so none of this is promised there: the laboratory shows where it breaks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step, rate_at, spread


class Choice(NamedTuple):
    """What T tokens do at one price."""

    chosen: Tensor  # [T, E] bool, K true in each row
    loads: Tensor  # [E] int64, A(p): the column sums
    dual: float  # g(p), in units of the score


def choose(gamma_TE: Tensor, price_E: Tensor, K: int) -> Choice:
    """Every token takes the K experts with the largest gamma + price; g(p) is a sum over the same K values.

    Args:
        gamma_TE: fixed scores, [T, E]; float64 where g is to be compared between steps.
        price_E: the bias, [E].
        K: experts per token, 1..E.
    """
    T, E = gamma_TE.shape
    best_TK = (gamma_TE + price_E).topk(K)
    chosen_TE = torch.zeros(T, E, dtype=torch.bool, device=gamma_TE.device).scatter_(1, best_TK.indices, True)
    dual = best_TK.values.sum() - T * K / E * price_E.sum()
    return Choice(chosen_TE, chosen_TE.sum(0), dual.item())


class Ascent(NamedTuple):
    """N + 1 prices and what they brought: entry 0 is price 0, entry n the n-th step."""

    price: Tensor  # [E], the last one
    loads: Tensor  # [N + 1, E] int64
    dual: Tensor  # [N + 1] g(p), float64; never below the value of the best balanced assignment
    spread: Tensor  # [N + 1] max - min of the price
    moved: Tensor  # [N + 1] int64, places (token, expert) given up since the entry before; entry 0 is 0

    @property
    def max_load(self) -> Tensor:
        """[N + 1], tokens of the fullest expert: L at balance, T when all collapse on one."""
        return self.loads.amax(1)

    @property
    def imbalance(self) -> Tensor:
        """[N + 1], max over experts of |A_e - L|, in tokens: 0 at balance."""
        return (self.loads - self.loads[0].sum() / self.loads.shape[1]).abs().amax(1)


def ascend(gamma_TE: Tensor, K: int, steps: int, rule: str = "sign", rate: float = 1e-3, decay: str = "none") -> Ascent:
    """Loss-free balancing of fixed scores, from price 0.

    Args:
        gamma_TE: scores, [T, E].
        K: experts per token.
        steps: N, price updates.
        rule, rate: see `bias.bias_step`.
        decay: "none" or "sqrt"; see `bias.rate_at`.
    """
    price_E = gamma_TE.new_zeros(gamma_TE.shape[1])
    now = choose(gamma_TE, price_E, K)
    loads, dual, spreads, moved = [now.loads], [now.dual], [0.0], [0]
    for step in range(steps):
        price_E = price_E + bias_step(now.loads, rule, rate_at(step, rate, decay))
        before, now = now, choose(gamma_TE, price_E, K)
        loads.append(now.loads)
        dual.append(now.dual)
        spreads.append(spread(price_E).item())
        moved.append(int((before.chosen & ~now.chosen).sum()))
    curves = torch.tensor(dual, dtype=torch.float64), torch.tensor(spreads, dtype=torch.float64), torch.tensor(moved)
    return Ascent(price_E, torch.stack(loads), *curves)


def cycle_length(loads_NE: Tensor) -> int | None:
    """Steps after which sign updates with a constant rate repeat for ever; None if the record shows no repetition.

    Such a price is u times whole numbers, the sum of the signs so far, and what follows depends only on differences of
    the price. So a price seen before, up to a constant, is a proof. 1: balanced, or all experts move alike.

    Args:
        loads_NE: `Ascent.loads` of rule "sign" without decay, [N + 1, E].
    """
    total = loads_NE[0].sum()
    signs_NE = (total - loads_NE.shape[1] * loads_NE[:-1]).sign()
    ticks_NE = torch.cat((torch.zeros_like(signs_NE[:1]), signs_NE)).cumsum(0)  # whole numbers: no rounding
    ticks_NE = ticks_NE - ticks_NE[:, :1]
    again_N = (ticks_NE[:-1] == ticks_NE[-1]).all(1).nonzero()
    return len(ticks_NE) - 1 - int(again_N[-1]) if len(again_N) else None
