"""One run of the lab, in this process: begin it or go on where it was cut off, train, then measure held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigma_lite.config import ConfigError, require
from sigma_lite.runfile import load_run
from sigma_lite.storage import RUN_LOCK, StorageError, exclusive
from sigma_lite.train.branch import branch
from sigma_lite.train.run import RunCLI


def train(yaml: str | Path, parent: tuple[Path, int] | None = None, own: Any = None, parts: Any = None) -> None:
    """Train what RUN/run.yaml describes and measure it on held-out text. A finished run is left alone.

    One process at a time works in a run's folder; a second one waits, and goes on where the first one ended. So a lab
    that is started again does not disturb the workers that a killed one left behind.

    Args:
        parent: (run, optimizer step) to begin from instead of from the start.
        own: a balancer that exists only in this process.
        parts: a `Parts` that does.
    """
    yaml = Path(yaml)
    waiting = f"another process is at work in {yaml.parent}: waiting for it"
    with exclusive(yaml.with_name(RUN_LOCK), waiting=waiting):
        if parent is not None:
            branch(*parent, yaml.parent, load_run([yaml]).sparsity)
        with RunCLI(["fit", "-c", str(yaml)], own=own, parts=parts) as cli:
            require(cli.finished, cli.where_it_stopped())
            cli.validate_at_end()


def main(yaml: str, parent: str = "", step: str = "") -> None:
    """`train` as a process: what cannot work ends in one sentence, which is then the last line of the run's log."""
    try:
        train(yaml, (Path(parent), int(step)) if parent else None)
    except (ConfigError, StorageError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
