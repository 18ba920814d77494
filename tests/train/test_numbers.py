"""Numbers that are none: in settings, weights and logits; and settings that would train something else without a word."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from test_fit_settings import Watch, module, train

from sigma_lite import cli, record
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, read_checkpoint, write_checkpoint
from sigma_lite.config import ConfigError, ModelConfig, SparsityConfig
from sigma_lite.runfile import SECTIONS, RunConfig, load_run
from sigma_lite.scale.strategy import ExpertParallel
from sigma_lite.serve.generate import draw
from sigma_lite.train.checkpoint import require_finite
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.settings import without_effect
from sigma_lite.train.strategies import check_made, check_named, outside_srun

FLOATS = [
    (cls, name)
    for classes in SECTIONS.values()
    for cls in classes.values()
    for name, hint in typing.get_type_hints(cls).items()
    if hint is float
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("cls", "name"), FLOATS)
def test_every_setting_is_finite(cls, name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be a finite number"):
        dataclasses.replace(cls(), **{name: value})


@pytest.mark.parametrize(("key", "said"), [
    ("model.optim.lr=.inf", "lr=inf: must be a finite number"),
    ("model.optim.betas=[.nan, 0.9]", r"betas[0]=nan"),
    ("data.rows.seed=-1", "rows.seed=-1: must be 0 or more"),
    ("data.rows.split_above=2.0", "split_above=2.0: is a share"),
    ("trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val=nan: must be a finite number"),
    ("trainer.gradient_clip_val=.inf", "trainer.gradient_clip_val=inf: must be a finite number"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: must be 0 or more"),
    ("trainer.max_time={seconds: .inf}", "trainer.max_time.seconds=inf"),
    ("trainer.limit_val_batches=0.5", "held-out numbers are of all held-out text"),
    ("spike_guard.threshold=.inf", "spike_guard.threshold=inf: must be a finite number"),
    ("save.milestones=[0]", "0 is no optimizer step"),
    ("save.milestones=[4, 99]", "[99] lie beyond trainer.max_steps=12"),
    ("model.sparsity.switch_step=12", "switch_step=12 is trainer.max_steps"),
    ("trainer.strategy=fsdp", "norm of its own piece"),
    ("trainer.strategy=deepspeed_stage_2", "clips and steps by itself"),
    ("trainer.strategy=ddp_spawn", "no signal reaches"),
    ("trainer.strategy=lightning.pytorch.strategies.FSDPStrategy", "norm of its own piece"),
])  # fmt: skip
def test_refused_before_any_work(place, capsys, key, said):
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", f"--{key}") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sigma-lite: ") and "\n" not in error and said in error
    assert not Path("run").exists()


@pytest.mark.parametrize(("key", "said"), [
    ("model.sparsity.switch_step=13", "sparsity.switch_step=13 lies beyond max_steps=12"),
    ("model.optim.warmup_steps=12", "optim.warmup_steps=12 of max_steps=12: the rate only rises"),
    ("model.balance.temperature=0.5", "balance.temperature=0.5 has no effect: it needs loss=top1"),
    ("model.balance.bias_rate=0.5", "balance.bias_rate=0.5 has no effect: it needs a bias"),
])  # fmt: skip
def test_what_changes_nothing_is_said(place, capsys, key, said):
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", f"--{key}", "--trainer.max_time={seconds: 0}") == 0
    assert f"note          {said}" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "said"), [
    ({"model__sparsity": {"switch_step": 6}}, ["sparsity.switch_step=6 has no effect: there is no sparsity.head"]),
    ({"model__sparsity__head": [1]}, ["sparsity.head=[1] has no effect: net.top_k=1 is the same before the switch"]),
    ({"model__custom_balance": "sigma_lite.papers.shinka.Shinka", "model__balance": {"bias": "sign", "bias_rate": 0.1}},
     [f"balance.{one} has no effect: custom_balance stands in" for one in ("bias=sign", "bias_rate=0.1")]),
    ({"model__balance": {"loss": "none", "weight": 0.5}}, ["balance.weight=0.5 has no effect: loss=none"]),
    ({"model__balance": {"loss": "top1", "weight": 0.0}}, ["balance.loss=top1 has no effect: balance.weight is 0"]),
    ({"model__optim__schedule": "linear", "model__optim__decay_fraction": 0.5}, ["optim.decay_fraction=0.5 has no effect"]),
    ({"model__optim__optimizer": "torch.optim.SGD", "model__optim__eps": 1e-8}, ["torch.optim.SGD is no AdamW"]),
    ({"model__reward": {"normalise": False}}, ["reward.normalise=False has no effect: it needs reward.answers"]),
    ({"data__rows__packed": False}, ["rows.packed=False has no effect: only conversations are packed"]),
    ({"data__mixture": {"temperature": 2.0}}, ["mixture.temperature=2.0 has no effect"]),
    # what is read, though it looks like the above
    ({"model__custom_balance": "sigma_lite.papers.shinka.Shinka", "model__balance": {"weight": 0.5, "z_weight": 0.0}}, []),
    ({"model__optim__schedule": {"class_path": "tiny.child"}, "model__optim__decay_fraction": 0.5}, []),
    ({"model__optim__optimizer": "muon", "model__optim__eps": 1e-8}, []),
    ({"model__balance": {"loss": "none", "bias": "sign", "bias_rate": 0.1}}, []),
    ({}, []),
])  # fmt: skip
def test_every_setting_that_nothing_reads_is_named(changes, said):
    found = without_effect(load_run([], tiny.settings(**changes)))
    assert len(found) == len(said) and all(one in sentence for one, sentence in zip(said, found, strict=True)), found


def test_a_balancer_in_memory_stands_in_the_place_of_settings_too():
    run = load_run([], tiny.settings(model__balance__bias="sign"))
    assert without_effect(run) == [] and "balance.bias=sign has no effect" in without_effect(run, own=True)[0]


def test_a_schedule_that_no_step_follows_is_refused_in_python_too():
    """`plan` and `fit` did so before; SigmaLit took one expert per token from the first step."""
    net, never = ModelConfig(), SparsityConfig(head=(8, 8, 6, 6))
    for build in (lambda: SigmaLit(net, never), lambda: RunConfig(net, never)):
        with pytest.raises(ConfigError, match=r"sparsity.head=\[8, 8, 6, 6\] has no effect without sparsity.switch_step"):
            build()
    assert SigmaLit(net, SparsityConfig(never.head, 5)).k_at(4) == (8, 8, 6, 6)


# ------------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.filterwarnings("ignore")
def test_clipping_at_nothing_clips_nothing(place):
    """0 is Lightning's word for no clipping; a scale of 0 / norm would have made every gradient 0."""
    seen = {}
    for limit in (0, 0.0, None, 1e9):
        made = module()
        train(made, Watch(), gradient_clip_val=limit)
        seen[limit] = [p.detach().clone() for p in made.parameters()]
    start = list(_started().parameters())
    for limit, weights in seen.items():
        assert all(map(torch.equal, weights, seen[None])), limit
    assert any(not torch.equal(a, b) for a, b in zip(start, seen[0], strict=True))


