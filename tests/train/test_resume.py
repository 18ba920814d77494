"""`kill -9` at any moment, then the same command: the same weights, optimizer state and diary as without the kill."""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import child, ending

from sigma_lite import cli, record, storage
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, read_checkpoint, read_settings, step_of
from sigma_lite.config import ConfigError
from sigma_lite.train import settings
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.module import SigmaLit

CLOCK = ("time", "seconds", "tokens_per_s", "perf", "waited", "command")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, when=lambda *args: True, times: int = 1):
    """A trap: kill the process at the `times`-th call of owner.name for which `when` holds, before it runs."""
    original, seen = getattr(owner, name), []

    def trapped(*args, **kwargs):
        if when(*args):
            seen.append(1)
            if len(seen) == times:
                die()
        return original(*args, **kwargs)

    return lambda: setattr(owner, name, trapped)


def after_replacing_a_checkpoint():
    """Kill between a checkpoint's move into place and the removal of the oldest."""
    original = os.replace

    def replace(old, new):
        original(old, new)
        if "000004" in str(new):
            die()

    storage.os.replace = replace


def is_checkpoint(*args) -> bool:
    return any("checkpoints" in os.readlink(f"/proc/self/fd/{a}") for a in args if isinstance(a, int))


def half_a_line():
    """Kill in the middle of an append: the diary ends in a torn line."""
    original = record.line

    def line(entry):
        if entry["step"] == 7:
            with open("run/record.jsonl", "ab") as file:
                file.write(original(entry)[:20])
            die()
        return original(entry)

    record.line = line


TRAPS = {  # where: (trap, step of the newest checkpoint afterwards)
    "before the first step": (before(Diary, "on_train_start"), None),
    "in the first step, before any checkpoint": (before(Diary, "on_train_batch_end"), None),
    "while the first checkpoint is written": (before(storage.os, "fsync", is_checkpoint), None),
    "while the second checkpoint is written": (before(storage.os, "fsync", is_checkpoint, times=2), 2),
    "after a checkpoint, before the oldest is removed": (after_replacing_a_checkpoint, 4),
    "between two micro-batches": (before(Diary, "on_train_batch_end", lambda self, t, m, o, b, i: i % 2 == 0), 4),
    "in the diary": (half_a_line, 6),
    "at the switch of sparsity": (before(Diary, "on_train_batch_end", lambda self, t, *_: t.global_step == 7), 6),
    "between a step and its validation": (before(Diary, "on_validation_end"), 6),
    "between a validation and its checkpoint": (before(Save, "save", lambda self, t: t.global_step == 8), 6),
    "between training and sample": (before(cli, "_finish"), 12),
}


@pytest.fixture(scope="module")
def whole(finished):
    return read_checkpoint(newest_checkpoint(finished / "run")), diary(finished / "run")


def diary(run: Path) -> list[dict]:
    """All entries but those of starts, without what a clock says."""
    entries = [e for e in record.read(run / "record.jsonl") if e["kind"] != "run"]
    return [{k: v for k, v in e.items() if k not in CLOCK} for e in entries]


