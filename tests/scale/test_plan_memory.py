"""The planner's memory against what training really allocates on a CPU; benchmarks/plan_memory.py does it at full size."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from sigma_lite.balance.objective import objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ModelConfig, RowsConfig, SparsityConfig
from sigma_lite.kernels.cpu.binding import lanes
from sigma_lite.kernels.cpu.op import trial
from sigma_lite.model import Transformer, documents
from sigma_lite.runfile import RunConfig
from sigma_lite.scale import activations
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.layout import Layout
from sigma_lite.scale.measure import kept_for_backward, largest
from sigma_lite.scale.memory import memory, peak
from sigma_lite.train.optim import adamw

NET = {"vocab_size": 512, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "n_experts": 16, "d_expert": 48}
RUNS = {
    "K = 1": RunConfig(ModelConfig(n_layers=3, **NET), rows=RowsConfig(64, 8, 8)),
    "K = 8 in the low layers": RunConfig(
        ModelConfig(n_layers=4, **NET), SparsityConfig((8, 8, 4, 2), 9), rows=RowsConfig(64, 8, 8)
    ),
    "two micro-batches": RunConfig(ModelConfig(n_layers=2, top_k=4, **NET), rows=RowsConfig(64, 8, 4)),
    "large vocabulary": RunConfig(ModelConfig(n_layers=1, **NET | {"vocab_size": 8192}), rows=RowsConfig(64, 8, 8)),
    "long rows": RunConfig(ModelConfig(n_layers=2, **NET), rows=RowsConfig(512, 2, 2)),
    "rows cut into blocks": RunConfig(ModelConfig(n_layers=2, attention="blocks", **NET), rows=RowsConfig(512, 2, 2)),
    "no attention below": RunConfig(ModelConfig(n_layers=2, attention_from_layer=1, **NET), rows=RowsConfig(64, 8, 8)),
    "sigmoid router": RunConfig(ModelConfig(n_layers=2, router_score="sigmoid", **NET), rows=RowsConfig(64, 8, 8)),
}


@pytest.mark.skipif(bool(trial()), reason="the plan assumes the compiled kernel")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", RUNS)
def test_planned_memory_is_what_training_allocates(name, precision, monkeypatch):
    monkeypatch.setattr(activations, "LANES", lanes())
    run = replace(RUNS[name], trainer={"precision": precision})
    k = (*run.sparsity.head, *(run.net.top_k,) * (run.net.n_layers - len(run.sparsity.head)))
    items = memory(run, Layout(per_micro=run.rows.per_micro), load_cluster("cpu-core"), k)
    gc.collect()
    found = largest(lambda: _train(run, k))
    assert peak(items) == pytest.approx(found, rel=0.1)

    model, batch = _model(run, k), _batch(run)
    kept = kept_for_backward(lambda: _loss(run, model, *batch), [*model.state_dict().values(), *batch])
    ours = precision == "bf16-mixed"  # torch's own chunked loss keeps its gradients where this does not see them
    assert items["activations"] + ours * items["loss"] == pytest.approx(kept, rel=0.02)


def test_the_planner_knows_the_size_of_a_piece():
    assert activations.PIECE == documents.PIECE


def test_each_choice_adds_its_rows_and_pre_activations():
    """Law: on a CPU one more expert per token keeps 2F numbers and a few indices for each token, and where the kernel is not
    ours also D numbers: the token's row once more."""
    cpu, tokens = load_cluster("cpu-core"), 8 * 64
    for width, numbers, indices in ((48, 2 * 48, 8 + 2 * 4), (40, 64 + 2 * 40, 3 * 8 + 4)):
        run = RunConfig(ModelConfig(n_layers=3, **NET | {"d_expert": width}), rows=RowsConfig(64, 8, 8))
        one, two = (memory(run, Layout(per_micro=8), cpu, (k,) * 3)["activations"] for k in (1, 2))
        assert (two - one) / 3 / tokens == pytest.approx(4 * numbers + indices, abs=1)


def _model(run: RunConfig, k: tuple[int, ...]) -> Transformer:
    model = Transformer(run.net)
    model.set_k(k)
    return model


def _batch(run: RunConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (run.rows.per_micro, run.rows.length)
    ids = torch.randint(run.net.vocab_size, shape)
    documents_BS = (torch.rand(shape) < 0.05).cumsum(1)
    if run.net.attention == "blocks":  # the most tables that there can be: documents that fill pieces without a rest
        documents_BS = (torch.arange(shape[1]) // 32).expand(shape).contiguous()
    return ids, ids.roll(-1, 1).contiguous(), documents_BS


def _loss(run: RunConfig, model: Transformer, ids: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor) -> tuple:
    """As SigmaLit's training step: the routings live until it ends."""
    with torch.autocast("cpu", torch.bfloat16, enabled=run.trainer["precision"] == "bf16-mixed"):
        lm, routings = model.loss(ids, targets, documents_BS=documents)
        return objective(run.balance, run.net.n_layers)(lm, routings, PooledCounts(), len(ids)).total, routings


def _train(run: RunConfig, k: tuple[int, ...]) -> None:
    """Two optimizer steps in Lightning's order: gradients are cleared between the first forward and backward pass."""
    model = _model(run, k)
    optimizer = adamw(model, run.optim)
    for _ in range(2):
        for micro in range(run.rows.accumulation(1)):
            loss, routings = _loss(run, model, *_batch(run))
            if micro == 0:
                optimizer.zero_grad()
            loss.backward()
            del loss, routings
        optimizer.step()
