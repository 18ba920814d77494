"""One small experiment, run once for all tests of the lab; workers are forks of this process."""

from __future__ import annotations

import shutil
from pathlib import Path

import forked
import pytest
import small

from sigma_lite.lab import run, run_experiment


@pytest.fixture
def forks(monkeypatch) -> None:
    """Workers of this test are forks."""
    monkeypatch.setattr(run, "_start", forked.start)


@pytest.fixture(scope="session")
def table3(corpus_and_data, tmp_path_factory) -> Path:
    """A folder in which runs/ and results/ of small.TABLE3 were made, two workers at a time. Do not write into it."""
    folder = tmp_path_factory.mktemp("table3")
    shutil.copytree(corpus_and_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run, "_start", forked.start)
        path = run_experiment(small.TABLE3, small.scale(), command="the test", runs="runs", results="results", workers=2)
        assert path == Path("results/table3-tiny.json")
    return folder
