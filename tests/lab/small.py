"""The lab at the size of tests/tiny.py: two layers of eight experts, some seconds a run."""

from __future__ import annotations

import copy

import tiny

from sigma_lite.lab import Arm, Experiment, Scale, Share

NEVER = 10**9


def scale(steps: int = 12, **changes: object) -> Scale:
    """The tiny run as a scale: paths are relative, so a test runs in the `place` that has its data."""
    settings = copy.deepcopy(tiny.SETTINGS)
    del settings["model"]["sparsity"], settings["trainer"]["default_root_dir"], settings["trainer"]["val_check_interval"]
    settings["seed_everything"], settings["trainer"]["max_steps"] = 0, steps
    for name, value in changes.items():
        section, key = name.split("__")
        settings[section][key] = value
    return Scale("tiny", "for tests", settings)


def sparsity(switch_step: int | Share) -> dict:
    return {"model": {"sparsity": {"head": [2], "switch_step": switch_step}}}


TOP1 = Arm("top-1", "one expert per token")
LOW2 = Arm("low 2", "two in layer 0, to the end", {**sparsity(NEVER), "save": {"milestones": [Share(0.5)]}})
CONVERTED = Arm("converted", "one from half of the run on", sparsity(Share(0.5)), branch=("low 2", 0.5))
SCRATCH = Arm("from scratch", "the same without the checkpoint", sparsity(Share(0.5)))
TABLE3 = Experiment("table3", "What does converting cost?", (TOP1, LOW2, CONVERTED), ("learning_curves", "final_table"))
TWO = Experiment("two", "Do two arms run side by side?", (TOP1, SCRATCH))
