"""Each record of surgery and offloading is made anew by one command with --model: tried on the tiny run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from sigma_lite import cli

ROOT = Path(__file__).parents[2]
FEW = ("--heldout", "4", "--steps", "2")
COMMANDS = {
    "compression.py": ("--model", "run", "--rows", "8", *FEW),
    "new_modules.py": ("--model", "run", *FEW),
    "dense2moe.py": ("--model", "dense", "--rows", "8", "--seeds", "1", *FEW),
}


def test_a_model_that_is_nowhere_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import chosen

    monkeypatch.setattr(chosen, "ROOT", tmp_path)
    (tmp_path / "models" / "reference").mkdir(parents=True)
    assert chosen.folder_of("reference") == tmp_path / "models" / "reference"
    assert chosen.said(tmp_path / "models" / "reference") == "models/reference"
    with pytest.raises(argparse.ArgumentTypeError, match="nor in runs or models; did you mean 'reference'"):
        chosen.folder_of("refrence")


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_one_command_records_it(place, script):
    dense = {"model__net__n_experts": 1, "model__net__d_expert": 32, "model__sparsity": None}
    dense |= {"model__balance": {"loss": "none", "z_weight": 0.0}, "trainer__default_root_dir": "dense"}
    own = dense if script == "dense2moe.py" else {"model__net__top_k": 2}
    tiny.write_config(place, "own.yaml", trainer__max_steps=8, **own)
    cli.main(["fit", "-c", "own.yaml"])
    command = [sys.executable, ROOT / "benchmarks" / script, *COMMANDS[script], "--out", "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(Path("found.json").read_text("utf-8"))
    assert f"python benchmarks/{script} --model " in facts["command"] and str(place) not in facts["command"]
    if script == "compression.py":
        kinds = {row["kind"]: row for row in facts["rows"]}
        assert {"blocks dropped", "blocks skipped by tokens"} <= kinds.keys()
        assert kinds["blocks skipped by tokens"]["flops"] < 0.8 * kinds["whole"]["flops"]
        assert "MFLOP per token" in Path("found.html").read_text("utf-8")
