"""The first cell of every chapter: the same seed, threads, precision and figures on every machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import plotly.io as pio
import torch

import sigma_lite
from sigma_lite.config import ConfigError
from sigma_lite.teach import style

FAST = "SIGMA_FAST"  # environment variable: three training steps instead of hundreds, for tests


class Chapter(NamedTuple):
    subject: str
    minutes: float  # of a full run on two CPU cores


CHAPTERS = {
    1: Chapter("text becomes rows", 2),
    2: Chapter("a dense decoder", 2),
    3: Chapter("many experts, few active", 2),
    4: Chapter("the router", 2),
    5: Chapter("a router collapses", 2),
    6: Chapter("the balance loss and its blind spot", 2),
    7: Chapter("balance over a global batch", 3),
    8: Chapter("the Top-1 loss", 2),
    9: Chapter("loss-free balance", 2),
    10: Chapter("progressive sparsification", 2),
    11: Chapter("why layer 0", 2),
    12: Chapter("the grouped matmul", 1),
    13: Chapter("tensor cores", 1),
    14: Chapter("experts on four machines", 2),
    15: Chapter("the 96-expert model on a cluster", 1),
    16: Chapter("a balance loss of your own", 2),
    17: Chapter("the family", 2),
}


def fast() -> bool:
    """True in a test run (SIGMA_FAST=1), where an experiment takes a few steps and proves nothing but that it runs."""
    return os.environ.get(FAST, "0") not in ("", "0")


def folder(name: str) -> str:
    """Where chapters keep prepared data: data/NAME of the repository, or of the working folder when installed alone."""
    root = Path(sigma_lite.__file__).parents[1]
    return str((root if (root / "pyproject.toml").exists() else Path.cwd()) / "data" / name)


def recorded(name: str) -> Path:
    """A file of the repository's results/: runs recorded once, of a size that no chapter can afford."""
    return Path(sigma_lite.__file__).parents[1] / "results" / name


def setup(*, chapter: int, version: str) -> None:
    """Seed, one CPU thread, float32 and the figures' look; prints what is in force and how long the chapter takes.

    Args:
        chapter: number of the notebook; also the seed.
        version: the package's major.minor version for which the notebook was written, such as "0.1".

    Raises: ConfigError when the installed package is not the one of the notebook.
    """
    if chapter not in CHAPTERS:
        raise ConfigError(f"chapter={chapter} does not exist; there are {min(CHAPTERS)} to {max(CHAPTERS)}")
    _same_version(version)
    torch.manual_seed(chapter)
    torch.set_num_threads(1)  # sums in one order on every machine, and toy matrices are too small to share
    torch.set_default_dtype(torch.float32)
    style.use()
    if "google.colab" not in sys.modules:  # Colab knows its own renderer
        pio.renderers["plotly_mimetype"].config = {"showSendToCloud": False, "plotlyServerURL": ""}  # figures stay here
        pio.renderers.default = "plotly_mimetype"
    subject, minutes = CHAPTERS[chapter]
    budget = "fast mode: a few steps, the numbers mean nothing" if fast() else f"about {minutes:g} min on two CPU cores"
    print(f"chapter {chapter}, {subject} · {budget}")
    print(f"sigma_lite {sigma_lite.__version__} · torch {torch.__version__} · cpu, 1 thread, float32 · seed {chapter}")


def _same_version(version: str) -> None:
    installed = ".".join(sigma_lite.__version__.split(".")[:2])
    if installed != version:
        raise ConfigError(
            f"this notebook was written for sigma_lite {version}, but {sigma_lite.__version__} is installed from"
            f" {os.path.dirname(sigma_lite.__file__)}; run `pip install -e .` in the folder that holds the notebook"
        )
