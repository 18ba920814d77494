"""Closed forms of the balancing losses, and where their gradients do and do not flow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_lite.balance.losses import (
    expert_counts,
    load_balancing_loss,
    load_share,
    sequence_load_balancing_loss,
    top1_load_balancing_loss,
    z_loss,
)

SURE = 1e4  # a logit so large that softmax is one-hot


def one_hot_logits(ids_T: torch.Tensor, E: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(ids_T, E).float() * SURE


@pytest.mark.parametrize("E", [2, 8, 96])
@pytest.mark.parametrize("K", [1, 2])
def test_balanced_is_one(E, K):
    ids = (torch.arange(4 * E)[:, None] + torch.arange(K)) % E
    probs = one_hot_logits(ids[:, 0], E).softmax(-1)
    assert load_balancing_loss(probs, ids).item() == pytest.approx(1)


@pytest.mark.parametrize("E", [8, 96])
def test_flat_probabilities_score_one_whatever_the_loads_are(E):
    """The blind spot: with P uniform the loss is at its minimum, and every token goes to expert 0."""
    probs, ids = torch.full((50, E), 1 / E), torch.zeros(50, 1, dtype=torch.int64)
    assert load_balancing_loss(probs, ids).item() == pytest.approx(1)
    random_ids = torch.randint(0, E, (50, 1))
    assert load_balancing_loss(probs, random_ids).item() == pytest.approx(1)


@pytest.mark.parametrize("E", [8, 96])
def test_collapsed_is_the_number_of_experts(E):
    ids = torch.zeros(50, 1, dtype=torch.int64)
    assert load_balancing_loss(one_hot_logits(ids[:, 0], E).softmax(-1), ids).item() == pytest.approx(E)


def test_shrinking_logits_lowers_the_loss_and_moves_no_token():
    logits = torch.randn(500, 16) + torch.linspace(0, 3, 16)
    full, shrunk = (load_balancing_loss((g * logits).softmax(-1), logits.topk(1).indices) for g in (1.0, 0.01))
    assert full > 1.5 and shrunk.item() == pytest.approx(1, abs=0.02)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(1, 3), st.integers(0, 1000))
def test_gradient_is_E_f_over_T_and_none_through_f(T, E, K, seed):
    torch.manual_seed(seed)
    K = min(K, E)
    probs = torch.randn(T, E).softmax(-1).requires_grad_()
    ids = probs.topk(K).indices
    (gradient,) = torch.autograd.grad(load_balancing_loss(probs, ids), probs)
    f = torch.bincount(ids.flatten(), minlength=E) / (T * K)
    torch.testing.assert_close(gradient, (E * f / T).expand(T, E))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(1, 3), st.integers(0, 1000))
def test_loss_equals_the_sum_written_out(T, E, K, seed):
    torch.manual_seed(seed)
    K = min(K, E)
    probs = torch.randn(T, E).softmax(-1)
    ids = probs.topk(K).indices
    written_out = 0.0
    for e in range(E):
        f = sum(e in row for row in ids.tolist()) / (T * K)
        P = sum(row[e] for row in probs.tolist()) / T
        written_out += E * f * P
    assert load_balancing_loss(probs, ids).item() == pytest.approx(written_out, rel=1e-5)


@pytest.mark.parametrize("E", [8, 96])
def test_top1_loss_closes_the_blind_spot(E):
    spread = torch.arange(4 * E) % E
    collapsed = torch.zeros(4 * E, dtype=torch.int64)
    balanced = top1_load_balancing_loss(one_hot_logits(spread, E), spread[:, None])
    flat = top1_load_balancing_loss(torch.zeros(4 * E, E), spread[:, None])
    collapse = top1_load_balancing_loss(one_hot_logits(collapsed, E), collapsed[:, None])
    assert (balanced.item(), flat.item(), collapse.item()) == pytest.approx((1, E, E), rel=1e-5)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_top1_loss_of_several_choices(K):
    """All probability on the chosen and balanced costs 1, and never less; one sure expert among K chosen costs E."""
    E = 8
    ids = (torch.arange(E)[:, None] + torch.arange(K)) % E
    sure = torch.full((E, E), -1e4).scatter(1, ids, 0.0)  # 1 / K for each of its own
    one = one_hot_logits(torch.zeros(E, dtype=torch.int64), E)
    assert top1_load_balancing_loss(torch.zeros(E, E), ids).item() == pytest.approx(E / K)
    assert top1_load_balancing_loss(sure, ids).item() == pytest.approx(1)
    assert top1_load_balancing_loss(one, torch.arange(K).expand(E, K)).item() == pytest.approx(E)
    for seed in range(20):
        logits = torch.randn(64, E, generator=torch.Generator().manual_seed(seed)) * 3
        assert top1_load_balancing_loss(logits, logits.topk(K).indices).item() >= 1 - 1e-6


def test_top1_loss_sees_loads_where_lbl_is_blind():
    """Nearly flat logits, all for expert 0: LBL is content, Top-1 LBL pulls the winner's logit."""
    logits = (torch.tensor([0.01] + [0.0] * 15)).expand(64, 16).clone().requires_grad_()
    ids = torch.zeros(64, 1, dtype=torch.int64)
    assert load_balancing_loss(logits.softmax(-1), ids).item() == pytest.approx(1, abs=0.02)
    assert top1_load_balancing_loss(logits, ids).item() > 15


