"""Whole runs on several ranks: the same training as on one, whatever the layout and wherever they are continued."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from launch import PER_MICRO, curve, done, fit, furthest, run_each, weights
from safetensors.torch import load_file

from sigma_lite import record
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint, step_of, write_checkpoint
from sigma_lite.data.rows import Rows, train_loader
from sigma_lite.data.shards import load
from sigma_lite.runfile import RowsConfig
from sigma_lite.storage import StorageError
from sigma_lite.train.module import SigmaLit

pytestmark = pytest.mark.slow
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, of them along the expert axis
STEPS, SWITCH, EVERY = 20, 8, 10
SETTINGS = {"trainer__max_steps": STEPS, "model__sparsity__switch_step": SWITCH, "save__every": EVERY}
SETTINGS |= {"trainer__val_check_interval": EVERY}


@pytest.fixture(scope="module")
def runs(corpus_and_data, tmp_path_factory) -> Path:
    """A folder with a run of each layout, named 4x2 and so on; 1x1 is one device. Do not write into it."""
    return run_each(tmp_path_factory.mktemp("layouts"), corpus_and_data, LAYOUTS, **SETTINGS)


def same_run(run: Path, other: Path) -> None:
    assert furthest(newest_checkpoint(run), newest_checkpoint(other)) < 1e-5
    assert len(curve(run)) == STEPS
    for step, (a, b) in enumerate(zip(curve(run), curve(other), strict=True), 1):
        assert a == pytest.approx(b, rel=1e-5), step
    for kind, name in (("load", "f"), ("validation", "bits_per_byte"), ("validation", "f"), ("validation", "P")):
        for a, b in zip(record.read(run / "record.jsonl", kind), record.read(other / "record.jsonl", kind), strict=True):
            assert a["step"] == b["step"]
            assert torch.allclose(torch.tensor(a[name]), torch.tensor(b[name]), atol=1e-5), kind


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(runs, layout):
    """20 steps with the switch of sparsity inside, K = 1 after it: losses, LBL, norms, loads and weights."""
    ranks, expert_ranks = layout
    same_run(runs / f"{ranks}x{expert_ranks}", runs / "1x1")
    k = [e["k"] for e in record.read(runs / "1x1" / "record.jsonl", "step")]
    assert k[SWITCH - 1 : SWITCH + 1] == [[2, 1], [1, 1]]


@pytest.mark.parametrize("where", ["2x2", "1x1", "one file"])
def test_a_checkpoint_of_four_ranks_continues_anywhere(runs, place, where):
    """From step 10 of 4 x 2 on two ranks, on one, and on one from a single file: the same rows, losses and weights."""
    shutil.copytree(runs / "4x2", "run")
    shutil.rmtree(newest_checkpoint("run"))
    middle = newest_checkpoint("run")
    assert step_of(middle) == EVERY and len(list(middle.iterdir())) == 5
    if where == "one file":
        whole = read_checkpoint(middle)
        shutil.rmtree(middle)
        write_checkpoint(middle, whole)
        assert middle.is_file()
    done(fit(*((2, 2) if where == "2x2" else (1, 1)), keep_rows, **SETTINGS))
    same_run(Path("run"), runs / "1x1")
    for step in range(EVERY, STEPS):
        parts = [torch.load(f"rows-{step}-{rank}") for rank in range(2 if where == "2x2" else 1)]
        assert torch.equal(torch.cat(parts), rows_of(step))


def keep_rows(rank: int) -> None:
    original = SigmaLit.training_step

    def training_step(self, batch, batch_idx):
        torch.save(batch.ids_BS, f"rows-{self.trainer.global_step}-{rank}")
        return original(self, batch, batch_idx)

    SigmaLit.training_step = training_step


def rows_of(step: int) -> torch.Tensor:
    """A step's rows, drawn without Lightning and ranks."""
    prepared, rows = load("prepared"), RowsConfig(length=32, per_step=8, per_micro=8)
    all_rows = Rows(prepared.train, prepared.token_bytes, 32)
    return next(iter(train_loader(all_rows, rows, steps=step + 1, first_step=lambda: step))).ids_BS


def test_predictions_are_those_of_one_device(runs, place):
    """One file with every held-out row once, in order: rows that only keep the ranks in step are not in it."""
    found = {}
    for ranks, expert_ranks in [(1, 1), (2, 2), (4, 2)]:
        shutil.copytree(runs / "4x2", f"{ranks}x{expert_ranks}")
        settings = SETTINGS | {"trainer__default_root_dir": f"{ranks}x{expert_ranks}"}
        done(fit(ranks, expert_ranks, command="predict", **settings))
        found[ranks] = load_file(f"{ranks}x{expert_ranks}/predictions.safetensors")
    prepared = load("prepared")
    n_rows = len(Rows(prepared.heldout, prepared.token_bytes, 32, padded=True))
    assert n_rows % PER_MICRO, "no batch would be short"
    for name, whole in found[1].items():
        assert len(whole) == n_rows
        for ranks in (2, 4):
            assert torch.allclose(found[ranks][name].double(), whole.double(), rtol=1e-4, atol=1e-5), (ranks, name)


def test_a_file_of_one_device_continues_on_two_ranks(runs, place):
    shutil.copytree(runs / "1x1", "run")
    newest_checkpoint("run").unlink()
    done(fit(2, 2, **SETTINGS))
    same_run(Path("run"), runs / "1x1")


def test_damage_to_any_file_is_seen(runs, tmp_path):
    path, chance = tmp_path / "step=000020.safetensors", random.Random(0)
    shutil.copytree(newest_checkpoint(runs / "4x2"), path)
    expected = json.dumps({name: value.tolist() for name, value in weights(path).items()})
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for damage in range(8):
            damaged = bytearray(content)
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged if damage else content[: len(content) // 2])
            with pytest.raises(StorageError, match="cut or altered"):
                read_checkpoint(path)
        file.unlink()
        with pytest.raises(StorageError, match="does not exist"):
            read_checkpoint(path)
        file.write_bytes(content)
    assert json.dumps({name: value.tolist() for name, value in weights(path).items()}) == expected