def _started():
    made = module()
    made.configure_model()
    return made


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_what_is_no_number_is_never_saved(place, capsys, monkeypatch, part):
    """The run ends with a sentence; the checkpoint of before stays the newest, and the run can go on from there."""
    from sigma_lite.train.callbacks.diary import Diary

    original = Diary.on_train_batch_end

    def spoil(self, trainer, pl_module, *args):
        original(self, trainer, pl_module, *args)
        if trainer.global_step == 6:
            parameter = next(pl_module.parameters())
            moments = trainer.optimizers[0].state[parameter]
            (parameter.data if part == "weight" else moments["exp_avg_sq"]).view(-1)[3] = math.inf

    monkeypatch.setattr(Diary, "on_train_batch_end", spoil)
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "after step 6" in said and "no checkpoint is written" in said and "lower optim.lr" in said
    assert [path.name for path in checkpoints("run")] == ["step=000002.safetensors", "step=000004.safetensors"]
    monkeypatch.setattr(Diary, "on_train_batch_end", original)
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0


def test_a_rate_that_blows_up_leaves_no_such_checkpoint(place, capsys):
    """Finite, and far too large: caught in the loss, in the weights or by the guard, always with a sentence."""
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--model.optim.lr=1e30", "--save.every=1") == 2
    assert "lower optim.lr" in capsys.readouterr().err.strip().splitlines()[-1]
    for path in checkpoints("run"):
        require_finite(read_checkpoint(path), torch.device("cpu"))


