"""The loop on one screen computes what a run from yaml computes, to the bit."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch

from sigma_lite import cli, record
from sigma_lite.balance.objective import objective
from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.data.rows import Rows, train_loader
from sigma_lite.data.shards import load
from sigma_lite.loop import train
from sigma_lite.model import Transformer
from sigma_lite.runfile import load_run


@pytest.mark.parametrize(
    "changes",
    [
        {},  # a schedule of experts per token that switches, two micro-batches a step
        {"model__balance__bias": "sign", "model__balance__loss": "none"},
        {"model__optim__router_lr": 0.3, "model__optim__optimizer": "muon", "model__optim__schedule": "cosine"},
    ],
    ids=["a switch", "a bias", "another optimizer"],
)
def test_the_plain_loop_equals_a_run_to_the_bit(finished, tmp_path, monkeypatch, changes):
    shutil.copytree(finished / "prepared", tmp_path / "prepared")
    shutil.copytree(finished / "text", tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path, **changes)
    cli.main(["fit", "-c", "tiny.yaml"])

    settings = tiny.settings(**changes)
    run, steps = load_run([], settings), settings["trainer"]["max_steps"]
    torch.manual_seed(0)
    model, data = Transformer(run.net), load("prepared")
    batches = train_loader(Rows(data.train, data.token_bytes, run.rows.length), run.rows, steps=steps)
    losses, schedule = objective(run.balance, run.net.n_layers), run.sparsity
    done = train(
        model,
        batches,
        losses,
        run.optim,
        steps=steps,
        micros=run.rows.accumulation(1),
        k=lambda step: k_per_layer(
            step, switch_step=schedule.switch_step, n_layers=run.net.n_layers, head=schedule.head, target=run.net.top_k
        ),
    )
    lm = [sum(one.terms["lm"].item() for one in step.losses) / len(step.losses) for step in done]

    assert lm == pytest.approx([e["terms"]["lm"] for e in record.read("run/record.jsonl", "step")], rel=1e-6)
    saved = read_checkpoint(newest_checkpoint(tmp_path / "run"))["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"]), name
