"""Controls that change the gate and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET

from sigma_lite.model import Router
from sigma_lite.papers.gates import Small, Whole
from sigma_lite.papers.hash import Hashed


def alike(kind, usual, *tokens):
    torch.manual_seed(0)
    config, x_TD = dataclasses.replace(NET, top_k=1), torch.randn(40, NET.d_model)
    one, other = kind(config), usual(config)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(one.state_dict())
    return one, other, one(x_TD, *tokens), other(x_TD, *tokens)


def test_a_learned_choice_with_the_gate_1():
    one, other, whole, usual = alike(Whole, Router)
    assert torch.equal(whole.ids, usual.ids) and torch.equal(whole.probs, usual.probs)
    assert torch.equal(whole.gates, torch.ones(40, 1))
    weights = torch.randn(40, 1)
    (weights * whole.gates).sum().backward()
    (weights * usual.gates.log()).sum().backward()
    assert torch.allclose(one.weight.grad, other.weight.grad, atol=1e-6) and one.weight.grad.abs().max() > 0


def test_a_hash_with_the_gate_of_an_unsure_router():
    _, _, small, usual = alike(Small, Hashed, torch.arange(40))
    assert torch.equal(small.ids, usual.ids) and torch.equal(small.probs, usual.probs)
    assert small.gates.unique().item() == pytest.approx(1 / NET.n_experts)
