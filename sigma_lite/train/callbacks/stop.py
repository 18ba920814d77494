"""A polite kill or Ctrl-C ends a run between two steps, with a checkpoint; under SLURM the job is queued again."""

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

# The first that was heard wins: SLURM sends SIGTERM too when the job is requeued. Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM", "SIGINT") if hasattr(signal, name))
AGAIN = b"\nsigma-lite: finishing this step and saving; Ctrl-C again stops at once, back to the last checkpoint\n"


class Stopped(Exception):
    """The run was asked to stop, by a signal or (0) by whatever ends Lightning's fit early; its checkpoint is written."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name if number else "the fit was ended")
        self.number = number

    @property
    def requeue(self) -> bool:
        return self.number == getattr(signal, "SIGUSR1", None)


class StopWhenAsked(pl.Callback):
    """SIGTERM, Ctrl-C: finish the step, save, stop. SIGUSR1, as `#SBATCH --signal=SIGUSR1@120` sends it: also requeue.

    The handler only takes a note. Lightning's would exchange tensors from inside it, in the middle of whatever the step is
    exchanging. Ranks may hear of the signal in different steps, or only one of them may, so after each step they agree.
    """

    def __init__(self) -> None:
        self.heard: set[int] = set()  # the signals that this rank got
        self.agreed = 0  # the signal that some rank had got by the end of the last step

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.heard, self.agreed = set(), 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._hear)  # Lightning puts the former handlers back when it ends

    def _hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            if number in self.heard:
                raise KeyboardInterrupt
            os.write(2, AGAIN)  # not print: the handler may have interrupted one
        self.heard.add(number)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx):
            heard = torch.tensor([number in self.heard for number in SIGNALS], device=trainer.strategy.root_device)
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