@pytest.fixture
def spoilt(place, finished):
    """A finished run whose newest checkpoint, of an older version, holds a NaN."""
    shutil.copytree(finished / "run", "run")
    path = newest_checkpoint("run")
    checkpoint = read_checkpoint(path)
    for name in ("embedding", "head"):  # tied, and both there
        checkpoint["state_dict"][f"model.{name}.weight"][:] = math.nan
    write_checkpoint(path, checkpoint)
    return place


@pytest.mark.parametrize("line", ["generate run", "validate -c tiny.yaml", "test -c tiny.yaml", "predict -c tiny.yaml"])
def test_a_model_that_is_no_number_says_so(spoilt, capsys, line):
    assert tiny.refused(cli.main, *line.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said.startswith("sigma-lite: ")
        and ("nan" in said or "NaN" in said or "not finite" in said)
        and "earlier checkpoint" in said
    )
    assert not Path("run/predictions.safetensors").exists()


def test_logits():
    for bad in (math.nan, math.inf):
        for temperature in (0, 1):
            with pytest.raises(ConfigError, match="logits are not finite"):
                draw(torch.tensor([0.0, bad]), temperature, 1.0)
    assert draw(torch.tensor([0.0, -math.inf]), 1, 1.0) == 0  # a token that is ruled out
    with pytest.raises(ConfigError, match="logits are not finite"):
        draw(torch.tensor([-math.inf, -math.inf]), 1, 1.0)


# ---------------------------------------------------------------------------------------------------------- strategies


def test_strategies_that_were_made():
    """Those that Lightning chooses by itself, and classes of one's own, are seen only when they are there."""
    for fine in (SingleDeviceStrategy("cpu"), DDPStrategy(), ExpertParallel()):
        check_made(fine)
    for wrong, said in (
        (FSDPStrategy(), "norm of its own piece"),
        (ModelParallelStrategy(), "leaves it to the model"),
        (DDPStrategy(start_method="fork"), "no signal reaches"),
        (SimpleNamespace(), "never checked"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_made(wrong)


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "single_device", "mine.Own"])
def test_names_that_pass(name):
    check_named(name)
    check_named({"class_path": name, "init_args": {"timeout_s": 5}})


def test_weights_of_ranks_that_drift_apart_are_refused():
    with pytest.raises(ConfigError, match="model_averaging_period=2"):
        check_named({"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"model_averaging_period": 2}})


INTERACTIVE = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "jupyterhub", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}


def test_a_shell_of_an_allocation_trains(place, monkeypatch, capsys):
    for name, value in INTERACTIVE.items():
        monkeypatch.setenv(name, value)
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0
    assert "SLURM_NTASKS=2, but srun did not start this process" in capsys.readouterr().err
    assert [e["step"] for e in record.read("run/record.jsonl", "sample")] == [12]


def test_what_srun_started_stays_slurms(place, monkeypatch, capsys):
    """There a number of tasks that does not fit is one sentence."""
    for name, value in (INTERACTIVE | {"SLURM_STEP_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert outside_srun(None) is None
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("sigma-lite: this trainer cannot be built: ") and "--ntasks" in said[-1]
    assert "SLURM_STEP_ID" in os.environ


# ------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.filterwarnings("ignore")
def test_a_cut_run_is_not_gone_on_with_in_other_micro_batches(place, capsys):
    """Two a step, then one: the global loss would see other shares, and say nothing."""
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--trainer.max_time={seconds: 0}") == 0
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0
    newest_checkpoint("run").unlink()
    capsys.readouterr()
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--data.rows.per_micro=8") == 2
    said = capsys.readouterr().err.strip()
    assert "a run of 2 micro-batches a step, this config makes 1: rows.per_micro=4 keeps them" in said
    assert "counts loads as micro-batches come" in said
