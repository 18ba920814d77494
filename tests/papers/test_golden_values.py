"""Numbers that papers print, where no other test says them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.bias import bias_step
from sigma_lite.balance.schedule import SIGMA_HEAD
from sigma_lite.config import ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.papers import eplb
from sigma_lite.papers.adamoe import NullRouter
from sigma_lite.papers.dense2moe import TaylorSplit
from sigma_lite.papers.shinka import LISTING, PRINTED


def test_sigma_moe_tiny():
    net = ModelConfig.preset("sigma_moe_tiny")
    assert net.ledger().experts == 56 * 96 * 3_538_944 and sum(SIGMA_HEAD) == 40
    counts, before = net.ledger(), net.ledger((*SIGMA_HEAD, *(1,) * 48))
    assert [round(n / 1e6, 1) for n in (counts.active, before.active)] == [536.9, 650.2]
    assert round(counts.non_embedding / 1e9, 3) == 19.364


def test_a_bias_needs_500_steps_to_decide_a_pair_alone():
    """1 / (2 u) at u = 1e-3: the earliest step at which two biases differ by 1, which is all that scores can differ by."""
    bias_E, counts_E, steps = torch.zeros(2), torch.tensor([[3, 1]]), 0
    while bias_E.max() - bias_E.min() < 1 - 1e-4:
        bias_E, steps = bias_E + bias_step(counts_E, "sign", 1e-3)[0], steps + 1
    assert steps == 500


def test_adamoe_uses_one_and_a_half_true_experts():
    """k n / (n + m) at n = 8, m = 8, k = 3."""
    routing = routed(NullRouter(dataclasses.replace(NET, top_k=3), nulls=8), T=20000)
    assert (routing.ids >= 0).sum(1).float().mean().item() == pytest.approx(1.5, rel=0.2)


def test_shinka_s_thresholds_at_96_experts():
    assert [x / 96 for x in (PRINTED, LISTING)] == pytest.approx([0.000667, 0.00667], rel=1e-3)


def test_dense2moe_leaves_one_and_a_half_of_four():
    """Expansion 4 becomes 1 shared and 12 of a quarter, of which 2 work: 62.5 % fewer weights for each token."""
    dense = Transformer(dataclasses.replace(NET, n_experts=1, top_k=1, d_expert=64))
    split = TaylorSplit(by="magnitude")(dense, [])
    experts, (D, F) = split.blocks[0].moe.experts, (NET.d_model, 64)
    numbers = lambda module: sum(w.numel() for w in module.parameters())  # noqa: E731
    active = numbers(experts.shared) + split.config.top_k * numbers(experts.routed) / split.config.n_experts
    assert active / (3 * D * F) == 1.5 / 4 and numbers(experts) == 3 * D * F


def test_the_snake():
    """Sorted loads go to GPUs 0, 1, 2, 2, 1, 0."""
    placed = eplb.deal(np.arange(6)[None], np.array([[6.0, 5, 4, 3, 2, 1]]), 3)[0]
    assert placed.reshape(3, 2).tolist() == [[0, 5], [1, 4], [2, 3]]
