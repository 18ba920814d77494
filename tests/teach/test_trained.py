"""The model that chapters look into: stored where there is one, else trained once and kept as a run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from sigma_lite.serve.marked import heldout, route
from sigma_lite.teach import practice, session, trained


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SIGMA_FAST", "1")
    for user in (sys.modules["sigma_lite.teach.trained"], practice):  # the function hides its file
        monkeypatch.setattr(user, "folder", lambda name: str(tmp_path / name))
    return tmp_path


def test_a_small_model_is_trained_once_and_is_a_run(here, monkeypatch, capsys):
    first = trained(fresh=True)
    assert "trained here for 3 steps" in capsys.readouterr().out and session.fast()
    monkeypatch.setattr(practice, "train", lambda *args: pytest.fail("it is kept"))
    again = trained(fresh=True)
    one, other = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    marked = heldout(again, tokens=300)
    assert len(route(again, marked).experts) == 3, "its held-out text is at hand"
    assert "".join(again.continue_text("import", 5)), "and it writes"


def test_what_is_stored_is_taken(here, finished, monkeypatch, capsys):
    monkeypatch.chdir(here)
    shutil.copytree(finished / "run", here / "reference")
    assert trained().step == 12 and "the reference model, step 12" in capsys.readouterr().out
    assert trained(fresh=True).step == 3
