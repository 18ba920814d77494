"""Which rows a step of a run was made of: their source, epoch and number, and the documents in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigma_lite.checkpoint import newest_whole, read_plain, read_settings
from sigma_lite.config import require
from sigma_lite.data.of_run import data_of
from sigma_lite.data.order import Begun
from sigma_lite.storage import StorageError


def rows_of_step(run: str | Path, step: int) -> list[dict[str, Any]]:
    """{source, epoch, row, documents} of each row, in the order in which micro-batches and ranks share them out.

    `epoch` counts how often the source was read as a whole before, `row` is the number of the row in it: its tokens begin at
    row * rows.length, but of conversations, of which a row holds whole ones. `source` is "corpus" in a run without a
    mixture. The run's data must lie where it was.

    Args:
        step: as the diary counts: the first is 1.

    Raises: ConfigError for a step before the run's own, and StorageError where there is no checkpoint or no data.
    """
    path = newest_whole(run)
    if path is None:
        raise StorageError(f"{run} holds no checkpoint: give the folder of a run that was trained, such as runs/toy")
    settings = read_settings(path)
    require("corpus" in settings, f"{run} was not trained here: nothing is known of its rows")
    end, parent = settings["trainer"]["max_steps"], settings.get("parent") or {}
    require(1 <= step <= end, f"step {step}: {run} has the steps 1 to {end}")
    before = parent.get("how") == "branch_from" and step <= parent["step"]
    require(not before, f"step {step} of {run} was made by {parent.get('run')}, from which it branched: ask that run")
    data, begun = data_of(settings), read_plain(path).get("TokenDataModule", {}).get("begun")
    of_source = data.parts("train")
    order = data.order([*of_source.values()], Begun(begun[0], tuple(begun[1])) if begun else None)
    found, names = order.origin(step - 1), list(of_source)
    rows = zip(*(part.tolist() for part in found), strict=True)
    return [
        {
            "source": names[source],
            "epoch": epoch,
            "row": row,
            "documents": data.prepared.sources[names[source]].documents_in(*of_source[names[source]].span(row)),
        }
        for source, epoch, row in rows
    ]
