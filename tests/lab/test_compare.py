"""A balancer of one's own in the lab, as a notebook would write it: a function or an object, compared with named ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small
import torch

from sigma_lite import lab, record
from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import ConfigError
from sigma_lite.lab import kept as kept_runs
from sigma_lite.lab import worker
from sigma_lite.lab.results import Results


def same_as_global(routing, f_E):
    return load_balancing_loss(routing.probs, routing.ids, f_E)


def flat(routing, f_E):
    """Probabilities as even as they can be, whatever the loads are."""
    return len(f_E) * routing.probs.mean(0).square().sum()


class Steered(Balancer):
    """No loss; an expert that got nothing in the last step is preferred in the next one."""

    def __init__(self):
        self.calls = 0

    def loss(self, routing, f_E):
        return 0 * routing.probs.sum()

    def next_bias(self, bias_LE, pooled, step):
        self.calls += 1
        with open("calls.txt", "a") as file:  # a list of this module would be a value that the balancer changes
            file.write(f"{self.calls} ")
        return torch.where(pooled == 0, bias_LE + 0.01, bias_LE)


STEERED = Steered()
ARMS = {"LBL": {}, "same": same_as_global, "flat": flat, "steered": STEERED}


@pytest.fixture(scope="module")
def compared(corpus_and_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "prepared").symlink_to(corpus_and_data / "prepared")
    (folder / "text").symlink_to(corpus_and_data / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, lab.compare(ARMS, small.scale(6), runs="runs", results="results")


def run_of(results, arm: str) -> dict:
    return next(run for run in results["runs"] if run["arm"] == arm)


def test_ones_own_global_loss_gives_bitwise_the_named_curve(compared):
    named, own, other = (run_of(compared[1], arm) for arm in ("LBL", "same", "flat"))
    for part in ("curve", "load", "heldout"):
        assert own[part] == named[part]
    assert other["curve"] != named["curve"]


def test_results_say_whose_balancer_it_was(compared):
    own = {run["arm"]: run["config"]["custom_balance"] for run in compared[1]["runs"]}
    assert own["LBL"] is None and own["flat"]["class"].endswith(".flat") and own["steered"]["class"].endswith(".Steered")
    assert own["steered"]["settings"] == {"calls": 0} and own["flat"]["code"] != own["same"]["code"]


def test_an_object_moves_the_bias_once_a_step(compared):
    assert (compared[0] / "calls.txt").read_text().split() == list("123456") and STEERED.calls == 0, "the run has a copy"
    assert run_of(compared[1], "flat")["load"]["bias_spread"] == [None, None]
    spread = run_of(compared[1], "steered")["load"]["bias_spread"]
    assert any(row and max(row) > 0 for row in spread)


def test_what_a_notebook_gets(compared):
    results = compared[1]
    table, _, said = results.table().partition("\n\n")
    lines = table.splitlines()
    assert lines[0].startswith("arm ") and [line.split()[0] for line in lines[1:]] == list(ARMS)
    assert "No step was refused." in said and results["runs"][0]["cpu"]["instructions"] in said
    assert f"{run_of(results, 'flat')['heldout']['bits_per_byte']:.4f}" in results.table()
    assert results.figure("layer0_deviation").data and results._repr_html_().count("<tr>") == 1 + len(ARMS)
    with pytest.raises(ConfigError, match="figure 'layer0_deviatoin' does not exist; did you mean 'layer0_deviation'"):
        results.figure("layer0_deviatoin")
    assert lab.read_results(compared[0] / "results/mine-tiny.json") == results


def test_an_edited_balancer_is_a_new_run_and_the_same_one_a_kept_run(compared, monkeypatch):
    """Under the same name. A run is found by what it executes, so the same function under two names is one run, too."""
    folder, first = compared
    monkeypatch.chdir(folder)
    again = compare_again({"LBL": {}, "flat": same_as_global}, name="again")
    assert run_of(again, "LBL") == run_of(first, "LBL")
    assert run_of(again, "flat") == run_of(first, "same") | {"arm": "flat"}, "kept, with its date"
    assert run_of(again, "flat")["curve"] != run_of(first, "flat")["curve"]
    assert Path("results/again-tiny.json").exists()


def compare_again(arms: dict, **options) -> Results:
    return lab.compare(arms, small.scale(6), runs="runs", results="results", **options)


EDITED = """
import torch
from sigma_lite.balance.balancer import Balancer

FACTOR = 1.0

def scaled(x):
    return FACTOR * x

class Base(Balancer):
    def loss(self, routing, f_E):
        return scaled((routing.probs.mean(0) * self.targets).sum())

class Mine(Base):
    def __init__(self):
        self.targets = torch.ones(8)
