"""A worker as a fork of this process instead of a new one: Lightning is imported already, which costs seconds."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from sigma_lite.lab import worker
from sigma_lite.lab.experiment import Run
from sigma_lite.lab.run import written_yaml


class Forked:
    """What the lab uses of subprocess.Popen."""

    def __init__(self, does: Callable[[], object], log: Path):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
            os.dup2(2, 1)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  not pytest's
            does()
            os._exit(0)
        except SystemExit as end:
            print(end.code)
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        return self._wait(0)

    def send_signal(self, which: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, which)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def start(run: Run) -> Forked:
    """Instead of sigma_lite.lab.run._start."""
    parent = [str(run.branch[0]), str(run.branch[1])] if run.branch else []
    path = written_yaml(run)
    return Forked(lambda: worker.main(str(path), *parent), run.dir / "log.txt")
