"""The zip for a room: it holds what is committed, installs by the two lines that it names, and says what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the book's packages make the site")
pytest.importorskip("mdit_py_plugins")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book"))
import build  # noqa: E402
import classroom  # noqa: E402
import tried  # noqa: E402


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A site, executed chapters and wheels that are a word each."""
    for module in (build, classroom):
        monkeypatch.setattr(module, "BUILD", tmp_path)
        monkeypatch.setattr(module, "SITE", tmp_path / "html")
    monkeypatch.setattr(classroom, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(classroom, "reference", lambda: [])
    names = ["html/index.html", "html/slides/index.html", "html/.doctrees/a", "wheels/torch-2-cp311.whl"]
    names += [f"executed/{kind}/{path.name}" for kind in ("full", "fast") for path in build.chapters()]
    for name in [*names, "executed/fast/99_of_yesterday.ipynb"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_it_holds_what_is_committed_and_what_was_made(made):
    with zipfile.ZipFile(classroom.pack(False, made / "a.zip")) as archive:
        names = {name.removeprefix(f"{classroom.TOP}/") for name in archive.namelist()}
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {name for name in tracked.splitlines() if (ROOT / name).is_file()} <= names
        assert {"CLASSROOM.txt", "site/slides/index.html", "wheels/torch-2-cp311.whl", "constraints.txt"} <= names
        assert {f"executed/{path.name}" for path in build.chapters()} <= names
        assert not [name for name in names if "of_yesterday" in name or ".doctrees" in name or name.startswith("/")]
        assert archive.read(f"{classroom.TOP}/executed/06_balance_loss.ipynb") == b"executed/full/06_balance_loss.ipynb"


def test_equal_content_is_an_equal_file(made):
    first, second = (classroom.pack(False, made / name) for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == second.read_bytes()


def test_two_lines_install_it(made):
    with zipfile.ZipFile(classroom.pack(False, made / "a.zip")) as archive:
        archive.extractall(made / "room")
    typed = tried.steps(made / "room" / classroom.TOP)
    assert list(typed) == ["make an environment", "install", "run chapter 1"]
    assert f"{classroom.PYTHON} -m venv env" in typed["make an environment"]
    assert "pip install --no-index --find-links wheels -c constraints.txt -e " in typed["install"]
    extras = re.search(r'"\.\[([^]]+)\]"', typed["install"])[1]
    assert f'".[{extras}]" hatchling editables' in (ROOT / "Makefile").read_text("utf-8"), "these wheels are what is fetched"
    assert typed["run chapter 1"].endswith("jupyter execute notebooks/01_text_to_rows.ipynb")


def test_it_says_whether_a_model_came_with_it(made, monkeypatch):
    files = classroom.contents(False)
    assert "NOT IN THIS ZIP" in classroom.text(files, False)
    (made / "model.safetensors").write_bytes(b"0" * 2_500_000)
    monkeypatch.setattr(classroom, "reference", lambda: [made / "model.safetensors"])
    said = classroom.text(files, False)
    assert "2.5 MB" in said and "generate reference" in said and "NOT IN THIS ZIP" not in said
    (made / "CLASSROOM.txt").write_text(said, "utf-8")
    assert "generate reference" in tried.steps(made)["let the model write"]


def test_a_trial_build_says_that_its_numbers_mean_nothing(made):
    assert "TRIAL" in classroom.text(classroom.contents(True), True)
    assert "TRIAL" not in classroom.text(classroom.contents(False), False)


def test_without_wheels_there_is_no_zip(made):
    (made / "wheels" / "torch-2-cp311.whl").unlink()
    with pytest.raises(SystemExit, match="make classroom"):
        classroom.pack(False, made / "a.zip")
    assert not (made / "a.zip").exists()