"""


@pytest.mark.parametrize("edit", [("FACTOR * x", "FACTOR + x"), ("FACTOR = 1.0", "FACTOR = 2.0"), ("ones(8)", "arange(8)")])
def test_an_edit_of_the_helper_the_value_or_the_array_trains_anew(compared, monkeypatch, edit):
    """The cell as a notebook runs it, before and after."""
    monkeypatch.chdir(compared[0])
    trained = []
    monkeypatch.setattr(worker, "train", lambda yaml, **_: trained.append(yaml) or (_ for _ in ()).throw(Stop()))
    for text in (EDITED, EDITED, EDITED.replace(*edit)):
        namespace = {"__name__": "__main__"}
        exec(text, namespace)
        with pytest.raises(Stop):
            compare_again({"mine": namespace["Mine"]()})
    assert trained[0] == trained[1] != trained[2]


class Stop(Exception):
    """Instead of training."""


def test_kept_runs_of_another_package_are_not_used_without_a_word(compared, monkeypatch, tmp_path, capsys):
    shutil.copytree(compared[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    now = kept_runs.package_code()
    monkeypatch.setattr(kept_runs, "package_code", lambda: now | {"balance/losses.py": "00000000"})
    with pytest.raises(ConfigError, match=r"'LBL' seed 0 in runs.tiny: trained by other code .*: balance/losses\.py\. Say"):
        compare_again({"LBL": {}})
    kept = compare_again({"LBL": {}}, if_changed="reuse")
    assert run_of(kept, "LBL") == run_of(compared[1], "LBL")
    assert "balance/losses.py; taken as it is" in capsys.readouterr().err
    again = compare_again({"LBL": {}}, if_changed="again")
    assert run_of(again, "LBL")["curve"] == run_of(kept, "LBL")["curve"]
    assert (run_of(again, "LBL")["time"], run_of(again, "LBL")["seconds"]) != (
        run_of(kept, "LBL")["time"],
        run_of(kept, "LBL")["seconds"],
    )
    with pytest.raises(ConfigError, match="if_changed='agian' does not exist; did you mean 'again'"):
        compare_again({"LBL": {}}, if_changed="agian")


def test_a_run_that_recorded_no_code_counts_as_another_codes(compared, monkeypatch, tmp_path):
    shutil.copytree(compared[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for path in Path("runs").rglob("record.jsonl"):
        entries = record.read(path)
        path.write_bytes(b"".join(record.line({k: v for k, v in e.items() if k != "code"}) for e in entries))
    with pytest.raises(ConfigError, match="which code made it was not recorded"):
        compare_again({"LBL": {}})


def test_a_package_that_changed_on_disk_is_not_recorded_as_what_was_trained(place, monkeypatch):
    monkeypatch.setattr(kept_runs, "edited_since_import", lambda: ["balance/losses.py"])
    with pytest.raises(ConfigError, match="balance/losses.py changed after this Python imported .* restart the kernel"):
        compare_again({"LBL": {}})


def test_each_seed_begins_with_the_state_that_was_given(compared, monkeypatch):
    monkeypatch.chdir(compared[0])
    Path("calls.txt").unlink()
    compare_again({"steered": STEERED}, seeds=(0, 1), name="seeds")
    assert Path("calls.txt").read_text().split() == list("123456"), "seed 0 is kept, seed 1 does not go on where it ended"


def test_a_function_that_writes_outside_of_itself_is_told(compared, monkeypatch):
    monkeypatch.chdir(compared[0])
    seen = [0]

    def counting(routing, f_E):
        seen[0] += 1
        return 0 * routing.probs.sum()

    with pytest.warns(UserWarning, match="arm 'counting' changed a value outside of it while it trained"):
        compare_again({"counting": counting}, name="counting")


def test_what_has_no_fingerprint_is_trained_anew_and_said(compared, monkeypatch, capsys):
    monkeypatch.chdir(compared[0])
    own = Balancer()
    own.numbers = (number for number in range(3))
    times = []
    for _ in range(2):
        compare_again({"odd": own}, name="odd")
        times.append(max(diary.stat().st_mtime_ns for diary in Path().rglob("record.jsonl")))
        assert "odd: trained anew, nobody can tell whether it is the same: it.numbers (generator)" in capsys.readouterr().err
    assert times[0] < times[1], "the diary was written anew"
    with pytest.raises(ConfigError, match="cannot be copied .* give one seed"):
        compare_again({"odd": own}, seeds=(0, 1), name="odd")


def test_what_is_no_balancer_is_refused(place):
    with pytest.raises(ConfigError, match="is not a balancer: give a function"):
        lab.compare({"mine": 3}, small.scale(6), runs="runs", results="results")
    with pytest.raises(ConfigError, match="unknown key model.balance.wight; did you mean 'weight'"):
        lab.compare({"mine": {"model": {"balance": {"wight": 1}}}}, small.scale(6), runs="runs", results="results")
