"""What tests of several rooms share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread adds in one order, so runs can be compared bitwise

import pytest
import tiny


@pytest.fixture(scope="session")
def corpus_and_data(tmp_path_factory) -> Path:
    """A folder with the tiny corpus in text/ and its tokens in prepared/. Do not write into it."""
    from sigma_lite import cli

    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["prepare", "-c", str(tiny.write_config(folder))])
    return folder


@pytest.fixture
def place(corpus_and_data, tmp_path, monkeypatch) -> Path:
    """A copy of it for one test, which runs there: paths in configs are relative."""
    shutil.copytree(corpus_and_data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(corpus_and_data, tmp_path_factory) -> Path:
    """A folder in which the tiny run was trained to its end, never interrupted. Do not write into it."""
    from sigma_lite import cli

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(corpus_and_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", "-c", "tiny.yaml"])
    return folder
