"""A guess survives Run All, a late look, another kernel, and a notebook that is opened again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from sigma_lite.teach import predict

guesses = importlib.import_module("sigma_lite.teach.predict")  # the package has a function of that name
ROOT = Path(__file__).parents[2]


def test_a_guess_is_kept_when_its_cell_is_run_again():
    first = predict("how many?", ["one", "two"])
    first.children[1].value = "two"
    assert predict("how many?", ["one", "two"]).guess == "two"
    assert predict("how many?", ["none"]).guess is None and predict("another?", ["one", "two"]).guess is None


def test_a_comparison_follows_a_guess_that_comes_late_also_from_a_cell_run_again():
    first = predict("how late?", ["one", "two"])
    shown = first.compare("1.5")
    assert "none yet" in shown.value
    first.children[1].value = "two"
    assert ">two<" in shown.value and "1.5" in shown.value
    predict("how late?", ["one", "two"]).children[1].value = "one"
    assert ">one<" in shown.value
    predict("how early?", ["one", "two"]).children[1].value = "two"
    assert ">one<" in shown.value


def test_a_guess_is_found_again_by_another_kernel(tmp_path, monkeypatch):
    file = tmp_path / "data" / "guesses.json"
    monkeypatch.setenv(guesses.GUESSES, str(file))
    predict("tomorrow?", ["one", "two"]).children[1].value = "two"
    predict("and then?", ["one", "two"]).children[1].value = "one"
    monkeypatch.setattr(guesses, "_kept", {})
    assert predict("tomorrow?", ["one", "two"]).guess == "two" and predict("and then?", ["one", "two"]).guess == "one"


@pytest.mark.parametrize("content", ["", "[1]", "null", '{"a', b"\xff"])
def test_a_damaged_file_of_guesses_disturbs_nobody(tmp_path, monkeypatch, content):
    file = tmp_path / "guesses.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv(guesses.GUESSES, str(file))
    monkeypatch.setattr(guesses, "_kept", {})
    question = predict("damaged?", ["one", "two"])
    question.children[1].value = "two"
    monkeypatch.setattr(guesses, "_kept", {})
    assert predict("damaged?", ["one", "two"]).guess == "two"


def test_guesses_that_cannot_be_written_stay_in_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(guesses.GUESSES, str(tmp_path / "file" / "guesses.json"))
    predict("nowhere?", ["one", "two"]).children[1].value = "two"
    assert predict("nowhere?", ["one", "two"]).guess == "two"


def test_an_installed_package_tells_jupyterlab_to_save_widgets():
    """Without their state a notebook that is opened again shows an error in the place of each guess and slider."""
    shared = '"sigma_lite/teach/jupyter" = "etc/jupyter"'
    assert f"[tool.hatch.build.targets.wheel.shared-data]\n{shared}\n" in (ROOT / "pyproject.toml").read_text("utf-8")
    (file,) = (ROOT / "sigma_lite/teach/jupyter/labconfig/default_setting_overrides.d").iterdir()
    assert json.loads(file.read_bytes())["@jupyter-widgets/jupyterlab-manager:plugin"] == {"saveState": True}


def test_jupyterlab_reads_it(monkeypatch, tmp_path):
    settings = pytest.importorskip("jupyterlab_server.settings_utils")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(ROOT / "sigma_lite/teach/jupyter"))
    found, error = settings._get_overrides(str(tmp_path))
    assert not error and found["@jupyter-widgets/jupyterlab-manager:plugin"]["saveState"] is True
