"""What a run is refused for before any work starts, by `fit` and by `plan` alike. Nothing here imports Lightning or torch:
names and types of arguments are read from the source of the classes that take them.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from sigma_lite.config import nearest, require, require_finite
from sigma_lite.runfile import RunConfig, load_run, overlay, read_yaml, type_name, value_fits
from sigma_lite.scale.layout import precision_named, strategy_config

FIXED = {  # keys of Lightning's trainer that would change what a step is, and what to set instead
    "accumulate_grad_batches": "it is data.rows.per_step / (per_micro * ranks)",
    "check_val_every_n_epoch": "set val_check_interval, in optimizer steps",
    "limit_train_batches": "set max_steps",
    "overfit_batches": "set max_steps, and prepare a smaller corpus",
    "fast_dev_run": "set max_steps=1",
    "use_distributed_sampler": "the data module gives every rank its own rows",
    "limit_val_batches": "held-out numbers are of all held-out text; set val_check_interval",
    "limit_test_batches": "held-out numbers are of all held-out text",
    "limit_predict_batches": "predictions are of all held-out text",
    "min_epochs": "a run is one pass over its max_steps; set min_steps",
}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
PACKAGE = Path(__file__).parents[1]
SIMPLE = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple, "Optional": Optional, "Union": Union}


def check(files: Sequence[str], over: Mapping[str, object], to_the_end: bool) -> RunConfig:
    """The settings; ConfigError for the first that cannot work, with the nearest that can.

    Args:
        over: groups of keys laid over the files: see runfile.overrides.
        to_the_end: the settings are for a whole run, whose end must be known.
    """
    run = load_run(files, over)
    merged: dict = {}
    for part in (*map(read_yaml, files), dict(over)):
        for section, (file, name) in _sections().items():
            check_keys(section, part.get(section) or {}, parameters(file, name))
        merged = overlay(merged, part)
    trainer, save = merged.get("trainer") or {}, merged.get("save") or {}
    check_trainer(trainer, to_the_end)
    check_save(save.get("every", 100), save.get("keep", 2))
    if to_the_end:
        check_saved_end(save.get("every", 100), trainer["max_steps"])
    workers, kind = (merged.get("data") or {}).get("num_workers", 0), parameters(_datamodule(), "TokenDataModule")
    _check_type("data.num_workers", workers, kind["num_workers"])
    require(workers >= 0, f"data.num_workers={workers}: must be 0 or more processes")
    return run


def check_keys(section: str, given: object, known: Mapping[str, object]) -> None:
    """Names and, where they are plain, types of one section's keys."""
    require(isinstance(given, Mapping), f"{section} must be a group of keys, not {given!r}")
    for key, value in given.items():
        require(key in known, f"unknown key {section}.{key}; {nearest(key, known)}")
        require(section != "trainer" or key not in FIXED, _fixed(key, value))
        _check_type(f"{section}.{key}", value, known[key])
        require_finite(f"{section}.{key}", value)


def check_trainer(trainer: Mapping[str, Any], to_the_end: bool) -> None:
    """Values of Lightning's own keys that it, or this package, would refuse later."""
    last = trainer.get("max_steps", -1)
    lasts = "learning rate and schedule need the end of the run"
    require(last > 0 or not to_the_end, f"trainer.max_steps={last}: set trainer.max_steps to at least 1; {lasts}")
    interval = trainer.get("val_check_interval")
    whole = interval is None or (type(interval) is int and interval > 0)
    require(whole, f"trainer.val_check_interval={interval}: give a whole number of optimizer steps, at least 1")
    clip = trainer.get("gradient_clip_val")
    negative = isinstance(clip, (int, float)) and clip < 0
    require(not negative, f"trainer.gradient_clip_val={clip}: must be 0 or more; 0 and null clip nothing")
    limit = trainer.get("max_time")
    for unit, amount in limit.items() if isinstance(limit, Mapping) else ():
        negative = isinstance(amount, (int, float)) and amount < 0
        require(not negative, f"trainer.max_time.{unit}={amount}: must be 0 or more")
    epochs = trainer.get("max_epochs")
    none = type(epochs) is int and epochs != -1 and epochs < 1
    require(not none, f"trainer.max_epochs={epochs}: nothing would be trained; leave it out, and set max_steps")
    precision_named(trainer.get("precision"))
    accelerator = trainer.get("accelerator", "auto")
    known = not isinstance(accelerator, str) or accelerator in ACCELERATORS
    require(known, f"trainer.accelerator={accelerator} does not exist; {nearest(str(accelerator), ACCELERATORS)}")
    for key, special in (("num_nodes", ()), ("devices", (-1,))):
        count = trainer.get(key, 1)
        require(not isinstance(count, int) or count > 0 or count in special, f"trainer.{key}={count}: must be at least 1")
    strategy_config(trainer.get("strategy"))


def check_save(every: int, keep: int) -> None:
    require(every >= 1, f"save.every={every}: must be at least 1 optimizer step")
    require(keep >= 2, f"save.keep={keep}: keep at least 2, so that a damaged one is not the only one")


def check_saved_end(every: int, last: int) -> None:
    """The last of `last` optimizer steps must be one that is saved."""
    require(
        last % every == 0,
        f"save.every={every} does not divide trainer.max_steps={last}, so the end would not be saved;"
        f" try save.every={next((n for n in range(every, 0, -1) if last % n == 0), 1)}",
    )


# ------------------------------------------------------------------------------------------------------- from sources


@functools.cache
def parameters(file: Path, name: str) -> dict[str, object]:
    """{argument: type} of a class's __init__; None where its type is not made of plain ones."""
    tree = ast.parse(file.read_text("utf-8"))
    made = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    init = next(n for n in made.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    arguments = [*init.args.args, *init.args.kwonlyargs]
    return {a.arg: _plain_type(a.annotation) for a in arguments if a.arg != "self"}


def _plain_type(annotation: ast.expr | None) -> object:
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation else {"unknown"}
    if not names <= SIMPLE.keys():
        return None
    return eval(ast.unparse(annotation), {"__builtins__": {}}, SIMPLE)  # names of types and nothing else


def _sections() -> dict[str, tuple[Path, str]]:
    """Where the class lies that takes a section's keys."""
    found = importlib.util.find_spec("lightning")
    require(found is not None, "Lightning is not installed here, and says which keys a trainer has: pip install -e .")
    lightning = Path(found.origin).parent
    callbacks = PACKAGE / "train" / "callbacks"
    return {
        "trainer": (lightning / "pytorch" / "trainer" / "trainer.py", "Trainer"),
        "save": (callbacks / "save.py", "Save"),
        "spike_guard": (callbacks / "spike_guard.py", "SpikeGuard"),
    }


def _datamodule() -> Path:
    return PACKAGE / "data" / "datamodule.py"


def _check_type(name: str, value: object, kind: object) -> None:
    require(kind is None or value_fits(value, kind), f"{name}={value}: expected {type_name(kind)}")


def _fixed(key: str, value: object) -> str:
    return f"trainer.{key}={value} cannot be chosen: leave it out; {FIXED.get(key)}"
