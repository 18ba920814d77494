"""Another optimizer on several ranks: the same steps as on one, gone on with from any layout; starts of every kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launch import curve, die, done, endings, fit, furthest, run_each, start, weights

from sigma_lite import record
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint, read_settings, step_of
from sigma_lite.train.callbacks.diary import Diary

pytestmark = pytest.mark.slow
MUON = {"class_path": "muon", "init_args": {"dtype": "float32"}}  # of bfloat16 a last bit is 0.4 %
SETTINGS = {"trainer__max_steps": 10, "save__every": 5, "trainer__val_check_interval": 5, "model__sparsity": None}
SETTINGS |= {"model__optim__optimizer": MUON, "model__optim__decay_fraction": 0.0}
LAYOUTS = [(2, 1), (2, 2), (4, 2)]
REMEMBERING = """
import torch


class Remembering(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = torch.zeros(p.to_local().shape[0])
        return loss
"""


@pytest.fixture(scope="module")
def runs(corpus_and_data, tmp_path_factory) -> Path:
    """A folder with a run of each layout, named 4x2 and so on; 1x1 is one device. Do not write into it."""
    return run_each(tmp_path_factory.mktemp("optimizers"), corpus_and_data, LAYOUTS, **SETTINGS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_in_pieces_are_orthogonalised_whole(runs, layout):
    """Pieces apart would give other updates; so would a layer's experts taken together."""
    run = runs / f"{layout[0]}x{layout[1]}"
    assert furthest(newest_checkpoint(run), newest_checkpoint(runs / "1x1")) < 1e-5
    for step, (a, b) in enumerate(zip(curve(run), curve(runs / "1x1"), strict=True), 1):
        assert a == pytest.approx(b, rel=1e-5), step
    one, other = (read_checkpoint(newest_checkpoint(r))["optimizer_states"][0]["state"] for r in (run, runs / "1x1"))
    for place, entries in other.items():
        for name, value in entries.items():
            assert torch.allclose(one[place][name], value, atol=1e-5), (place, name)


def test_killed_it_goes_on_bitwise_and_on_one_device(runs, place):
    def trap(rank: int) -> None:
        original = Diary.on_train_batch_end
        Diary.on_train_batch_end = lambda self, t, *rest: (
            die() if t.global_step == 7 and rank == 0 else original(self, t, *rest)
        )

    assert -9 in endings(start(2, 2, trap, **SETTINGS, timeout_s=60))
    assert step_of(newest_checkpoint("run")) == 5
    shutil.copytree("run", "elsewhere")
    done(fit(2, 2, **SETTINGS))
    assert furthest(newest_checkpoint("run"), newest_checkpoint(runs / "2x2")) == 0
    done(fit(1, 1, **SETTINGS, trainer__default_root_dir="elsewhere"))
    assert furthest(newest_checkpoint("elsewhere"), newest_checkpoint(runs / "1x1")) < 1e-5


def test_extended_branched_and_taken_from_on_two_ranks(runs, place):
    """From checkpoints in pieces: a longer run, a branch at another rate, and weights for a run with more experts."""
    for name in ("2x2", "1x1"):
        shutil.copytree(runs / name, name)
    longer = {**SETTINGS, "trainer__max_steps": 15}
    done(fit(2, 2, **longer, extend=True, trainer__default_root_dir="2x2"))
    done(fit(1, 1, **longer, extend=True, trainer__default_root_dir="1x1"))
    assert furthest(newest_checkpoint("2x2"), newest_checkpoint("1x1")) < 1e-5
    other = {**longer, "model__optim__lr": 0.001, "branch_from": str(runs / "2x2")}
    for ranks in (2, 1):
        done(fit(ranks, ranks, **other, trainer__default_root_dir=f"branch{ranks}"))
    assert furthest(newest_checkpoint("branch2"), newest_checkpoint("branch1")) < 1e-5
    rates = [e["lr"] for e in record.read("branch2/record.jsonl", "step")]
    assert rates[8:12] == [0.003, 0.003, 0.001, 0.001]
    assert read_settings(newest_checkpoint("branch2"))["parent"]["step"] == 10
    more = {**SETTINGS, "model__net__n_experts": 12, "init_from": str(runs / "2x2"), "new_weights": "begin"}
    more |= {"trainer__max_steps": 5, "model__optim__lr": 1e-12}
    for ranks in (2, 1):
        done(fit(ranks, ranks, **more, trainer__default_root_dir=f"more{ranks}"))
    assert furthest(newest_checkpoint("more2"), newest_checkpoint("more1")) < 1e-8
    was, now = weights(newest_checkpoint(runs / "2x2")), weights(newest_checkpoint("more2"))
    parent = read_settings(newest_checkpoint("more2"))["parent"]
    assert len(parent["new"]) == 8 and parent["left"] == parent["new"]
    for name in now.keys() - {*parent["new"]}:
        assert torch.allclose(was[name], now[name], atol=1e-8), name


def test_a_state_that_is_not_laid_out_as_its_parameter_is_refused(place):
    Path("remembering.py").write_text(REMEMBERING)
    changes = {**SETTINGS, "model__optim__optimizer": "remembering.Remembering"}
    assert set(fit(2, 2, **changes, timeout_s=60)) == {2}
    assert "the state 'rows' of Remembering, [" in (words := Path("child.log").read_text("utf-8")), words
    assert newest_checkpoint("run") is None
