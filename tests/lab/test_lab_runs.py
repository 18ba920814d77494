"""Runs of the lab in processes: killed ones continue, branches are exact, a failure costs nobody else's work."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import small
from forked import Forked

from sigma_lite import lab, record, storage
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.config import ConfigError
from sigma_lite.lab import kept, run_experiment
from sigma_lite.lab.experiment import runs_of
from sigma_lite.lab.results import read_results, results_path, run_facts, write_results
from sigma_lite.lab.run import written_yaml
from sigma_lite.storage import StorageError
from sigma_lite.train import provenance
from sigma_lite.train.callbacks.diary import Diary

CLOCK = ("time", "seconds", "tokens_per_s", "perf", "waited", "command")


def timeless(run: dict) -> dict:
    return {key: value for key, value in run.items() if key not in CLOCK}


def by_arm(folder: Path, name: str = "table3-tiny.json") -> dict[str, dict]:
    return {run["arm"]: timeless(run) for run in read_results(folder / "results" / name)["runs"]}


def entries(folder: Path, kind: str) -> list[dict]:
    return [timeless(entry) for entry in record.read(folder / "record.jsonl", kind)]


# ------------------------------------------------------------------------------------------------------------- results


def test_results_hold_where_they_come_from_and_what_they_found(table3):
    results = read_results(table3 / "results/table3-tiny.json")
    assert (results["experiment"], results["scale"], results["command"]) == ("table3", "tiny", "the test")
    assert [run["arm"] for run in results["runs"]] == ["top-1", "low 2", "converted"]
    for run in results["runs"]:
        assert run["tokens"] == 12 * 8 * 32 and run["versions"]["torch"] and "CPU" in run["device"]
        assert run["config"]["net"]["n_experts"] == 8 and len(run["curve"]["lm"]) == 12
        last = entries(next(table3.glob("runs/tiny/*/seed0")), "validation")[-1]
        assert set(last) >= set(run["heldout"]) - {"max", "min", "dead"}
        f = run["heldout"]["f"]
        assert run["heldout"]["max"] == pytest.approx([8 * max(row) - 1 for row in f], rel=1e-4, abs=1e-6)
    assert [run["k"] for run in results["runs"]] == [[[1, 1], [1, 1]], [[2, 1], [2, 1]], [[2, 1], [1, 1]]]


def test_a_finished_experiment_is_not_trained_again(table3, tmp_path, monkeypatch):
    shutil.copytree(table3, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    before = (tmp_path / "results/table3-tiny.json").read_bytes()
    run_experiment(small.TABLE3, small.scale(), command="the test", runs="runs", results="results")
    assert (tmp_path / "results/table3-tiny.json").read_bytes() == before


def test_rows_carry_code_commits_machine_and_refused_steps(table3):
    for run in read_results(table3 / "results/table3-tiny.json")["runs"]:
        assert run["commits"][-1] == run["commit"] and len(run["code"]) == 1 and run["refused_steps"] == 0
        assert run["cpu"]["instructions"] and run["experts"]["backend"] and run["time"]


def test_a_refused_step_is_a_number_of_the_row(table3, tmp_path):
    shutil.copytree(table3, tmp_path, dirs_exist_ok=True)
    (run,) = runs_of(lab.Experiment("x", "?", (small.TOP1,)), small.scale(), tmp_path / "runs")
    record.append(run.dir / "record.jsonl", "event", 5, what="step skipped", why="a spike")
    assert run_facts(run)["refused_steps"] == 1


@pytest.mark.parametrize("commit, refused", [("0123abc-dirty", True), ("0123abc", False), (None, False)])
def test_a_recording_is_of_a_commit(place, monkeypatch, commit, refused):
    """Before any work; only where it would be kept beside the code."""
    monkeypatch.setattr(provenance, "git_commit", lambda: commit)
    monkeypatch.setattr(lab.run, "_prepare_data", lambda runs: (_ for _ in ()).throw(StorageError("work began")))
    recorded = dataclasses.replace(small.scale(), recorded=True)
    error, says = (ConfigError, "differ from commit 0123abc: commit them first") if refused else (StorageError, "work began")
    with pytest.raises(error, match=says):
        run_experiment(small.TWO, recorded, runs="runs")
    for size, folder in ((recorded, "elsewhere"), (small.scale(), lab.run.RESULTS)):
        with pytest.raises(StorageError, match="work began"):
            run_experiment(small.TWO, size, runs="runs", results=folder)
    assert {name for name, size in lab.SCALES.items() if size.recorded} == {"cpu", "toy", "long", "gpu"}


def test_a_child_of_a_run_by_other_code_is_refused_with_it(table3, tmp_path, monkeypatch, capsys):
    """The checkpoint from which it began was made by that code."""
    shutil.copytree(table3, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    now = kept.package_code()
    monkeypatch.setattr(kept, "package_code", lambda: now | {"model/router.py": "00000000"})
    everything = {"runs": "runs", "results": "results"}
    with pytest.raises(ConfigError, match="'top-1' seed 0, 'low 2' seed 0, 'converted' seed 0 in .*: model/router.py. Say"):
        run_experiment(small.TABLE3, small.scale(), **everything)
    before = read_results("results/table3-tiny.json")["runs"]
    run_experiment(small.TABLE3, small.scale(), **everything, if_changed="reuse")
    assert read_results("results/table3-tiny.json")["runs"] == before


def test_forgetting_a_run_forgets_what_was_measured_of_it(tmp_path):
    for name in ("record.jsonl", "layers.json", "checkpoints/step=000006.safetensors", "run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    kept.forget(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "run.lock", "run.yaml"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_arm_that_names_code_which_is_not_there_is_refused_before_any_work(place):
    arm = lab.Arm("wrong", "?", {"model": {"custom_balance": {"class_path": "sigma_lite.papers.shinka.Shinkaa"}}})
    with pytest.raises(ConfigError, match="arm 'wrong' names code that cannot be imported: .*Shinkaa"):
        run_experiment(lab.Experiment("x", "?", (arm,)), small.scale(), runs="runs", results="results")
    assert not Path("runs").exists()


def test_an_edit_of_a_named_class_is_another_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    arm, found = lab.Arm("own", "?", {"model": {"custom_balance": "lab_idea.mine"}}), []
    for text in ("def mine(r, f):\n    return f.sum()\n", "def mine(r, f):\n    return f.sum() + f.max()\n"):
        (tmp_path / "lab_idea.py").write_text(text)
        monkeypatch.delitem(sys.modules, "lab_idea", raising=False)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found.append(runs_of(lab.Experiment("x", "?", (arm,)), small.scale(), Path("runs"))[0].dir)
    monkeypatch.delitem(sys.modules, "lab_idea")
    assert found[0] != found[1]


def test_more_seeds_add_to_a_results_file(table3, tmp_path, capsys):
    """Runs of other seeds stay, perhaps from another machine; those of other settings or of no arm go, and it is said."""
    path = results_path(tmp_path, "table3", "tiny")
    recorded = read_results(table3 / "results/table3-tiny.json")
    (known,) = [run for run in recorded["runs"] if run["arm"] == "top-1"]

    def elsewhere(number, part="net", **changes):
        config = {**known["config"], part: {**known["config"][part], **changes}}
        return {**known, "seed": number, "config": config}

    older = elsewhere(2)
    del older["config"]["net"]["router_score"]  # a setting that did not exist then
    runs = [elsewhere(1, "rows", seed=1), older, elsewhere(3, d_model=64), {**known, "arm": "gone", "seed": 4}, elsewhere(0)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**recorded, "runs": runs}))
    write_results(path, small.TABLE3, small.scale(), runs_of(small.TABLE3, small.scale(), table3 / "runs"), "again")
    found = [(run["arm"], run["seed"]) for run in read_results(path)["runs"]]
    assert found == [("top-1", 1), ("top-1", 2), ("top-1", 0), ("low 2", 0), ("converted", 0)]
    said = capsys.readouterr().err
    assert "'top-1' seed 3, recorded earlier, is dropped: net.d_model=64 then, 32 now" in said
    assert "'gone' seed 4, recorded earlier, is dropped: the arm is no more" in said and said.count("dropped") == 2


def test_some_arms_of_an_experiment_with_those_they_branch_from(table3, place):
    names = [
        [run.arm for run in runs_of(small.TABLE3, small.scale(), Path("runs"), arms=arms)] for arms in (["low 2"], None)
    ]
    assert names == [["low 2"], ["top-1", "low 2", "converted"]]
    converted = runs_of(small.TABLE3, small.scale(), Path("runs"), arms=["converted", "top-1"])
    assert [run.arm for run in converted] == ["top-1", "low 2", "converted"]
    with pytest.raises(ConfigError, match="experiment table3 has no arm 'top1'; did you mean 'top-1'"):
        run_experiment(small.TABLE3, small.scale(), runs="runs", results="results", arms=["low 2", "top1"])
    assert not Path("runs").exists()
    shutil.copytree(table3, ".", dirs_exist_ok=True)
    before = read_results("results/table3-tiny.json")["runs"]
    run_experiment(small.TABLE3, small.scale(), runs="runs", results="results", arms=["low 2"])
    assert read_results("results/table3-tiny.json")["runs"] == before, "the other arms stay, in their order"


def test_results_can_be_cut_down_to_some_arms(table3):
    found = read_results(table3 / "results/table3-tiny.json")
    few = found.only("converted", "top-1")
    assert list(few["arms"]) == [run["arm"] for run in few["runs"]] == ["converted", "top-1"]
    assert "low 2" in found.table() and "low 2" not in few.table() and len(found["runs"]) == 3
    with pytest.raises(ConfigError, match="table3 has no arm 'top1'; did you mean 'top-1'"):
        found.only("top1")


def test_a_results_file_is_whole_or_the_old_one(table3, tmp_path, monkeypatch):
    path = results_path(tmp_path, "table3", "tiny")
    runs = runs_of(small.TABLE3, small.scale(), table3 / "runs")
    write_results(path, small.TABLE3, small.scale(), runs, "first")
    before = path.read_bytes()

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", no_room)
    with pytest.raises(StorageError, match="no room to write"):
        write_results(path, small.TABLE3, small.scale(), runs, "second")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(StorageError, match="is damaged .* its runs are kept"):
        read_results(path)


# ------------------------------------------------------------------------------------------------------------ branches


def test_a_branch_is_bitwise_the_run_from_scratch_with_that_switch(table3, place, forks):
    """Its diary, its held-out measurement and its weights and moments."""
    scratch = lab.Experiment("scratch", "?", (small.SCRATCH,))
    (run,) = runs_of(scratch, small.scale(), Path("runs"))
    run_experiment(scratch, small.scale(), runs="runs", results="results")
    branched = table3 / run.dir  # the same settings: the same place
    assert record.read(branched / "record.jsonl", "run")[-1]["step"] == 6 and newest_checkpoint(branched)
    for kind in ("step", "load", "validation", "event"):
        assert entries(branched, kind) == entries(run.dir, kind)
    one, other = (read_checkpoint(newest_checkpoint(folder)) for folder in (branched, run.dir))
    for name, weight in one["state_dict"].items():
        assert weight.equal(other["state_dict"][name])
    (a,), (b,) = one["optimizer_states"], other["optimizer_states"]
    assert all(a["state"][i]["exp_avg_sq"].equal(b["state"][i]["exp_avg_sq"]) for i in b["state"])
    assert by_arm(place, "scratch-tiny.json")["from scratch"] == by_arm(table3)["converted"] | {"arm": "from scratch"}


def test_a_branch_needs_a_milestone(place, forks):
    low2 = lab.Arm("low 2", "keeps no milestone", small.sparsity(small.NEVER))
    experiment = lab.Experiment("x", "?", (low2, small.CONVERTED))
    with pytest.raises(ConfigError, match=r"arm 'converted' seed 0 stopped with code 1: .*save\.milestones=\[6\]"):
        run_experiment(experiment, small.scale(), runs="runs", results="results")
    assert not list(Path("results").glob("*.json"))


# --------------------------------------------------------------------------------------------------------------- kills

SIXTY = small.scale(60)
PATIENCE_S = 600  # on a busy machine


def run_two() -> None:
    run_experiment(small.TWO, SIXTY, runs="runs", results="results", workers=2)


@pytest.fixture(scope="module")
def uninterrupted(corpus_and_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(corpus_and_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(lab.run, "_start", forked.start)
        run_two()
    return folder


@pytest.fixture
def gate(place, monkeypatch):
    """Workers wait in their sixth step until this file is there, so what is done to them before is done in mid-run."""
    go, original = place / "go", Diary.on_train_batch_end

    def on_train_batch_end(self, trainer, *args):
        original(self, trainer, *args)
        patience = time.monotonic() + PATIENCE_S
        while trainer.global_step == 6 and not go.exists() and time.monotonic() < patience:
            time.sleep(0.01)

    monkeypatch.setattr(Diary, "on_train_batch_end", on_train_batch_end)
    yield go
    go.touch()


def workers_of(process: Forked) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text("utf-8").split()]


def wait_for_the_gate() -> None:
    patience = time.monotonic() + PATIENCE_S
    while min(last_steps()) < 6:
        assert time.monotonic() < patience, "the runs did not begin"
        time.sleep(0.01)


def last_steps() -> list[int]:
    return [record.last_step(run.dir / "record.jsonl") for run in runs_of(small.TWO, SIXTY, Path("runs"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


CHILDREN = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
linux = pytest.mark.skipif(not CHILDREN.exists(), reason="finds child processes in /proc")


@linux
def test_a_killed_arm_stops_nobody_and_continues(uninterrupted, place, forks, gate):
    process = Forked(run_two, Path("lab.log"))
    wait_for_the_gate()
    victim, other = workers_of(process)
    os.kill(victim, signal.SIGKILL)
    gate.touch()
    assert process.wait() == 1 and "seed 0 stopped with code -9" in Path("lab.log").read_text("utf-8")
    finished = [len(entries(run.dir, "validation")) for run in runs_of(small.TWO, SIXTY, Path("runs"))]
    assert sorted(finished) == [0, 1] and not alive(other)
    run_two()
    assert by_arm(place, "two-tiny.json") == by_arm(uninterrupted, "two-tiny.json")


@linux
def test_a_killed_lab_leaves_workers_that_the_next_one_waits_for(uninterrupted, place, forks, gate, monkeypatch):
    process = Forked(run_two, Path("lab.log"))
    wait_for_the_gate()
    orphans = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(orphans) == 2 and all(map(alive, orphans))
    start = lab.run._start
    monkeypatch.setattr(lab.run, "_start", lambda run: (start(run), gate.touch())[0])  # they go on when others wait
    run_two()
    assert not any(map(alive, orphans))
    assert by_arm(place, "two-tiny.json") == by_arm(uninterrupted, "two-tiny.json")
    for run in runs_of(small.TWO, SIXTY, Path("runs")):
        assert [e["step"] for e in entries(run.dir, "step")] == list(range(1, 61))
        assert len(entries(run.dir, "run")) == len(entries(run.dir, "validation")) == 1  # nobody began it again


def test_workers_are_processes_of_their_own(table3, place):
    """The other tests fork; this one does what a user's lab does."""
    one = lab.Experiment("one", "?", (small.TOP1,))
    run_experiment(one, small.scale(), runs="runs", results="results")
    assert by_arm(place, "one-tiny.json")["top-1"] == by_arm(table3)["top-1"]


