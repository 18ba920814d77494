"""Compare the checksums of large token files while training goes on: a disk that lies is found in minutes, not never."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import lightning.pytorch as pl

from sigma_lite.data.verified import unverified, verify
from sigma_lite.scale.background import Background
from sigma_lite.train.callbacks.diary import completes_step


class VerifyData(pl.Callback):
    """On the first rank, once for each file. What is found altered ends the run after the step, before its checkpoint.

    What is not read when the run ends is read in the next one.
    """

    def __init__(self) -> None:
        self._reader, self._stop = Background(), threading.Event()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        prepared = getattr(trainer.datamodule, "prepared", None)
        sources = prepared.sources.values() if trainer.is_global_zero and prepared else ()
        unread = [(source.dir, files) for source in sources if (files := unverified(source))]
        self._stop.clear()
        if unread:
            sizes = [entry["bytes"] for _, files in unread for entry in files]
            size = f"{len(sizes)} large files ({sum(sizes) / 1e9:.1f} GB)"
            print(f"data          comparing the checksums of {size} beside the training")
            self._reader(lambda: [verify(folder, files, self._stop.is_set) for folder, files in unread])

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx) and self._reader.failed:
            self._reader.wait()

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._stop.set()
        self._reader.wait()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self._stop.set()
        with contextlib.suppress(Exception):
            self._reader.wait()
