"""Laws of the scale-free LBL: shrinking logits changes nothing, so the shortcut of the LBL is closed."""

import pytest
import torch

from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share
from sigma_lite.balance.scale_free import ScaleFreeLBL, scale_free_load_balancing_loss
from sigma_lite.model import Routing


def shares(logits_TE):
    return load_share(expert_counts(logits_TE.topk(1).indices, logits_TE.shape[1]))


@pytest.mark.parametrize("g", [1e-4, 0.1, 7.0])
def test_logits_cannot_be_shrunk_away(g):
    logits_TE = torch.randn(512, 16) + torch.linspace(0, 2, 16)
    f_E = shares(logits_TE)
    ours, shrunk = (scale_free_load_balancing_loss(x, f_E) for x in (logits_TE, g * logits_TE))
    torch.testing.assert_close(ours, shrunk)
    flat = load_balancing_loss((1e-4 * logits_TE).softmax(-1), logits_TE.topk(1).indices)
    assert abs(flat - 1) < 1e-3 and ours > 1.5  # where the LBL says "balanced"


def test_a_common_shift_of_a_tokens_logits_changes_nothing():
    logits_TE = torch.randn(64, 8)
    f_E = shares(logits_TE)
    shifted = scale_free_load_balancing_loss(logits_TE + 5 * torch.randn(64, 1), f_E)
    torch.testing.assert_close(scale_free_load_balancing_loss(logits_TE, f_E), shifted)


def test_closed_forms():
    E = 8
    sure_TE = 50.0 * torch.eye(E).repeat(4, 1)
    torch.testing.assert_close(scale_free_load_balancing_loss(sure_TE, shares(sure_TE)), torch.tensor(1.0))
    one_TE = 50.0 * torch.eye(E)[torch.zeros(32, dtype=torch.long)]
    torch.testing.assert_close(scale_free_load_balancing_loss(one_TE, shares(one_TE), 0.01), torch.tensor(float(E)))
    none_TE = torch.zeros(32, E)
    torch.testing.assert_close(scale_free_load_balancing_loss(none_TE, shares(none_TE)), torch.tensor(1.0))


def test_at_a_small_temperature_it_is_the_sum_of_squared_loads():
    logits_TE = torch.randn(4096, 16) + torch.linspace(0, 1, 16)
    f_E = shares(logits_TE)
    torch.testing.assert_close(
        scale_free_load_balancing_loss(logits_TE, f_E, 1e-4), 16 * f_E.square().sum(), rtol=1e-3, atol=1e-3
    )


def test_as_a_balancer_it_uses_the_steps_load_share_and_refuses_a_bad_temperature():
    logits_TE, f_E = torch.randn(32, 4), torch.tensor([0.7, 0.1, 0.1, 0.1])
    routing = Routing(logits_TE.softmax(-1), logits_TE.topk(1).indices, logits_TE.topk(1).values, logits_TE)
    expected = scale_free_load_balancing_loss(logits_TE, f_E, 0.2)
    torch.testing.assert_close(ScaleFreeLBL(0.2).loss(routing, f_E), expected)
    with pytest.raises(ValueError, match="greater than 0"):
        scale_free_load_balancing_loss(logits_TE, f_E, 0)


def test_through_the_spread_no_step_asks_for_smaller_logits():
    """The slope along the logits themselves: of a loss that their size does not change it is 0; with the spread held fixed
    uneven logits are asked to shrink, which cannot lower the loss."""
    logits_TE = (torch.randn(512, 16) + torch.linspace(0, 2, 16)).double().requires_grad_()
    f_E, slopes = shares(logits_TE).double(), []
    for through in (True, False):
        loss = scale_free_load_balancing_loss(logits_TE, f_E, 0.3, through)
        slopes.append((logits_TE * torch.autograd.grad(loss, logits_TE)[0]).sum().item())
    assert slopes[0] == pytest.approx(0, abs=1e-6) and slopes[1] > 0.1
    flat_TE = torch.zeros(32, 4, requires_grad=True)
    scale_free_load_balancing_loss(flat_TE, torch.tensor([1.0, 0, 0, 0]), through_spread=True).backward()
    assert flat_TE.grad.isfinite().all()
