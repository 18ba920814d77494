"""Where a number comes from: commit, code, machine; nothing is recorded as clean that is not, or as ours that is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sigma_lite import record
from sigma_lite.config import ModelConfig
from sigma_lite.identity import package_code
from sigma_lite.train.provenance import experts_backend, git_commit, instructions

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="asks git")


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", "-C", str(folder), *who, *command], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    package = tmp_path / "lib"
    (package / "model").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for file in ("lib/__init__.py", "lib/model/router.py", "results/a.json", "notes.md"):
        (tmp_path / file).write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return package


def test_a_clean_tree_has_its_commit(checkout):
    assert git_commit(checkout) == git(checkout, "rev-parse", "--short=12", "HEAD").strip()


@pytest.mark.parametrize(
    ("file", "dirty"),
    [
        ("lib/model/router.py", True),
        ("lib/new.py", True),  # a file that git does not know yet trains all the same
        ("results/a.json", False),  # or the second of two recordings would be marked for what the first one wrote
        ("results/b.json", False),
        ("notes.md", False),
    ],
)
def test_what_marks_a_tree_as_dirty(checkout, file, dirty):
    (checkout.parent / file).write_text("x = 2\n")
    assert git_commit(checkout).endswith("-dirty") == dirty


def test_installed_inside_a_checkout_of_something_else_it_has_no_commit(checkout):
    installed = checkout.parent / ".venv" / "sigma_lite"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (checkout.parent / ".gitignore").write_text(".venv\n")
    assert git_commit(installed) is None and git_commit(checkout.parent / "nowhere") is None


def test_a_start_records_code_cpu_and_backend(finished):
    (start,) = record.read(finished / "run" / "record.jsonl", "run")
    assert start["code"] == package_code() and start["cpu"]["instructions"] == instructions() != ""
    assert start["cpu"]["model"] in start["device"] and start["experts"]["backend"] and start["experts"]["why"]


def test_a_backend_that_falls_back_says_why():
    assert experts_backend(torch.device("cpu"), ModelConfig(d_expert=10, d_model=24), 8, "32-true")["backend"] == "loop"
    why = experts_backend(torch.device("cpu"), ModelConfig(d_expert=12, d_model=24), 8, "32-true")
    assert why["backend"] == "grouped" and "not a multiple of 16" in why["why"]
