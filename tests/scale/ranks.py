"""Run a function on several gloo ranks, each a forked process of one thread."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def on_ranks(ranks: int, work: Callable[[int], object], folder: Path) -> list[object]:
    """What `work(rank)` returns on each of `ranks` processes that form a process group; fails if one of them fails."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    children = [_child(rank, ranks, work, folder) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    logs = "\n".join((folder / f"log-{rank}").read_text("utf-8") for rank in range(ranks))
    assert codes == [0] * ranks, f"{codes}\n{logs}"
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in range(ranks)]


def _child(rank: int, ranks: int, work: Callable[[int], object], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(folder / f"log-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  not pytest's
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
        torch.save(work(rank), folder / f"found-{rank}")
        dist.barrier()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
