"""A polite kill ends a run between two steps, with a checkpoint; under SLURM the job is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import lightning.pytorch as pl
import torch

from sigma_lite.balance.pooled import sum_over_ranks
from sigma_lite.train.callbacks.diary import completes_step

REQUEUE = getattr(signal, "SIGUSR1", None)  # Windows has none
SIGNALS = tuple(filter(None, (REQUEUE, signal.SIGTERM)))  # the first wins: SLURM sends the second when the job is requeued


class Stopped(Exception):
    """The run was asked to stop, and its checkpoint is written."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopWhenAsked(pl.Callback):
    """SIGTERM: finish the step, save, stop. SIGUSR1, as `#SBATCH --signal=SIGUSR1@120` sends it: also `scontrol requeue`.

    The handler only takes a note. Lightning's would exchange tensors from inside it, in the middle of whatever the step is
    exchanging. Ranks may hear of the signal in different steps, or only one of them may, so after each step they agree.
    """

    def __init__(self) -> None:
        self.heard = 0  # the signal that this rank got
        self.agreed = 0  # the signal that some rank had got by the end of the last step

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.heard = self.agreed = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._hear)  # Lightning puts the former handlers back when it ends

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = number

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx):
            heard = torch.tensor([self.heard == number for number in SIGNALS], device=trainer.strategy.root_device)
            agreed = sum_over_ranks(heard.int()).tolist()
            self.agreed = next((number for number, ranks in zip(SIGNALS, agreed, strict=True) if ranks), 0)


def asked_to_stop(trainer: pl.Trainer) -> int:
    """The signal that asks this run to end, 0 for none; the same on all ranks."""
    return max((c.agreed for c in trainer.callbacks if isinstance(c, StopWhenAsked)), default=0)


def requeue() -> None:
    """Ask SLURM to start this job again, as it will anyhow after a failure of the machine."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    if job:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        subprocess.run(["scontrol", "requeue", f"{job}_{task}" if task else job], check=False)