def test_low_temperature_approaches_counting():
    logits = torch.randn(2000, 8)
    ids = logits.topk(1).indices
    f = load_share(expert_counts(ids, 8))
    assert top1_load_balancing_loss(logits, ids, 1e-3).item() == pytest.approx(8 * f.square().sum().item(), rel=0.01)
    with pytest.raises(ValueError, match="temperature=0"):
        top1_load_balancing_loss(logits, ids, 0)


def test_z_loss_of_flat_logits():
    assert z_loss(torch.zeros(7, 96)).item() == pytest.approx(math.log(96) ** 2)
    assert z_loss(torch.zeros(7, 96) + 3).item() == pytest.approx((3 + math.log(96)) ** 2)


def test_no_tokens_is_zero_not_nan():
    probs, ids = torch.zeros(0, 8), torch.zeros(0, 1, dtype=torch.int64)
    assert load_balancing_loss(probs, ids) == top1_load_balancing_loss(probs, ids) == z_loss(probs) == 0


def test_mean_over_ranks_with_shared_f_is_the_pooled_loss():
    """Global-batch LBL: mean over parts of E * sum f_global P_part = E * sum f_global P_global."""
    torch.manual_seed(0)
    probs = torch.randn(4, 30, 8).softmax(-1)
    ids = probs.topk(2).indices
    f = load_share(expert_counts(ids, 8))
    parts = torch.stack([load_balancing_loss(p, i, f) for p, i in zip(probs, ids, strict=True)])
    torch.testing.assert_close(parts.mean(), load_balancing_loss(probs.flatten(0, 1), ids.flatten(0, 1)))


# ------------------------------------------------------------------------------------------------------ row by row


@pytest.mark.parametrize("E", [8, 96])
def test_rows_that_balance_only_together_do_not_balance(E):
    """Row b sure of expert b: the pooled loss sees perfect balance, the loss of each row sees collapse."""
    together = torch.arange(E).repeat_interleave(10)
    apart = torch.arange(E).repeat(10)
    for ids, expected in ((together, E), (apart, 1)):
        probs = one_hot_logits(ids, E).softmax(-1)
        assert sequence_load_balancing_loss(probs, ids[:, None], n_rows=E if ids is together else 10) == pytest.approx(
            expected
        )
        assert load_balancing_loss(probs, ids[:, None]).item() == pytest.approx(1)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(2, 12), st.integers(1, 3), st.integers(0, 1000))
def test_row_by_row_is_the_mean_over_rows_and_so_is_its_gradient(B, S, E, K, seed):
    torch.manual_seed(seed)
    probs = torch.randn(B * S, E).softmax(-1).requires_grad_()
    ids = probs.topk(min(K, E)).indices
    loss = sequence_load_balancing_loss(probs, ids, B)
    rows = [load_balancing_loss(p, i) for p, i in zip(probs.split(S), ids.split(S), strict=True)]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    f_BE = torch.stack([torch.bincount(i.flatten(), minlength=E) / i.numel() for i in ids.split(S)])
    (gradient,) = torch.autograd.grad(loss, probs)
    torch.testing.assert_close(gradient, (E * f_BE / (B * S)).repeat_interleave(S, 0))


def test_rows_of_unequal_length_are_refused():
    probs, ids = torch.full((10, 4), 0.25), torch.zeros(10, 1, dtype=torch.int64)
    assert sequence_load_balancing_loss(probs, ids, 1) == load_balancing_loss(probs, ids)
    for n_rows in (0, 3):
        with pytest.raises(ValueError, match=f"n_rows={n_rows}"):
            sequence_load_balancing_loss(probs, ids, n_rows)
