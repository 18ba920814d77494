"""Messages, bytes, host waits and seconds of a training step, for each way in which tokens travel to experts.

Gloo processes on one machine, forward and backward of two layers. Seconds are the slowest rank's, by the clock, in rounds
that take turns; several processes share the cores, so they say little about a network. Messages, bytes and waits are exact.
Writes results/bench/exchange-MACHINE.json.

    python benchmarks/exchange.py [--ranks 4] [--rounds 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path

import torch
from exchange_ranks import WAYS, measured

from sigma_lite.storage import write_json
from sigma_lite.teach.ranks import Ranks
from sigma_lite.train.provenance import device_name, git_commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    ranks = Ranks(options.ranks)
    found = ranks.run(measured, options.rounds)
    ranks.close()
    ways = {}
    for name in WAYS:
        slowest = [max(times) for times in zip(*(rank[name]["seconds"] for rank in found), strict=True)]
        ways[name] = found[0][name]["row"] | {"median_s": round(statistics.median(slowest), 4)}
        print(name, ways[name])
    facts = {"what": __doc__.split("\n")[0], "command": f"python benchmarks/exchange.py --ranks {options.ranks}"}
    facts |= {
        "backend": "gloo",
        "ranks": options.ranks,
        "device": device_name(torch.device("cpu"), options.ranks),
        "commit": git_commit(),
    }
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    out = options.out or Path(__file__).parents[1] / "results" / "bench" / f"exchange-{machine}.json"
    write_json(out, facts | {"ways": ways})


if __name__ == "__main__":
    main()
