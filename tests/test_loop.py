"""The loop on one screen computes what a run from yaml computes, to the bit."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch

from sigma_lite import cli, loop, record
from sigma_lite.balance.balancer import GlobalLBL, WithBias, require_whole_step
from sigma_lite.balance.objective import Objective, objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.balance.shuffled import ShuffledLBL
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.config import ConfigError
from sigma_lite.data.rows import Batch, Rows, train_loader
from sigma_lite.data.shards import load
from sigma_lite.loop import train
from sigma_lite.model import Transformer
from sigma_lite.papers.simbal import SimBal
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.train.module import SigmaLit


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


def one_step(clip: float, spoil: bool = False) -> list[torch.Tensor]:
    """Weights after a step from the same beginning, on rows of random tokens."""
    run, model, batch = begun()
    if spoil:
        model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
    next(train(model, [batch], objective(run.balance, run.net.n_layers), run.optim, steps=3, clip=clip))
    return [weight.detach() for weight in model.parameters()]


def begun() -> tuple[RunConfig, Transformer, Batch]:
    run = load_run([], tiny.settings(model__sparsity=None))
    torch.manual_seed(0)
    model, ids_BS = Transformer(run.net), torch.randint(0, run.net.vocab_size, (4, 13))
    batch = Batch(ids_BS[:, :-1], ids_BS[:, 1:], *[torch.zeros(4, 12, dtype=torch.int64)] * (len(Batch._fields) - 2))
    return run, model, batch


def test_clipping_at_0_clips_nothing():
    """As in `fit`: a scale of 0 / norm would have made every gradient 0."""
    clipped, free, far = one_step(0.01), one_step(0), one_step(1e9)
    assert all(map(torch.equal, free, far)) and not all(map(torch.equal, free, clipped))


def test_no_step_is_refused():
    """SpikeGuard, which `fit` has, would have left the weights as they were: the one difference that the docstring names."""
    assert "SpikeGuard refuses" in loop.__doc__
    assert any(weight.isnan().any() for weight in one_step(1.0, spoil=True))


def test_a_balancer_that_does_not_fit_is_refused_as_in_fit():
    run, model, batch = begun()
    with pytest.raises(ConfigError, match="SimBal sees the router's rows"):
        next(train(model, [batch], objective(run.balance, run.net.n_layers, SimBal()), steps=1))


def test_a_model_trains_in_training_mode_whatever_it_did_before():
    run, model, batch = begun()
    next(train(model.eval(), [batch], objective(run.balance, run.net.n_layers), steps=1))
    assert model.training


def test_too_few_batches_are_counted():
    run, model, batch = begun()
    steps = train(model, [batch] * 3, objective(run.balance, run.net.n_layers), steps=2, micros=2)
    assert next(steps).step == 1
    with pytest.raises(ConfigError, match="ended in step 2 of 2: give 4"):
        next(steps)


def test_a_balancer_that_must_see_the_whole_step_is_refused_a_part():
    """A control that draws from a quarter of each micro-batch would say nothing."""
    for balancer in (ShuffledLBL(), WithBias(ShuffledLBL(), "sign")):
        require_whole_step(balancer, micros=1)
        for cut in ({"micros": 4}, {"micros": 1, "ranks": 2}):
            with pytest.raises(ConfigError, match="ShuffledLBL.* must see all tokens of a step at once.* rows.per_step"):
                require_whole_step(balancer, **cut)
    require_whole_step(GlobalLBL(), micros=4, ranks=2)
    with pytest.raises(ConfigError, match="4 micro-batch"):
        next(train(None, [], Objective(ShuffledLBL(), 1.0, 0.0, 2), steps=1, micros=4))
    trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=2)
    module = SimpleNamespace(trainer=trainer, pooled=PooledCounts(), objective=Objective(ShuffledLBL(), 1.0, 0.0, 2))
    with pytest.raises(ConfigError, match=r"1 micro-batch\(es\) on 2 rank"):
        SigmaLit.on_train_start(module)
