"""The number of threads: chosen by a clock, recorded, and kept by whoever goes on with the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.runfile import load_run
from sigma_lite.train import run as run_module
from sigma_lite.train import threads
from sigma_lite.train.threads import Threads, candidates, measure, recorded, threads_for


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """No number from outside, and torch as it was afterwards."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """A clock and a step that takes as long as the number of threads says; one call in `every` is disturbed."""

    def __init__(self, seconds: dict[int, float], every: int = 0):
        self.seconds, self.every, self.now, self.calls = seconds, every, 0.0, 0

    def clock(self) -> float:
        return self.now

    def step(self) -> None:
        self.calls += 1
        took = self.seconds[torch.get_num_threads()]
        self.now += took * (5 if self.every and self.calls % self.every == 0 else 1)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 0.10, 2: 0.06, 4: 0.04, 8: 0.039}, 4),  # the last four bring 2.5 %
        ({1: 0.10, 2: 0.06, 4: 0.04, 8: 0.02}, 8),
        ({1: 0.10, 2: 0.13, 4: 0.30}, 1),  # on a machine with other work
        ({1: 9.0, 2: 5.0}, 2),  # a step longer than the time there is
    ],
)
def test_the_smallest_number_near_the_shortest_step_is_chosen(seconds, chosen):
    for every in (0, 7):
        machine = Machine(seconds, every)
        found = measure(machine.step, [*seconds], machine.clock)
        assert found.number == chosen and found.seconds[chosen] <= 1.05 * min(found.seconds.values())
        assert found.seconds == pytest.approx(seconds), "a median"
        assert all(f"{number}: {took:.3g} s" in found.why for number, took in seconds.items())
    rounds = threads.SECONDS + 3 * 5 * sum(seconds.values())
    assert machine.now <= rounds


def test_candidates_double_up_to_all_cores():
    assert [candidates(n) for n in (1, 2, 3, 4, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_who_is_asked_first(monkeypatch):
    before = {"device": "CPU X with AVX2, 3 thread(s), 1 process(es)"}

    def measured() -> Threads:
        return Threads(7, "measured")

    assert threads_for("auto", None, measured).number == 7
    assert threads_for("auto", before, measured)[:2] == (3, "as the run began")
    assert threads_for(5, before, measured).number == 5
    assert threads_for(None, before, measured) == (torch.get_num_threads(), "torch's own choice", {})
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    assert threads_for("auto", None, measured)[:2] == (torch.get_num_threads(), "asked for by OMP_NUM_THREADS=1")
    assert recorded(before) == 3 and recorded(before | {"threads": {"number": 2}}) == 2


def of_run(step: int | None = None) -> dict:
    return tiny.state("run", step)


def starts() -> list[dict]:
    entries = map(json.loads, Path("run/record.jsonl").read_text("utf-8").splitlines())
    return [entry for entry in entries if entry["kind"] == "run"]


def test_measuring_changes_nothing_of_the_run(place, finished, monkeypatch):
    """The same weights as of a run that did not measure: no random number is taken away."""
    monkeypatch.setattr(run_module, "cores", lambda: 1)
    monkeypatch.setattr(threads, "SECONDS", 0.1)
    cli.main(["fit", "-c", "tiny.yaml", "--threads=auto"])
    other = tiny.state(finished / "run")
    for name, weight in of_run()["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name]), name
    own = starts()[0]["threads"]
    assert own["number"] == 1 and own["why"].startswith("there is one core") and own["seconds"].keys() == {"1"}


def test_a_run_that_goes_on_keeps_its_number_whatever_a_clock_would_say_now(place, finished, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "measure", lambda step, numbers: Threads(1, "one was best"))
    tiny.write_config(place, threads="auto")
    tiny.ending(tiny.child(["fit", "-c", "tiny.yaml"], lambda: _dies_at(7)), 9)

    def never(step, numbers):
        raise AssertionError("measured again")

    monkeypatch.setattr(run_module, "measure", never)
    torch.set_num_threads(2)  # as on another machine
    cli.main(["fit", "-c", "tiny.yaml"])
    assert torch.get_num_threads() == 1 and "threads: 1, as the run began" in capsys.readouterr().out
    assert [start["threads"]["number"] for start in starts()] == [1, 1]
    whole = tiny.state(finished / "run")["state_dict"]
    assert all(torch.equal(weight, whole[name]) for name, weight in of_run()["state_dict"].items())


def _dies_at(step: int) -> None:
    from sigma_lite.train.module import SigmaLit

    forward = SigmaLit.training_step

    def dying(self, *args, **kwargs):
        if self.trainer.global_step >= step:
            os._exit(9)
        return forward(self, *args, **kwargs)

    SigmaLit.training_step = dying


def test_another_number_is_said(place, capsys):
    tiny.ending(tiny.child(["fit", "-c", "tiny.yaml", "--threads=1"], lambda: _dies_at(5)), 9)
    assert starts()[0]["threads"] == {"number": 1, "why": "asked for by threads", "seconds": {}}
    diary = Path("run/record.jsonl")
    diary.write_text(diary.read_text("utf-8").replace('"threads":{"number":1', '"threads":{"number":2'), "utf-8")
    cli.main(["fit", "-c", "tiny.yaml", "--threads=1"])
    said = capsys.readouterr().out
    assert "this run began with threads=2, and goes on with 1: threads=2 goes on to the last digit" in said


@pytest.mark.parametrize("given", ["many", 0, -1, 1.5, True, [2]])
def test_what_is_no_number_is_refused(given, tmp_path):
    with pytest.raises(ConfigError, match="threads=.*give a number of threads, auto, or null"):
        load_run([tiny.write_config(tmp_path, threads=given)])
