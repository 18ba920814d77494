"""Measurements after training: of all held-out tokens, and taken again by other code."""

from __future__ import annotations

import shutil

import pytest
import small

from sigma_lite.checkpoint import newest_checkpoint, read_settings
from sigma_lite.data.rows import Rows
from sigma_lite.data.shards import load
from sigma_lite.lab import Experiment, measure
from sigma_lite.lab.experiment import runs_of


@pytest.fixture
def run(table3, tmp_path, monkeypatch):
    shutil.copytree(table3, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return runs_of(Experiment("x", "?", (small.TOP1,)), small.scale(), tmp_path / "runs")[0].dir


@pytest.mark.parametrize("batch", [5, 7, 10**6])
def test_no_held_out_row_is_left_out_whatever_the_batch(run, monkeypatch, batch):
    monkeypatch.setattr(measure, "ROWS", batch)
    settings = read_settings(newest_checkpoint(run))
    prepared = load(settings["corpus"]["dir"])
    rows = Rows(prepared.heldout, prepared.token_bytes, settings["rows"]["length"])
    _, seen = measure._routed(run)
    assert len(rows) % 5 or len(rows) % 7, "else every batch is whole"
    assert len(seen.tokens) == len(seen.positions) == len(rows) * settings["rows"]["length"] == len(seen.experts[0])


def test_a_measurement_is_kept_and_taken_again_by_other_code(run, monkeypatch):
    first, taken = measure.measured(run, "layers"), []
    monkeypatch.setitem(measure.MEASURES, "layers", lambda folder: taken.append(folder) or [1])
    assert measure.measured(run, "layers") == first and not taken
    monkeypatch.setattr(measure, "package_code", lambda: {"python": "py3.11", "balance/zipf.py": "00000000"})
    assert measure.measured(run, "layers") == [1] == measure.measured(run, "layers") and len(taken) == 1


def test_a_measurement_of_before_that_says_no_code_is_taken_again(run):
    (run / "layers.json").write_text("[]")
    assert len(measure.measured(run, "layers")) == 2
