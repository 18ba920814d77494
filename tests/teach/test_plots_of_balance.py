"""Figures of chapters 8, 9 and 11: what is drawn is what the package computes."""

from __future__ import annotations

import pytest
import torch

from sigma_lite.balance.losses import top1_load_balancing_loss
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.teach import plots_bias, plots_loss, plots_schedule


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_shares_are_in_fair_shares_and_the_title_tells_the_loss(tau):
    logits_TE = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    ids_TK = logits_TE.topk(1).indices
    figure = plots_loss.temperature(tau, logits_TE, ids_TK)
    bars, dots = trace(figure, "share f, counted"), trace(figure, "fhat, has a gradient")
    assert sum(bars.y) == pytest.approx(8, abs=1e-3) and sum(dots.y) == pytest.approx(8, abs=1e-3)
    assert list(bars.y) == sorted(bars.y, reverse=True)
    busiest = bars.customdata[0]
    assert bars.y[0] == pytest.approx(8 * (ids_TK == busiest).float().mean().item(), abs=1e-3)
    assert dots.y[0] == pytest.approx(8 * (logits_TE / tau).softmax(-1)[:, busiest].mean().item(), abs=1e-3)
    assert f"loss {top1_load_balancing_loss(logits_TE, ids_TK, tau):.2f}" in figure.layout.title.text


def test_at_a_low_temperature_the_soft_share_is_the_counted_one():
    logits_TE = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    figure = plots_loss.temperature(1e-4, logits_TE, logits_TE.topk(1).indices)
    assert trace(figure, "fhat, has a gradient").y == pytest.approx(trace(figure, "share f, counted").y, abs=0.05)


def test_the_race_ends_with_even_loads():
    logits_TE = torch.randn(240, 12, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 12)
    first, later = (list(trace(plots_bias.race(n, 0.005, 1.0, logits_TE), "load").y) for n in (0, 200))
    assert first == torch.bincount(logits_TE.argmax(-1), minlength=12).tolist()
    assert sum(later) == 240 and max(later) < max(first) / 2 and min(later) > 10


def test_the_race_lifts_the_whole_range_of_an_expert_by_its_bias():
    logits_TE = torch.randn(240, 12, generator=torch.Generator().manual_seed(0))
    before, after = (trace(plots_bias.race(n, 0.01, 1.0, logits_TE), "score + bias") for n in (0, 1))
    moved = [round(b - a, 3) for a, b in zip(before.y, after.y, strict=True)]
    counts_E = torch.bincount(logits_TE.argmax(-1), minlength=12)
    assert moved == [round(0.01 * sign, 3) for sign in (20 - counts_E).sign().tolist()]
    assert before.error_y.array == pytest.approx(after.error_y.array, abs=1e-3)


def test_active_parameters_and_the_extra_work():
    net = ModelConfig.preset("sigma_moe_tiny")
    figure = plots_schedule.active(0.5, "8 8 6 6 4 4 2 2")
    early, late = trace(figure, "this schedule").y[0], trace(figure, "this schedule").y[-1]
    assert (round(early, 3), round(late, 3)) == (0.650, 0.537)
    assert late == net.ledger().active / 1e9
    assert f"{0.5 * (early / late - 1):+.1%} work" in figure.layout.title.text
    assert "+0.0% work" in plots_schedule.active(0.0, "8 8").layout.title.text


def test_a_head_beyond_the_experts_is_refused():
    with pytest.raises(ConfigError, match="1..n_experts=96"):
        plots_schedule.active(0.5, "97")
