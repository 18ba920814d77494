"""Does a kind of expert that learns slowly starve, and does alignment before it competes help? sigma_lite/papers/astrea.py.

Share of each type's tokens that go to the kind which can do them, at several steps, three seeds: without alignment, aligned
on tokens of its own type, aligned on all tokens. Writes results/bench/astrea.json; the same numbers on every CPU but for
rounding.

    python benchmarks/astrea.py [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sigma_lite.papers.astrea import KINDS, run
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit

ARMS = {"no alignment": {}, "own tokens": {"align": 150}, "all tokens": {"align": 150, "on": "all"}}
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench" / "astrea.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for arm, settings in ARMS.items():
        for seed in SEEDS:
            measured = run(seed, **settings)
            right, error = ([[round(v, 3) for v in row] for row in table] for table in (measured.right, measured.error))
            found.setdefault(arm, []).append({"seed": seed, "steps": measured.steps, "right": right, "error": error})
            print(arm, seed, "step 100", right[measured.steps.index(100)], "end", right[-1], flush=True)
    facts = {
        "what": " ".join(__doc__.split("\n\n")[0].split()),
        "command": "python benchmarks/astrea.py",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "kinds": KINDS,
        "arms": found,
    }
    write_json(options.out, facts)


if __name__ == "__main__":
    main()
