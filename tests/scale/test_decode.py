"""What decoding reads: the golden values of N(t), the active parameters of Sigma-MoE-Tiny, and when a draft pays."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.runfile import load_run
from sigma_lite.scale.decode import (
    distinct_experts,
    reads,
    share_to_accept,
    speculative_gain,
    tokens_of_a_round,
    tokens_per_second,
)

SIGMA = load_run([Path(__file__).parents[2] / "scaled_configs" / "sigma_moe_tiny.yaml"]).net


def test_golden_values():
    """1 of 96: 1 token touches 1 expert, 32 touch 27.3, 96 60.9 and 300 91.9."""
    assert [round(distinct_experts(96, 1, t), 1) for t in (1, 32, 96, 300)] == [1, 27.3, 60.9, 91.9]
    assert distinct_experts(8, 8, 1) == 8 and distinct_experts(96, 1, 0) == 0


def test_tokens_of_a_touched_expert():
    """t K / N(t) = rho t / (1 - (1 - rho)^t): at 1 of 96, 64 tokens give a touched expert 1.4, 960 give it 10."""
    for K, E in ((1, 96), (8, 96), (2, 8)):
        for t in (1, 7, 64, 960):
            rho = K / E
            assert t * K / distinct_experts(E, K, t) == pytest.approx(rho * t / (1 - (1 - rho) ** t))
    assert [round(t / distinct_experts(96, 1, t), 1) for t in (64, 960)] == [1.4, 10.0]


def test_chance_touches_as_many():
    generator = torch.Generator().manual_seed(0)
    for t in (4, 32, 200):
        found = [len(torch.randint(96, (t,), generator=generator).unique()) for _ in range(400)]
        assert sum(found) / 400 == pytest.approx(distinct_experts(96, 1, t), rel=0.02)


def test_one_token_of_sigma_reads_its_active_parameters_and_the_head():
    one = reads(SIGMA)
    assert (one.all - SIGMA.vocab_size * SIGMA.d_model) / 1e6 == pytest.approx(536.9, abs=0.1)
    assert one.experts == pytest.approx(56 * 3 * 1536 * 768)
    every = reads(SIGMA, 10**6)
    assert every.experts == pytest.approx(SIGMA.ledger().experts)
    dense = dataclasses.replace(SIGMA, n_experts=1)
    assert reads(dense, 1) == reads(dense, 64)


def test_the_roofline():
    """At 2 bytes and 1 GB/s a token takes its reads; with half of the experts over a slow link, the link decides."""
    one = reads(SIGMA)
    assert tokens_per_second(SIGMA, 1) == pytest.approx(1e9 / (2 * one.all))
    away = {"hit_rate": 0.5, "link_gbps": 0.01}
    assert tokens_per_second(SIGMA, 1, **away) == pytest.approx(0.01e9 / one.experts)
    assert tokens_per_second(SIGMA, 1, **away, hidden=False) == pytest.approx(1 / (2 * one.all / 1e9 + one.experts / 0.01e9))
    batches = [tokens_per_second(SIGMA, 1, batch=b) / tokens_per_second(SIGMA, 1) for b in (1, 8, 32)]
    dense = dataclasses.replace(SIGMA, n_experts=1)
    assert batches[2] < 6 < 31.9 < tokens_per_second(dense, 1, batch=32) / tokens_per_second(dense, 1), "few share an expert"
    with pytest.raises(ConfigError, match="give link_gbps"):
        tokens_per_second(SIGMA, 1, hit_rate=0.5)


def test_when_a_draft_pays():
    """Exactly where the accepted share of drafted tokens exceeds what `share_to_accept` says."""
    assert tokens_of_a_round(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2) and tokens_of_a_round(1, 4) == 5
    for drafted in (1, 4, 8):
        for acceptance in (0.1, 0.3, 0.5, 0.7, 0.9):
            for draft in (0.0, 0.05 * reads(SIGMA).all):
                accepted = (tokens_of_a_round(acceptance, drafted) - 1) / drafted
                pays = speculative_gain(SIGMA, acceptance, drafted, draft) > 1
                assert pays == (accepted > share_to_accept(SIGMA, drafted, draft))


def test_at_one_of_96_experts_take_most_of_the_gain():
    """The same acceptance brings a dense model of the same reads twice as much; where experts are all, nothing."""
    one = reads(SIGMA)
    assert share_to_accept(SIGMA, 1) == pytest.approx(one.experts / one.all, rel=0.011)
    dense = dataclasses.replace(SIGMA, n_experts=1)
    assert speculative_gain(dense, 0.8, 4) == pytest.approx(tokens_of_a_round(0.8, 4))
    assert 1.3 < speculative_gain(SIGMA, 0.8, 4) < 0.55 * speculative_gain(dense, 0.8, 4)
    only_experts = ModelConfig(
        vocab_size=2, n_layers=8, d_model=64, n_heads=1, n_kv_heads=1, head_dim=2, n_experts=96, d_expert=4096
    )
    assert speculative_gain(only_experts, 0.9, 4) < 1 and share_to_accept(only_experts, 4) > 0.94
