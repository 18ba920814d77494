"""`sigma-lite fit` on several ranks, as torchrun would start them: forked processes that find each other by a port."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import record
from sigma_lite.checkpoint import read_checkpoint
from sigma_lite.scale.strategy import ExpertParallel  # here, so that forked ranks need not import it again

STRATEGY = f"{ExpertParallel.__module__}.{ExpertParallel.__name__}"
PATIENCE_S = 600  # for the other ranks, on a busy machine
PER_MICRO = 8  # rows of all ranks together: the pooled counts of each micro-batch are then the same in every layout


def fit(ranks: int, expert_ranks: int = 1, trap: Callable[[int], None] = lambda rank: None, **changes) -> list[int]:
    """Exit codes of the ranks (minus the signal, where one ended it) of the tiny run in this folder."""
    return endings(start(ranks, expert_ranks, trap, **changes))


def start(ranks: int, expert_ranks: int = 1, trap: Callable[[int], None] = lambda rank: None, **changes) -> list[int]:
    """Process ids, by rank. `trap(rank)` is called first in each; `changes` are keys of the yaml file.

    `command` is the command, `timeout_s` and `strategy` arguments of the strategy.
    """
    command = changes.pop("command", "fit")
    options = {"expert_parallel": expert_ranks, "timeout_s": changes.pop("timeout_s", PATIENCE_S)}
    options |= changes.pop("strategy", {})
    strategy = {"class_path": STRATEGY, "init_args": options}
    parallel = {"trainer__strategy": strategy, "trainer__devices": ranks} if ranks > 1 else {}
    name = f"{ranks}x{expert_ranks}.yaml"
    tiny.write_config(Path(), name, **{**parallel, "data__rows__per_micro": PER_MICRO // ranks, **changes})

    def place(rank: int, port: int) -> Callable[[], None]:
        def prepare() -> None:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            trap(rank)

        return prepare if ranks > 1 else lambda: trap(0)

    Path("child.log").unlink(missing_ok=True)
    with tiny.reserved_port() as port:
        return [tiny.child([command, "-c", name], place(rank, port)) for rank in range(ranks)]


def endings(pids: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def done(codes: Sequence[int]) -> None:
    assert set(codes) == {0}, f"{codes}\n{Path('child.log').read_text('utf-8')}"


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


def furthest(a: Path, b: Path) -> float:
    """The largest difference of any weight in two checkpoints."""
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def curve(run: Path) -> list[list[float]]:
    """Every step's loss, terms (lm, global LBL, z) and gradient norm."""
    return [[e["loss"], *e["terms"].values(), e["grad_norm"]] for e in record.read(run / "record.jsonl", "step")]


def run_each(folder: Path, corpus_and_data: Path, layouts: Iterable[tuple[int, int]], **settings: object) -> Path:
    """A run of one device and of each layout in a folder, named 1x1, 4x2 and so on, by ranks and expert ranks."""
    shutil.copytree(corpus_and_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for ranks, expert_ranks in [(1, 1), *layouts]:
            done(fit(ranks, expert_ranks, trainer__default_root_dir=f"{ranks}x{expert_ranks}", **settings))
    return folder
