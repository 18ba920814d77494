"""LatentMoE: the formula, its size, and the gate that its norm cancels at K = 1."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from samples import NET

from sigma_lite.config import ConfigError
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.latent import Latent

KEPT = functools.partial(Latent, keep_scale=True)


def test_the_formula():
    torch.manual_seed(0)
    moe = Transformer(NET, Parts(experts=Latent)).blocks[0].moe
    x = torch.randn(1, 12, 16)
    y, routing = moe(x)
    u = moe.dispatch(x[0] @ moe.experts.down.weight.T, routing, moe.experts.inner)
    expected = u / (u.square().mean(-1, keepdim=True) + NET.norm_eps).sqrt() @ moe.experts.up.weight.T
    torch.testing.assert_close(y[0], expected, atol=1e-5, rtol=1e-4)
    assert moe.experts.inner.w13.shape == (8, 16, 8) and routing.logits.shape == (12, 8), (
        "half as wide; routed by the full x"
    )


def router_gradient(experts, top_k: int) -> float:
    torch.manual_seed(0)
    net = dataclasses.replace(NET, top_k=2, norm_eps=1e-12)
    model, ids = Transformer(net, Parts(experts=experts)), torch.arange(20).view(2, 10)
    for block in model.blocks:
        block.moe.router.set_k(top_k)  # past the experts, which refuse one
    model.loss(ids, ids)[0].backward()
    return model.blocks[0].moe.router.weight.grad.norm().item()


def test_the_norm_cancels_a_single_gate():
    """Why keep_scale=False is refused at K = 1: the router has a millionth of the gradient that it has with keep_scale."""
    assert router_gradient(Latent, top_k=1) < 1e-5 * router_gradient(KEPT, top_k=1)
    assert router_gradient(Latent, top_k=2) > 1e-2 * router_gradient(KEPT, top_k=2)


def test_refusals():
    with pytest.raises(ConfigError, match="set keep_scale: true"):
        Latent(dataclasses.replace(NET, top_k=1))
    with pytest.raises(ConfigError, match="width=17"):
        Latent(NET, width=17)
