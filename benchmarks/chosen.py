"""Which trained model a benchmark measures: `--model reference`, or a run's folder; on which text, `--data`."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sigma_lite.checkpoint import newest_whole
from sigma_lite.config import nearest, require
from sigma_lite.convert.calibrate import heldout, heldout_rows, training_rows
from sigma_lite.data.of_run import data_of
from sigma_lite.data.rows import Batch, together
from sigma_lite.model import Transformer
from sigma_lite.serve.imports import import_model
from sigma_lite.serve.trained import Trained

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PLACES = ("runs", "models")  # of the repository, where a bare name is looked for


def add_model(parser: argparse.ArgumentParser, text: bool = True, required: bool = True) -> None:
    """--model and --out, and --data where the benchmark needs a `text`."""
    help_ = "a finished run, or weights in Qwen3-MoE's format: a folder, or its name in runs/ or models/, such as reference"
    parser.add_argument("--model", type=folder_of, required=required, metavar="NAME_OR_RUN", help=help_)
    if text:
        parser.add_argument("--data", type=Path, help="prepared data (default: the run's; weights alone have none)")
    parser.add_argument("--out", type=Path, default=None)


def folder_of(name: str) -> Path:
    """The error of a name that is nowhere tells the nearest that there is."""
    found = [place for place in (Path(name), *(ROOT / place / name for place in PLACES)) if place.is_dir()]
    if found:
        return found[0]
    there = [path.name for place in PLACES for path in (ROOT / place).glob("*/") if path.is_dir()]
    close = nearest(name, there) if there else "nothing is there yet: train one, such as make toy"
    raise argparse.ArgumentTypeError(f"{name}: no such folder, nor in {' or '.join(PLACES)}; {close}")


def said(folder: Path) -> str:
    """The folder as a record's command names it: from the repository's root where it lies below, and its name otherwise."""
    inside = folder.resolve().is_relative_to(ROOT)
    return str(folder.resolve().relative_to(ROOT)) if inside else folder.name


def with_checkpoint(folder: Path) -> Path:
    """The folder, or a run made of the weights in it: experts that stay on disk are read from a checkpoint."""
    if newest_whole(folder) is not None:
        return folder
    run = Path(tempfile.mkdtemp(prefix="sigma-lite-"), folder.name)
    import_model(folder, run)
    return run


def opened(
    folder: Path, data: Path | None, rows: int, heldout_count: int
) -> tuple[Transformer, Callable[[int], list[Batch]], Callable[[Transformer], float]]:
    """(model, seed -> calibration rows, model -> held-out bits per byte of so many rows, spread over the text)."""
    trained = Trained(folder)
    place = data or trained.settings.get("corpus", {}).get("dir")
    require(place is not None, f"{folder} says nothing of its text: give --data, a folder that sigma-lite prepare has made")
    found = data_of(trained.settings, place)
    every = heldout_rows(found, per_batch=1)
    chosen = [every[at] for at in np.linspace(0, len(every) - 1, min(heldout_count, len(every))).astype(int)]
    batches = [together(chosen[first : first + 16]) for first in range(0, len(chosen), 16)]

    def rows_of(seed: int) -> list[Batch]:
        other = dataclasses.replace(found.rows, seed=found.rows.seed + 100 + seed)
        return training_rows(found._replace(rows=other), rows)

    return trained.model, rows_of, lambda model: round(heldout(model.eval(), batches)["bits_per_byte"], 5)
