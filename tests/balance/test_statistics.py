"""What a balancer counts beside the loads: pooled over micro-batches and ranks as they are, and handed to `next_bias`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import test_bias_in_training as training
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sigma_lite.balance.balancer import Balancer, GlobalLBL, WithBias, counts_of
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import BalanceConfig, ConfigError, ModelConfig
from sigma_lite.model import Routing, Transformer


def routings(T: int = 12, E: int = 5, L: int = 2) -> list[Routing]:
    logits = torch.randn(L, T, E, generator=torch.Generator().manual_seed(0))
    probs, ids = logits.softmax(-1), logits.topk(2).indices
    return [Routing(p, i, p.gather(1, i), z) for p, i, z in zip(probs, ids, logits, strict=True)]


class Sure(Balancer):
    """Counts tokens by how sure their router is, and writes down what it was handed."""

    def statistics(self, routings):
        return torch.stack([torch.histc(r.probs.amax(-1), 4, 0, 1).long() for r in routings])

    def next_bias(self, bias_LE, pooled, step):
        with open("seen.txt", "a") as file:
            file.write(json.dumps(pooled.tolist()) + "\n")


def test_by_default_the_counts_are_handed_over():
    pooled, whole = PooledCounts(), routings()
    for part in (slice(0, 4), slice(4, 12)):
        Objective(Balancer(), 1.0, 0.0, 2)(torch.zeros(()), [Routing(*(t[part] for t in r)) for r in whole], pooled, 1)
    assert pooled.statistics is pooled.counts_LE and torch.equal(pooled.counts_LE, counts_of(whole))


def test_statistics_of_micro_batches_add_up_to_those_of_the_step():
    whole, objective = routings(), Objective(Sure(), 1.0, 0.0, 2)
    one, four = PooledCounts(), PooledCounts()
    objective(torch.zeros(()), whole, one, 1)
    for start in range(0, 12, 3):
        objective(torch.zeros(()), [Routing(*(t[start : start + 3] for t in r)) for r in whole], four, 1)
    assert torch.equal(one.statistics, four.statistics) and one.statistics.sum(1).tolist() == [12, 12]
    assert torch.equal(four.counts_LE, counts_of(whole)), "the load is counted beside it"
    four.reset()
    assert four.statistics is None and four.counts_LE is None


def test_what_a_recomputation_routes_again_is_not_counted_again():
    """Counters that a forward pass moves would say 32 slots for 16 tokens; what it returns says 16."""
    net = ModelConfig(vocab_size=20, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, d_expert=16)
    model, ids, seen, pooled = Transformer(net), torch.arange(16).view(2, 8), [], PooledCounts()
    for block in model.blocks:
        block.moe.router.register_forward_hook(lambda *_: seen.append(1))
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    lm, routed = model.loss(ids, ids)
    Objective(GlobalLBL(), 0.1, 0.0, 2)(lm, routed, pooled, 2).total.backward()
    assert len(seen) == 4, "each router ran twice"
    assert pooled.counts_LE.sum(1).tolist() == [16, 16]


def test_they_are_pooled_over_ranks_and_micro_batches(corpus_and_data, tmp_path, monkeypatch, port):
    """One rank with one micro-batch, one with four, two ranks with two each: the same whole numbers on every rank."""
    seen = {}
    for name, options in {"1x1": {"per_micro": 8}, "1x4": {"per_micro": 2}, "2x2": {"ranks": 2, "per_micro": 2}}.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        training.train(corpus_and_data, tmp_path / name / "out", BalanceConfig(), Sure(), steps=1, **options)
        seen[name] = [json.loads(line) for line in Path("seen.txt").read_text("utf-8").splitlines()]
    assert len(seen["1x1"]) == 1 and sum(seen["1x1"][0][0]) == 8 * 32
    assert seen["1x4"] == seen["1x1"] and seen["2x2"] == seen["1x1"] * 2


def test_an_older_name_is_refused_where_it_is_written():
    with pytest.raises(ConfigError, match=r"Old\.moved_bias would never be called: rename it next_bias\(bias_LE, pooled"):

        class Old(Balancer):
            def moved_bias(self, bias_LE: Tensor, counts_LE: Tensor, step: int) -> Tensor:
                return bias_LE

    with pytest.raises(ConfigError, match="rename it next_bias"):
        type("Below", (WithBias,), {"moved_bias": lambda self, *_: None})

    class Both(Balancer):  # for two versions of this package
        def next_bias(self, bias_LE, pooled, step):
            return bias_LE + 1

        moved_bias = next_bias

    assert Both().next_bias(torch.zeros(1, 2), torch.zeros(1, 2), 0).sum() == 2
