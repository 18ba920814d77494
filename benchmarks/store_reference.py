"""Store a finished run as the model that comes with the package: `sigma-lite generate reference` finds it.

Experts as int8, tokenizer and model card as `sigma-lite export RUN OUT --dtype int8` writes them; beside them recipe.yaml,
the config of the run, and record.json: what it was trained by and on, its validations, and what the stored weights score on
the held-out text, by kind of token and by domain. Refuses what takes more than 16 MB. Needs the prepared data of the run.

    python benchmarks/store_reference.py runs/reference --config scaled_configs/reference.yaml [--out sigma_lite/reference]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from sigma_lite import record
from sigma_lite.config import require
from sigma_lite.runfile import load_run
from sigma_lite.serve.export import export
from sigma_lite.serve.imports import RECIPE, RECORD
from sigma_lite.serve.inside import costs
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import REFERENCE, write_json

ROOT = Path(__file__).parents[1]
MOST = 16_000_000  # bytes of all files together
OF_THE_RUN = ("time", "commit", "device", "versions")  # of what a run's record says at its start


def store(run: Path, config: Path, out: Path, tokens: int | None = None) -> dict:
    """Write the folder `out` and return its record; `tokens` of the held-out text are scored, None: all."""
    trained, whole = Trained(run), load_run([config])
    require(trained.step == whole.trainer["max_steps"], f"{run} stands at step {trained.step}: let it end first")
    require(trained.model.config == whole.net, f"{config} is not the config of {run}")
    entries = record.read(run / "record.jsonl")
    starts = [entry for entry in entries if entry["kind"] == "run"]
    before = costs(trained, None, tokens)
    export(run, out, dtype="int8")
    shutil.copy(config, out / RECIPE)
    keys = ("step", "bits_per_byte", "loss")
    facts = {
        "step": trained.step,
        "tokens": whole.rows.before(trained.step) * whole.rows.length,
        "starts": len(starts),
        **{name: starts[0][name] for name in OF_THE_RUN},
        "data": starts[-1]["data"],  # as it is now
        "validations": [{k: e[k] for k in keys if k in e} for e in entries if e["kind"] == "validation"],
        "skipped": [entry for entry in entries if entry["kind"] == "event"],
        "heldout_before_rounding": before["bits_per_byte"],
    }
    write_json(out / RECORD, facts)
    write_json(out / RECORD, facts | {"heldout": costs(Trained(out), None, tokens)})
    size = sum(path.stat().st_size for path in out.iterdir())
    require(size <= MOST, f"{out} takes {size / 1e6:.1f} MB, and {MOST / 1e6:.0f} are allowed: a smaller model is needed")
    return json.loads((out / RECORD).read_bytes()) | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("RUN", type=Path, help="folder of the finished run")
    parser.add_argument("--config", type=Path, default=ROOT / "scaled_configs" / "reference.yaml", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "sigma_lite" / REFERENCE, help="a new folder (%(default)s)")
    options = parser.parse_args()
    found = store(options.RUN, options.config, options.out)
    rounded = found["heldout"]["bits_per_byte"]
    print(f"stored        {options.out}: {found['bytes'] / 1e6:.1f} MB")
    print(f"held-out      {rounded:.4f} bits per byte, {found['heldout_before_rounding']:.4f} before rounding")


if __name__ == "__main__":
    main()
