"""The smallest run that has everything: a schedule that switches, accumulation, load windows and validations."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

SETTINGS = {
    "model": {
        "net": {
            "vocab_size": 300,
            "n_layers": 2,
            "d_model": 32,
            "n_heads": 2,
            "n_kv_heads": 1,
            "head_dim": 16,
            "n_experts": 8,
            "d_expert": 16,
        },
        "sparsity": {"head": [2], "switch_step": 6},
        "balance": {"window_tokens": 700},
        "optim": {"lr": 0.003, "warmup_steps": 2},
    },
    "data": {
        "corpus": {"source": "files", "path": "text", "dir": "prepared", "heldout": 0.2},
        "rows": {"length": 32, "per_step": 8, "per_micro": 4},
    },
    "save": {"every": 2, "keep": 2},
    "trainer": {
        "max_steps": 12,
        "val_check_interval": 4,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": "run",
    },
}


def write_corpus(folder: Path) -> None:
    """24 small Python files, some 15 kB."""
    (folder / "text").mkdir(parents=True)
    for n in range(24):
        rules = (f'def rule_{n}_{i}(x):\n    """Add {i * n} to x."""\n    return x + {i * n}\n' for i in range(10))
        (folder / "text" / f"module_{n}.py").write_text(f"# module {n}\n" + "\n\n".join(rules))


def settings(**changes: object) -> dict:
    """SETTINGS with `section__key__key=value` changed, or taken away where the value is None."""
    result = copy.deepcopy(SETTINGS)
    for name, value in changes.items():
        *path, key = name.split("__")
        branch = result
        for part in path:
            branch = branch.setdefault(part, {})
        if value is None:
            branch.pop(key, None)
        else:
            branch[key] = value
    return result


def write_config(folder: Path, name: str = "tiny.yaml", **changes: object) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(settings(**changes)))
    return path


def refused(run: Callable[..., None], *args: str) -> int:
    """Exit code of a command: 0 where it ends well."""
    try:
        run([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody gets who asks for any, until this block and all processes that are forked in it have ended.

    Bound but not listened at: only who asks for this very port, as torch's store does, gets it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def child(args: list[str], prepare: Callable[[], object] = lambda: None) -> int:
    """Run a command in a forked process, after `prepare` has set a trap in it; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open("child.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  not pytest's
        prepare()
        from sigma_lite import cli

        cli.main(args)
        os._exit(0)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ending(pid: int, *expected: int) -> int:
    """A child's exit code, or minus the signal that ended it; by default only 0 and SIGKILL are expected."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (expected or (0, -signal.SIGKILL)), Path("child.log").read_text("utf-8")
    return code


def state(run: str | Path, step: int | None = None) -> dict:
    """A checkpoint; its settings as they were, without the parent, so that runs of other pasts can be compared."""
    from sigma_lite.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint

    found = read_checkpoint(checkpoint_path(run, step) if step else newest_checkpoint(run))
    settings = json.loads(found["settings"])
    settings.pop("parent", None)
    return {**found, "settings": settings}


def bare_trainer(out: Path, ranks: int, *, steps: int, micros: int, callbacks: list):
    """Lightning's, that trains and nothing else; with gloo where there are several ranks."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo") if ranks > 1 else "auto",
        accumulate_grad_batches=micros,
        use_distributed_sampler=False,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