@linux
@pytest.mark.parametrize(("sent", "said"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "143")])
def test_ctrl_c_or_kill_stops_the_workers(place, forks, gate, sent, said):
    """In the step that they are in, which ends here after both have been asked."""

    def lab_on_a_terminal():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        wait = Forked.wait
        Forked.wait = lambda self: (gate.touch(), wait(self))[1]
        run_two()

    process = Forked(lab_on_a_terminal, Path("lab.log"))
    wait_for_the_gate()
    workers = workers_of(process)
    process.send_signal(sent)
    assert process.wait() == 1 and said in Path("lab.log").read_text("utf-8")
    assert len(workers) == 2 and not any(map(alive, workers))
    assert last_steps() == [6, 6]


def test_settings_are_checked_before_any_work(place, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    wrong = lab.Arm("wrong", "a misspelt key", {"model": {"balance": {"los": "micro"}}})
    with pytest.raises(ConfigError, match="unknown key model.balance.los; did you mean 'loss'"):
        run_experiment(lab.Experiment("x", "?", (small.TOP1, wrong)), small.scale(), runs="runs", results="results")


def test_an_unfinished_run_has_no_facts(place):
    (run,) = runs_of(lab.Experiment("x", "?", (small.TOP1,)), small.scale(), Path("runs"))
    written_yaml(run)
    with pytest.raises(ConfigError, match="is not finished"):
        run_facts(run)


def test_results_are_one_line_a_run(table3):
    """So that a changed run is a changed line in version control."""
    lines = (table3 / "results/table3-tiny.json").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 3 and json.loads(lines[1].rstrip(","))["arm"] == "top-1"


def test_results_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*choose a folder"):
        run_experiment(lab.EXPERIMENTS["fig2"], small.scale(4), runs="runs", results="file/results")
    assert not Path("runs").exists()