def same(a, b, where=""):
    """Bitwise equality of nested containers of tensors and plain values, times aside."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(CLOCK):
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), where
    else:
        assert a == b, where


def check_equal(run: Path, whole) -> None:
    weights, entries = whole
    same(read_checkpoint(newest_checkpoint(run)), weights)
    assert diary(run) == entries
    assert [e["step"] for e in entries if e["kind"] == "step"] == list(range(1, 13))
    assert [e["step"] for e in entries if e["kind"] == "validation"] == [4, 8, 12]
    assert [e["what"] for e in entries if e["kind"] == "event"] == ["sparsity switch"]
    assert [p.name for p in checkpoints(run)] == ["step=000010.safetensors", "step=000012.safetensors"]


def test_killed_at_every_kind_of_moment(place, whole):
    """One run, killed eleven times in a row at chosen places; its clock counts no time twice and none from before."""
    begun = time.perf_counter()
    for where, (trap, step) in TRAPS.items():
        assert ending(child(["fit", "-c", "tiny.yaml"], trap)) == -signal.SIGKILL, where
        newest = newest_checkpoint("run")
        assert (newest and step_of(newest)) == step, where
    assert ending(child(["fit", "-c", "tiny.yaml"])) == 0
    check_equal(place / "run", whole)
    starts = record.read("run/record.jsonl", "run")
    assert starts[-1]["step"] > 0 and starts[0]["step"] == 0
    last = record.read("run/record.jsonl", "step")[-1]
    waited = sum(seconds for name, seconds in last["perf"].items() if name.endswith("_seconds"))
    assert 0 < last["seconds"] + waited < time.perf_counter() - begun


def test_killed_at_random_moments(place, whole):
    """Moments as far apart as this machine is slow; a run that is faster is killed in its last step, so none gets away."""
    chance = random.Random(time.time_ns())
    at_the_end = before(Diary, "on_train_batch_end", lambda self, t, *_: t.global_step == 12)
    begun = time.monotonic()
    assert ending(child(["fit", "-c", "tiny.yaml", "--trainer.default_root_dir=measured"], at_the_end)) == -signal.SIGKILL
    seconds = time.monotonic() - begun
    for _ in range(6):
        pid = child(["fit", "-c", "tiny.yaml"], at_the_end)
        time.sleep(chance.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        assert ending(pid) == -signal.SIGKILL
    assert ending(child(["fit", "-c", "tiny.yaml"])) == 0
    check_equal(place / "run", whole)


def test_a_finished_run_is_left_alone(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    files = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    monkeypatch.setattr("sigma_lite.train.module.SigmaLit.training_step", die)
    cli.main(["fit", "-c", "tiny.yaml"])
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == files
    out = capsys.readouterr().out
    assert "held-out" in out and "report" in out


def test_a_moved_run_goes_on_and_counts_on(place, whole):
    """A folder may be renamed; tokens and seconds are summed over restarts: those of a step of more than a second too."""

    def slow_then_killed():
        original = SigmaLit.training_step

        def training_step(self, *args):
            time.sleep(0.6 * (self.trainer.global_step == 2))
            return original(self, *args)

        SigmaLit.training_step = training_step
        before(Diary, "on_train_batch_end", times=13)()

    assert ending(child(["fit", "-c", "tiny.yaml"], slow_then_killed)) < 0
    os.rename("run", "elsewhere")
    assert ending(child(["fit", "-c", "tiny.yaml", "--trainer.default_root_dir=elsewhere"])) == 0
    check_equal(Path("elsewhere"), whole)
    steps = record.read("elsewhere/record.jsonl", "step")
    assert [e["tokens"] for e in steps] == [8 * 32 * n for n in range(1, 13)]
    seconds = [e["seconds"] for e in steps]
    assert seconds == sorted(seconds) and seconds[2] > 1
    assert all(e["tokens_per_s"] > 0 for e in steps)


def test_interrupted_from_the_keyboard(place):
    def interrupt():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        original = Diary.on_validation_end
        Diary.on_validation_end = lambda *args: (original(*args), os.kill(os.getpid(), signal.SIGINT))

    assert ending(child(["fit", "-c", "tiny.yaml"], interrupt), 130) == 130
    last = Path("child.log").read_text("utf-8").splitlines()[-1]
    assert last.startswith(
        "sigma-lite: stopped at step 5 of 12; the same command continues from run/checkpoints/step=000005"
    )
    assert step_of(newest_checkpoint("run")) == 5


def test_record_survives_a_torn_line(tmp_path):
    path = tmp_path / "record.jsonl"
    record.append(path, "step", 1)
    with open(path, "ab") as file:
        file.write(b'{"kind":"lo')
    assert [e["step"] for e in record.read(path)] == [1]
    record.append(path, "step", 2)
    assert [e["step"] for e in record.read(path)] == [1, 2]
    path.write_bytes(b"[1]\n" + path.read_bytes())
    with pytest.raises(storage.StorageError, match="line 1"):
        record.read(path)


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    diary = record.Record(tmp_path / "record.jsonl")
    for step in (1, 2, 3):
        diary.write("event", step - 1, what="w", why="y")
        diary.write("step", step)
    kept = record.Record(diary.path, 2)
    assert [(e["kind"], e["step"]) for e in record.read(kept.path)] == [("event", 0), ("step", 1), ("event", 1), ("step", 2)]
    json.loads(kept.path.read_text("utf-8").splitlines()[0])


def test_a_checkpoint_older_than_a_setting_counts_as_made_with_its_default():
    """Otherwise every new setting would orphan every run that is under way."""
    saved = {"net": {"d_model": 32}, "rows": {"length": 8}, "custom_balance": None, "seed_everything": 0}
    found = settings.completed(saved)
    assert found["net"]["d_model"] == 32 and found["net"]["router_score"] == "softmax"
    assert found["rows"]["length"] == 8 and found["custom_balance"] is None


@pytest.mark.parametrize(
    ("balance", "custom", "goes_on"),
    [
        ("global", None, True),
        ("sequence", None, True),
        ("micro", None, False),
        ("top1", None, False),
        ("none", "mine", False),
    ],
)
def test_other_micro_batches_go_on_unless_the_loss_is_of_each(finished, monkeypatch, balance, custom, goes_on):
    checkpoint = newest_checkpoint(finished / "run")
    saved = read_settings(checkpoint)
    saved = {**saved, "balance": {**saved["balance"], "loss": balance}, "custom_balance": custom}
    monkeypatch.setattr(settings, "read_settings", lambda _: saved)
    now = {**saved, "rows": {**saved["rows"], "per_micro": 1}}
    if goes_on:
        return settings.require_same_settings(checkpoint, now)
    with pytest.raises(ConfigError, match=f"a run with rows.per_micro={saved['rows']['per_micro']}, this config says 1"):
        settings.require_same_settings(checkpoint, now)


OWN = "WEIGHT = 1.0\n\n\ndef mine(routing, f_E):\n    return WEIGHT * routing.probs.mean(0).square().sum()\n"


def fit_with(text: str, monkeypatch) -> None:
    """As a process of its own would: what it has imported before is forgotten."""
    Path("resumed_idea.py").write_text(text)
    monkeypatch.delitem(sys.modules, "resumed_idea", raising=False)
    importlib.invalidate_caches()
    shutil.rmtree("__pycache__", ignore_errors=True)
    cli.main(["fit", "-c", "own.yaml", "--model.custom_balance", "resumed_idea.mine"])


def test_a_run_is_not_resumed_with_an_edited_balance_loss(place, monkeypatch, capsys):
    """Its name and its settings are the same; an edited comment is no edit."""
    monkeypatch.syspath_prepend(str(place))
    tiny.write_config(place, "own.yaml", trainer__max_steps=2, model__sparsity=None)
    fit_with(OWN, monkeypatch)
    fit_with(f"# a comment\n{OWN}", monkeypatch)
    with pytest.raises(SystemExit):
        fit_with(OWN.replace("WEIGHT = 1.0", "WEIGHT = 2.0"), monkeypatch)
    said = capsys.readouterr().err
    assert "run holds a run with custom_balance=resumed_idea.mine, whose code has changed since" in said


def test_a_checkpoint_that_recorded_no_code_goes_on_and_says_so(finished, monkeypatch):
    checkpoint = newest_checkpoint(finished / "run")
    saved = {**read_settings(checkpoint), "custom_balance": "ideas.Mine(strength=0.1)"}
    monkeypatch.setattr(settings, "read_settings", lambda _: saved)
    now = {**saved, "custom_balance": {"class": "ideas.Mine", "settings": {"strength": 0.1}, "code": "py3.11:12"}}
    with pytest.warns(UserWarning, match="the code of ideas.Mine.* was not recorded when the run began"):
        settings.require_same_settings(checkpoint, now)
