"""What Lightning would let one choose, and what a run does at its edges: the switch, a full disk, a fit after another."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from sigma_lite import cli, record
from sigma_lite.checkpoint import checkpoint_path, newest_checkpoint
from sigma_lite.config import ConfigError, ModelConfig, OptimConfig
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.runfile import CorpusConfig, RowsConfig, from_mapping
from sigma_lite.storage import StorageError
from sigma_lite.train.callbacks import throughput
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.module import SigmaLit

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
PLAIN = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, "limit_val_batches": 0, **QUIET}


def module() -> SigmaLit:
    torch.manual_seed(0)
    return SigmaLit(NET, optim=OptimConfig(warmup_steps=2))


def train(made: SigmaLit, *callbacks: pl.Callback, **options) -> None:
    corpus = CorpusConfig(source="files", path="text", dir="prepared", heldout=0.2, vocab_size=300)
    data = TokenDataModule(corpus, RowsConfig(length=32, per_step=8, per_micro=4))
    options = {**PLAIN, "max_steps": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **options}
    pl.Trainer(callbacks=list(callbacks), **options).fit(made, datamodule=data)


@pytest.mark.parametrize(("options", "said"), [
    ({"precision": "bf16-true"}, "precision=bf16-true: choose 32-true or bf16-mixed"),
    ({"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}, "precision=16-mixed"),
    ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm=value"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_done_wrong_is_refused(place, options, said):
    """Scaled gradients would be clipped, a bias rounded to 8 bits, and values clipped by their norm: all without a word."""
    with pytest.raises(ConfigError, match=said):
        train(module(), **options)


@pytest.mark.parametrize(("key", "value"), [
    ("accumulate_grad_batches", 4), ("check_val_every_n_epoch", 1), ("limit_train_batches", 5), ("overfit_batches", 1),
    ("fast_dev_run", True), ("use_distributed_sampler", True), ("val_check_interval", 0.3), ("val_check_interval", 0),
    ("val_check_interval", "00:00:00:05"),
])  # fmt: skip
def test_steps_are_not_cut_another_way(place, capsys, key, value):
    """A validation inside a step would be saved with half of its gradients lost; an epoch of five batches ends in one."""
    tiny.write_config(place, **{f"trainer__{key}": value})
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 2
    assert f"trainer.{key}={value}" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("run").exists()


def test_a_validation_at_the_switch_measures_its_checkpoint(place, capsys):
    tiny.write_config(place, model__sparsity__switch_step=4, trainer__max_steps=6, trainer__val_check_interval=4)
    cli.main(["fit", "-c", "tiny.yaml"])
    entry = record.read("run/record.jsonl", "validation")[0]
    assert entry["step"] == 4 and [e["k"] for e in record.read("run/record.jsonl", "step")][:4] == 4 * [[2, 1]]
    capsys.readouterr()
    cli.main(["validate", "-c", "tiny.yaml", f"--ckpt_path={checkpoint_path('run', 4)}"])
    assert str(entry["bits_per_byte"])[:9] in capsys.readouterr().out


def test_a_speed_is_that_of_a_whole_step(monkeypatch):
    """Two micro-batches of 10 tokens; the second takes longer, because the optimizer steps in it."""
    clock = iter([0.0, 0.0, 1.0, 1.0, 5.0, 5.0, 6.0, 6.0, 8.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    callback, trainer = throughput.Throughput(), SimpleNamespace(accumulate_grad_batches=2, world_size=1)
    batch, speeds = SimpleNamespace(ids_BS=torch.zeros(2, 5)), []
    outputs = {"tokens": 10}
    callback.on_train_start(trainer, None)
    for n in range(4):
        callback.on_train_batch_start(trainer, None, batch, n)
        callback.on_train_batch_end(trainer, None, outputs, batch, n)
        speeds.append(callback.tokens_per_s)
    assert speeds[1::2] == [20 / 5, 20 / 3] and (callback.tokens, callback.seconds) == (40, 8.0)


def test_a_run_goes_on_where_it_has_just_enough_room(place, monkeypatch):
    """Room for three checkpoints and a half: one that is killed with two on disk needs one more, not three."""
    Usage = namedtuple("Usage", "total used free")
    weights = 1000

    def usage(_) -> Usage:
        return Usage(0, 0, 3.5 * 3 * weights - sum(path.stat().st_size for path in Path("run").rglob("*.safetensors")))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    model = SimpleNamespace(parameters=lambda: [torch.zeros(weights // 4)])
    trainer = SimpleNamespace(default_root_dir="run")
    Save(keep=2).on_fit_start(trainer, model)
    for step in (2, 4):
        path = checkpoint_path("run", step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(3 * weights))
        Save(keep=2).on_fit_start(trainer, model)
    (Path("run") / "other.safetensors").write_bytes(bytes(3 * weights))
    with pytest.raises(StorageError, match="1 checkpoint needs"):
        Save(keep=2).on_fit_start(trainer, model)
    assert newest_checkpoint("run") == path


class Watch(pl.Callback):
    """Note every micro-batch's LBL and every step's norm, and end the fit after `last` micro-batches."""

    def __init__(self, last: int = 99):
        self.last, self.seen = last, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((float(outputs["terms"]["balance"]), module.grad_norm if batch_idx % 2 else None))
        if batch_idx + 1 == self.last:
            raise InterruptedError


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_was_cut_leaves_nothing_to_the_next(place):
    """The same module twice, as in a notebook: counts of half a step, or a refused step's norm, are not the next one's."""
    whole, again, made = Watch(), Watch(), module()
    train(module(), whole)
    with pytest.raises(InterruptedError):
        train(made, Watch(last=1))  # in the middle of the first step: no weight has moved
    made._norm = torch.tensor(torch.nan)  # as a guard leaves it that gives up
    train(made, again)
    assert len(whole.seen) == 4 and again.seen == whole.seen
