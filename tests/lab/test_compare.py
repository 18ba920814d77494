"""A balancer of one's own in the lab, as a notebook would write it: a function or an object, compared with named ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
import torch

from sigma_lite import lab
from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import ConfigError


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

    def moved_bias(self, bias_LE, counts_LE, step):
        self.calls += 1
        return torch.where(counts_LE == 0, bias_LE + 0.01, bias_LE)


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
    names = {run["arm"]: run["config"]["custom_balance"] for run in compared[1]["runs"]}
    assert names["LBL"] is None and "flat" in names["flat"] and "Steered" in names["steered"]


def test_an_object_moves_the_bias_once_a_step(compared):
    assert STEERED.calls == 6
    assert run_of(compared[1], "flat")["load"]["bias_spread"] == [None, None]
    spread = run_of(compared[1], "steered")["load"]["bias_spread"]
    assert any(row and max(row) > 0 for row in spread)


def test_what_a_notebook_gets(compared):
    results = compared[1]
    lines = results.table().splitlines()
    assert lines[0].startswith("arm ") and [line.split()[0] for line in lines[1:]] == list(ARMS)
    assert f"{run_of(results, 'flat')['heldout']['bits_per_byte']:.4f}" in results.table()
    assert results.figure("layer0_deviation").data and results._repr_html_().count("<tr>") == 1 + len(ARMS)
    with pytest.raises(ConfigError, match="figure 'layer0_deviatoin' does not exist; did you mean 'layer0_deviation'"):
        results.figure("layer0_deviatoin")
    assert lab.read_results(compared[0] / "results/mine-tiny.json") == results


def test_settings_are_kept_and_balancers_begun_anew(compared, monkeypatch):
    """Code has no name by which to find it again: another function under the same name is another run."""
    folder, first = compared
    monkeypatch.chdir(folder)
    again = lab.compare({"LBL": {}, "flat": same_as_global}, small.scale(6), runs="runs", results="results", name="again")
    assert run_of(again, "LBL") == run_of(first, "LBL")
    assert run_of(again, "flat")["curve"] == run_of(first, "same")["curve"] != run_of(first, "flat")["curve"]
    assert Path("results/again-tiny.json").exists()


def test_what_is_no_balancer_is_refused(place):
    with pytest.raises(ConfigError, match="is not a balancer: give a function"):
        lab.compare({"mine": 3}, small.scale(6), runs="runs", results="results")
    with pytest.raises(ConfigError, match="unknown key model.balance.wight; did you mean 'weight'"):
        lab.compare({"mine": {"model": {"balance": {"wight": 1}}}}, small.scale(6), runs="runs", results="results")
