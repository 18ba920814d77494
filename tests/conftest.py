"""What tests of several rooms share, and what makes their results the same on every machine and in every order.

SIGMA_LITE_FUZZ=1000 draws so many new examples in each test of hypothesis that names no number, instead of the same ones.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
from hypothesis import HealthCheck, settings

ELSEWHERE = ("SLURM_", "TORCHELASTIC_", "SIGMA_LITE_BACKEND", "SIGMA_LITE_CUDA", "SIGMA_FAST", "TRITON_INTERPRET")
RANKS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


# Before anything imports torch, and for child processes too; a conftest of a folder below may import it before pytest is
# configured. One thread adds in one order, so runs can be compared bitwise; and a process whose torch has started threads,
# for more cores or for a GPU, cannot be forked.
for name in [name for name in os.environ if name.startswith(ELSEWHERE) or name in RANKS]:
    del os.environ[name]  # of a job that the tests run in, or of what was tried in this shell
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ["SIGMA_GUESSES"] = ""  # a reader's own guesses are no matter of tests
os.environ["COLUMNS"] = "80"  # a narrow terminal would cut numbers short
if Path("/sys/class/net/lo").exists():
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # otherwise gloo looks up the name of this machine, if it has one
if not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ["HOME"] = tempfile.mkdtemp(prefix="sigma-lite-home-")  # kernels and notebooks keep files there


CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}  # the machine may be busy
settings.register_profile("the same examples", derandomize=True, **CALM)
settings.register_profile("new examples", max_examples=int(os.environ.get("SIGMA_LITE_FUZZ", "100")), **CALM)
settings.load_profile("new examples" if "SIGMA_LITE_FUZZ" in os.environ else "the same examples")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    _seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    _seed(2)  # another than its fixtures, whose weights would be the same numbers as its inputs


def _seed(number: int) -> None:
    """A test that draws without a seed draws the same wherever it stands in the order."""
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


@pytest.fixture
def port(monkeypatch) -> int:
    """A port for ranks that Lightning starts."""
    with tiny.reserved_port() as number:
        monkeypatch.setenv("MASTER_PORT", str(number))
        yield number


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
