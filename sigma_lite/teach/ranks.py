"""Processes that stand for machines: a few of them, one thread each, that reach each other through gloo.

They are started afresh (spawn), so that they share nothing with the notebook, and kept, because starting costs seconds.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

import torch
import torch.distributed as dist

from sigma_lite.config import require

LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # nothing leaves this machine


class Ranks:
    """R processes in a process group. `run(work, *args)` calls `work(rank, *args)` on each and returns all results.

    Args:
        ranks: R.
        timeout_s: of the start, of every `run`, and of each exchange between ranks.

    Raises RuntimeError, in one sentence and with the rank's own traceback, when one of them fails, ends or keeps silent;
    the others are ended too.
    """

    def __init__(self, ranks: int, timeout_s: float = 600.0):
        require(ranks >= 1, f"ranks={ranks}: must be at least 1")
        self.timeout_s, self._folder = timeout_s, tempfile.TemporaryDirectory(prefix="sigma-ranks-")
        spawn, store = get_context("spawn"), str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, ranks, store, timeout_s, theirs), daemon=True)
            process.start()
            theirs.close()  # so that this end notices when the other is gone
            self._pipes.append(mine)
            self._processes.append(process)
        self._answers()

    def __len__(self) -> int:
        return len(self._processes)

    def run(self, work: Callable, *args: object) -> list:
        """What `work(rank, *args)` returned on each rank. Everything travels as a copy."""
        require(
            work.__module__ != "__main__",
            f"{work.__name__} is a function of this notebook, which other processes cannot see: put it into a module",
        )
        require(len(self) > 0, "these ranks have ended: start new ones")
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((work, args)))
        return self._answers()

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _answers(self) -> list:
        until, found = time.monotonic() + self.timeout_s, {}
        waiting = dict(zip(self._pipes, range(len(self)), strict=True))
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                self._fail(f"rank(s) {sorted(waiting.values())} did not answer within {self.timeout_s:g} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    problem, found[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self._fail(f"rank {rank} ended without an answer")
                if problem:
                    self._fail(f"rank {rank} failed:\n{problem}")
        return [found[rank] for rank in range(len(self))]

    def _fail(self, message: str) -> None:
        self.close()
        raise RuntimeError(message)


def _serve(rank: int, ranks: int, store: str, timeout_s: float, pipe: connection.Connection) -> None:
    """A rank's life: join the group, then answer until the notebook hangs up."""
    torch.set_num_threads(1)
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])

    def join() -> None:
        group = dist.FileStore(store, ranks)
        dist.init_process_group("gloo", store=group, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))

    _answer(pipe, join)
    while True:
        try:
            work, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return
        _answer(pipe, lambda work=work, args=args: work(rank, *args))


def _answer(pipe: connection.Connection, work: Callable[[], object]) -> None:
    try:
        answer = pickle.dumps(("", work()))
    except Exception:
        answer = pickle.dumps((traceback.format_exc(), None))
    pipe.send_bytes(answer)
