"""A shared expert works for every token, with gate 1, however many routed ones a token has."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from samples import NET

from sigma_lite.config import ConfigError
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.choice import ExpertChoice
from sigma_lite.papers.latency import Mixed
from sigma_lite.papers.shared import WithShared


@pytest.mark.parametrize("router", [Parts().router, ExpertChoice])
def test_it_is_added_once_per_token(router):
    torch.manual_seed(0)
    moe = Transformer(NET, Parts(router=router, experts=functools.partial(WithShared, shared=2))).blocks[0].moe
    x = torch.randn(1, 12, 16)
    y, routing = moe(x)
    gate, up = (x[0] @ moe.experts.shared.w13[0].T).chunk(2, -1)
    network = (F.silu(gate) * up) @ moe.experts.shared.w2[0].T
    torch.testing.assert_close(y[0], network + moe.dispatch(x[0], routing, moe.experts.routed))
    assert moe.experts.shared.w2.shape == (1, 16, 16), "two experts of width 8 in one"


def test_both_begin_as_experts_do():
    torch.manual_seed(0)
    plain = Transformer(NET).blocks[1].moe.experts
    torch.manual_seed(0)
    experts = Transformer(NET, Parts(experts=WithShared)).blocks[1].moe.experts
    for name in ("w13", "w2"):
        assert getattr(experts.routed, name).std().item() == pytest.approx(getattr(plain, name).std().item(), rel=0.1)
        assert getattr(experts.shared, name).std().item() == pytest.approx(getattr(plain, name).std().item(), rel=0.2)
    with pytest.raises(ConfigError, match="shared=0"):
        WithShared(NET, shared=0)


@pytest.mark.parametrize("experts", [WithShared, Mixed])
def test_gates_that_are_divided_by_their_sum_are_the_routers_business(experts):
    Transformer(dataclasses.replace(NET, renormalise=True), Parts(experts=experts))
