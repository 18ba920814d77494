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
    title: str  # a few words for tables of contents
    subject: str
    minutes: float  # of a full run on two CPU cores
    seed: int  # stays with the text: its sentences were written for what this seed prints


# all that are planned; those without a notebook are not written yet
CHAPTERS = {
    1: Chapter("Rows", "text becomes rows", 1, seed=1),
    2: Chapter("Decoder", "a dense decoder", 2, seed=2),
    3: Chapter("Is it worth it?", "many experts, few active", 2, seed=3),
    4: Chapter("Router", "the router", 2, seed=4),
    5: Chapter("Collapse", "what a router does if nobody balances it", 2, seed=5),
    6: Chapter("Balance loss", "the balance loss and its blind spot", 1, seed=6),
    7: Chapter("Global batch", "balance over a global batch", 2, seed=7),
    8: Chapter("Top-1 loss", "the Top-1 loss", 2, seed=8),
    9: Chapter("A bias as a price", "loss-free balance", 2, seed=9),
    10: Chapter("How far a bias drifts", "how far a bias drifts", 2, seed=10),
    11: Chapter("Sparsification", "progressive sparsification", 2, seed=10),
    12: Chapter("Why layer 0", "why layer 0", 1, seed=11),
    13: Chapter("Your own loss", "a balance loss of your own", 2, seed=16),
    14: Chapter("The family", "the family", 2, seed=17),
    15: Chapter("What experts know", "what experts know", 2, seed=15),
    16: Chapter("Grouped matmul", "the grouped matmul", 1, seed=12),
    17: Chapter("Tensor cores", "tensor cores", 1, seed=13),
    18: Chapter("CUDA", "a kernel in CUDA C++", 1, seed=18),
    19: Chapter("Expert parallel", "experts on four machines", 1, seed=14),
    20: Chapter("On a cluster", "the 96-expert model on a cluster", 1, seed=15),
    21: Chapter("After pretraining", "after pretraining", 3, seed=21),
    22: Chapter("Serving it", "serving it", 2, seed=22),
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
        chapter: number of the notebook.
        version: the package's major.minor version for which the notebook was written, such as "0.1".

    Raises: ConfigError when the installed package is not the one of the notebook.
    """
    if chapter not in CHAPTERS:
        raise ConfigError(f"chapter={chapter} does not exist; there are {min(CHAPTERS)} to {max(CHAPTERS)}")
    _same_version(version)
    torch.manual_seed(CHAPTERS[chapter].seed)
    torch.set_num_threads(1)  # sums in one order on every machine, and toy matrices are too small to share
    torch.set_default_dtype(torch.float32)
    style.use()
    if "google.colab" not in sys.modules:  # Colab knows its own renderer
        pio.renderers["plotly_mimetype"].config = {"showSendToCloud": False, "plotlyServerURL": ""}  # figures stay here
        pio.renderers.default = "plotly_mimetype"
    _, subject, minutes, seed = CHAPTERS[chapter]
    budget = "fast mode: numbers mean nothing" if fast() else f"about {minutes:g} min on two CPU cores"
    print(f"chapter {chapter}, {subject} · {budget}")
    print(f"sigma_lite {sigma_lite.__version__} · torch {torch.__version__} · cpu, 1 thread, float32 · seed {seed}")


def _same_version(version: str) -> None:
    installed = ".".join(sigma_lite.__version__.split(".")[:2])
    if installed != version:
        raise ConfigError(
            f"this notebook was written for sigma_lite {version}, but {sigma_lite.__version__} is installed from"
            f" {os.path.dirname(sigma_lite.__file__)}; run `pip install -e .` in the folder that holds the notebook"
        )
