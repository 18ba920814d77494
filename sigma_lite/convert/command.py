"""`sigma-lite convert`: what the command takes and says."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SAYS = "Operate on a trained run: write another model of it as a new run, which trains, exports and reports like any."


def add_parser(sub: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    sub.add_argument("RUN", type=path, help="folder of the run, such as runs/toy")
    sub.add_argument("OUT", type=path, help="folder of the new run")
    sub.add_argument(
        "--with",
        dest="surgeries",
        action="append",
        nargs="+",
        required=True,
        metavar=("NAME", "KEY=VALUE"),
        help="a surgery and its settings, such as papers.dense2moe.TaylorSplit experts=12; several are done in order",
    )
    sub.add_argument("--rows", type=int, default=64, help="of the training text that a surgery may look at (default: 64)")
    sub.add_argument("--seed", type=int, default=0, help="of what a surgery draws (default: 0)")
    sub.add_argument("--data", type=path, help="the prepared data (default: the run's)")


def run(options: argparse.Namespace, facts: Mapping[str, Any]) -> None:
    """Carry it out. `facts`: where and by which code, for the new run's diary."""
    from sigma_lite.convert.surgery import named
    from sigma_lite.convert.write import convert

    surgeries = [named(words) for words in options.surgeries]
    given = [word for words in options.surgeries for word in ("--with", *words)]
    command = ["sigma-lite", "convert", str(options.RUN), str(options.OUT), *given]
    command += ["--rows", str(options.rows), "--seed", str(options.seed)]
    facts = {**facts, "command": shlex.join(command)}
    found = convert(
        options.RUN, options.OUT, surgeries, rows=options.rows, seed=options.seed, data=options.data, facts=facts
    )
    before, after = found["before"], found["after"]
    print(
        f"convert       {options.OUT}: held-out {before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f} bits per byte"
    )
    print(f"              experts {before['bytes'] / 1e6:.2f} -> {after['bytes'] / 1e6:.2f} MB")
    print(f"              go on training it: sigma-lite fit -c {options.OUT / 'run.yaml'}")
