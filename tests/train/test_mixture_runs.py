"""Runs on a mixture with an annealing stage and a batch-size ramp: killed, extended, branched; what their diaries say."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import before, diary, same
from tiny import child, ending

from sigma_lite import cli, record
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint, read_settings
from sigma_lite.config import ConfigError
from sigma_lite.serve.rows import rows_of_step
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.run import RunCLI

SOURCES = {"code": {"source": "files", "path": "text"}, "prose": {"source": "files", "path": "prose"}}
STAGES = [{"at_step": 5, "weights": {"code": 1, "prose": 3}}]
RAMP = [[0, 2], [3, 4], [7, 8]]
CHANGES = {
    "data__corpus": {"dir": "mix", "heldout": 0.2},
    "data__mixture": {"sources": SOURCES, "weights": {"code": 3, "prose": 1}, "stages": STAGES},
    "data__rows": {"length": 32, "per_step": 8, "per_micro": 2, "ramp": RAMP},
    "model__optim__decay_fraction": 0.0,
}


def config(name: str, **changes) -> list[str]:
    tiny.write_config(Path(), f"{name}.yaml", trainer__default_root_dir=name, **CHANGES | changes)
    return ["fit", "-c", f"{name}.yaml"]


def fit(name: str, *words: str, **changes) -> None:
    with RunCLI([*config(name, **changes), *words]) as run:  # without a sample and a report
        assert run.finished


@pytest.fixture(scope="module")
def trained(corpus_and_data, tmp_path_factory) -> Path:
    """A folder with both corpora, their tokens and a run of 12 steps in run/. Do not write into it."""
    folder = tmp_path_factory.mktemp("mixture")
    shutil.copytree(corpus_and_data / "text", folder / "text")
    (folder / "prose").mkdir()
    for n in range(12):
        lines = (
            f"The {word} of chapter {n} says {i} things to the reader.\n" for i, word in enumerate(("cat", "dog", "sea"))
        )
        (folder / "prose" / f"p{n}.txt").write_text("".join(lines) * 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit("run")
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    for name in ("text", "prose", "mix"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entries(run: Path, *events: str) -> list[dict]:
    return [e for e in diary(run) if e["kind"] != "sample" and e.get("what") not in events]


def at(step: int):
    return before(Diary, "on_train_batch_end", lambda self, t, *_: t.global_step == step)


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(here, trained):
    """In the ramp, at its steps, at the stage, between a step and its validation: bitwise the run that was never killed."""
    config("run")
    traps = (at(2), at(3), at(5), before(Diary, "on_validation_end"), at(7), before(Save, "save", lambda self, t: t.global_step == 8), at(12))  # fmt: skip  # noqa: E501
    for trap in traps:
        assert ending(child(["fit", "-c", "run.yaml"], trap)) == -signal.SIGKILL
    fit("run")
    same(tiny.state(Path("run")), tiny.state(trained / "run"))
    assert entries(Path("run")) == entries(trained / "run")
    assert [e["step"] for e in entries(Path("run")) if e["kind"] == "validation"] == [4, 8, 12]


def test_a_run_is_extended_through_ramp_and_stage(here, trained):
    """4 -> 12 steps are 12 from the start, bitwise: the first run ended before the stage and in the middle of the ramp."""
    fit("run", trainer__max_steps=4)
    fit("run", "--extend", trainer__max_steps=12)
    same(tiny.state(Path("run")), tiny.state(trained / "run"))
    assert entries(Path("run"), "extended") == entries(trained / "run")


def test_the_diary_says_where_every_row_came_from(trained, monkeypatch):
    monkeypatch.chdir(trained)
    steps = record.read("run/record.jsonl", "step")
    read = Counter()
    for entry, size in zip(steps, [2] * 3 + [4] * 4 + [8] * 5, strict=True):
        assert sum(entry["rows"].values()) == size
        read.update(entry["rows"])
        assert entry["tokens"] == 32 * read.total()
        rows = rows_of_step("run", entry["step"])
        assert Counter(row["source"] for row in rows) == Counter(entry["rows"])
        assert {row["source"]: row["epoch"] for row in rows}.items() <= {
            n: int(p) for n, p in entry["passes"].items()
        }.items()
        assert all(row["documents"] for row in rows)
        assert all(name.startswith("p") == (row["source"] == "prose") for row in rows for name in row["documents"])
    seen = [(row["source"], row["epoch"], row["row"]) for e in steps for row in rows_of_step("run", e["step"])]
    assert len({*seen}) == len(seen) == read.total()
    events = [(e["step"], e["what"], e["why"]) for e in record.read("run/record.jsonl", "event")]
    assert events == [
        (3, "batch size", "rows per step 2 -> 4"),
        (5, "mixture", "code 0.75 -> 0.25, prose 0.25 -> 0.75"),
        (6, "sparsity switch", "experts per token [2, 1] -> [1, 1]"),
        (7, "batch size", "rows per step 4 -> 8"),
    ]


def test_the_rate_is_that_of_the_step_whatever_its_batch(trained):
    steps = record.read(trained / "run/record.jsonl", "step")
    assert [e["lr"] for e in steps] == pytest.approx([0.0015] + [0.003] * 11)


def test_held_out_loss_is_of_each_source_and_of_all(trained):
    facts = record.read(trained / "run/record.jsonl", "run")[0]["data"]
    for entry in record.read(trained / "run/record.jsonl", "validation"):
        bits = sum(entry["sources"][n]["bits_per_byte"] * facts["sources"][n]["heldout_bytes"] for n in SOURCES)
        assert bits / facts["heldout_bytes"] == pytest.approx(entry["bits_per_byte"], rel=1e-9)
        nats = {n: entry["sources"][n]["nats_per_token"] * (facts["sources"][n]["heldout_tokens"] - 1) for n in SOURCES}
        assert sum(nats.values()) == pytest.approx(math.log(2) * bits, rel=1e-6)
        assert entry["sources"]["code"] != entry["sources"]["prose"]


@pytest.mark.slow
def test_a_branch_changes_the_mixture_and_no_row_is_read_twice(here, trained):
    """From step 10 mostly code, at half the batch; killed before and behind its first checkpoint."""
    shutil.copytree(trained / "run", "run")
    newest_checkpoint("run").unlink()  # step 10 is the newest
    other = {"data__mixture": {"sources": SOURCES, "weights": {"code": 9, "prose": 1}}}
    other |= {"data__rows": {"length": 32, "per_step": 4, "per_micro": 2}, "trainer__max_steps": 16}
    fit("whole", "--branch_from=run", **other)
    config("killed", branch_from="run", **other)
    for trap in (at(11), at(14)):
        assert ending(child(["fit", "-c", "killed.yaml"], trap)) == -signal.SIGKILL
    shutil.rmtree("run")
    fit("killed", branch_from="run", **other)
    same(tiny.state(Path("killed")), tiny.state(Path("whole")))
    assert entries(Path("killed")) == entries(Path("whole"))
    assert read_settings(newest_checkpoint("killed"))["parent"]["changed"]["mixture.weights.code"] == [3.0, 9.0]
    drawn = [row for step in range(1, 11) for row in rows_of_step(trained / "run", step)]
    drawn += [row for step in range(11, 17) for row in rows_of_step("killed", step)]
    seen = [(row["source"], row["epoch"], row["row"]) for row in drawn]
    assert len({*seen}) == len(seen) == 3 * 2 + 4 * 4 + 3 * 8 + 6 * 4
    assert Counter(s for s, *_ in seen[-24:]) == {"code": 22, "prose": 2}
    assert max(epoch for _, epoch, _ in seen) == 0
    with pytest.raises(ConfigError, match="step 10 of killed was made by run"):
        rows_of_step("killed", 10)


def test_a_run_on_one_corpus_branches_onto_a_mixture(here, trained):
    """The corpus is one of the sources: it goes on behind what was read of it, the others begin."""
    one = {"data__corpus": {"source": "files", "path": "text", "dir": "mix/code", "heldout": 0.2}}
    one |= {"data__mixture": None, "data__rows": {"length": 32, "per_step": 8, "per_micro": 4}}
    fit("one", **one, trainer__max_steps=4, model__sparsity=None)
    assert record.read("one/record.jsonl", "step")[-1]["rows"] == {"corpus": 8}
    fit("two", "--branch_from=one", data__rows=one["data__rows"], trainer__max_steps=8, model__sparsity=None)
    first, last = (record.read("two/record.jsonl", "step")[i] for i in (4, 7))
    passes = record.read("one/record.jsonl", "step")[3]["passes"]["corpus"]
    rows = round(32 / passes)
    assert first["passes"]["code"] == pytest.approx((32 + first["rows"]["code"]) / rows, rel=1e-5)
    assert last["rows"] == {"code": 2, "prose": 6}
    seen = [(r["row"]) for run, steps in (("one", range(1, 5)), ("two", range(5, 9))) for s in steps
            for r in rows_of_step(run, s) if r["source"] in ("corpus", "code")]  # fmt: skip
    assert len({*seen}) == len(seen) > 32


def test_what_changes_nothing_is_said_and_a_changed_mixture_is_another_run(here, trained, capsys):
    shutil.copytree(trained / "run", "run")
    late = {"data__mixture": {**CHANGES["data__mixture"], "stages": [{"at_step": 20, "weights": {"code": 1, "prose": 1}}]}}
    assert tiny.refused(cli.main, *config("run", **late)) == 2
    said = capsys.readouterr()
    assert "run holds a run with mixture.stages=" in said.err and "--branch_from=run goes on from it" in said.err
    fit("other", **late, trainer__max_steps=2)
    said = capsys.readouterr().out
    assert "note          data.mixture.stages: at_step=20 is not before max_steps=2" in said
    assert "note          rows.ramp: step 7 is not before max_steps=2, so it does not end" in said
    assert torch.is_tensor(next(iter(read_checkpoint(newest_checkpoint("other"))["state_dict"].values())))


def test_the_command_names_rows(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    cli.main(["rows", "run", "6", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == rows_of_step("run", 6) and len(rows) == 4
    cli.main(["rows", "run", "6"])
    assert all(row["documents"][0] in capsys.readouterr().out for row in rows[:1])
    for step, words in (("99", "run has the steps 1 to 12"), ("0", "run has the steps 1 to 12")):
        assert tiny.refused(cli.main, "rows", "run", step) == 2
        assert words in capsys.readouterr().err


def test_the_end_of_a_run_and_its_report_show_each_source(here, capsys):
    cli.main([*config("short", trainer__max_steps=2)])
    said = capsys.readouterr().out
    each = record.read("short/record.jsonl", "validation")[-1]["sources"]
    page = Path("short/report.html").read_text("utf-8")
    for name in SOURCES:
        assert f"  {name:<12}{each[name]['bits_per_byte']:.4f}" in said
        assert f"{name} {each[name]['bits_per_byte']:.3f}" in page and f"{name}: {each[name]['bits_per_byte']:.3f}" in page
