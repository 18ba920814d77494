"""SimBal: orthonormal rows where there is room for them, and the bound where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET, routed

from sigma_lite.config import ConfigError
from sigma_lite.model import Router
from sigma_lite.papers.simbal import SimBal, WithRows, row_similarity


def minimised(E: int, D: int) -> float:
    rows = torch.randn(E, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / D**0.5
    rows.requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1e-3, total_iters=800)
    for _ in range(800):
        optimizer.zero_grad()
        row_similarity(rows).backward()
        optimizer.step()
        schedule.step()
    return row_similarity(rows.detach()).item()


def test_closed_forms():
    assert row_similarity(torch.eye(4, 9)).item() == 0 and row_similarity(torch.zeros(4, 9)).item() == 1
    assert row_similarity(torch.ones(2, 1)).item() == 1, "two equal unit rows: each off-diagonal entry is 1"


def test_it_reaches_orthonormal_rows_only_where_there_is_room():
    """E <= D: nearly 0. E = 96 and D = 64, as in the lab: never below sqrt(E - D) / E = 0.059, nor near it."""
    crowded = minimised(96, 64)
    assert minimised(32, 64) < 0.02 and crowded > 0.25 > (96 - 64) ** 0.5 / 96


def test_orthonormal_rows_do_not_balance():
    """All tokens may lie nearest to one of the directions."""
    router = WithRows(dataclasses.replace(NET, top_k=1))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8, 16))
    routing = router(torch.eye(8, 16)[:1].repeat(50, 1))
    assert SimBal().loss(routing, torch.eye(8)[0]).item() == 0 and (routing.ids == 0).all()


def test_its_gradient_reaches_the_router_and_the_usual_router_is_refused():
    routing = routed(WithRows(NET))
    (gradient,) = torch.autograd.grad(SimBal().loss(routing, torch.full((8,), 1 / 8)), routing.rows_ED)
    assert gradient.any() and torch.equal(routed(Router(NET)).ids, routing.ids)
    with pytest.raises(ConfigError, match="sigma_lite.papers.simbal.WithRows"):
        SimBal().loss(routed(Router(NET)), torch.full((8,), 1 / 8))
