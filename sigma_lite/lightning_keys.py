"""The keys of a run that Lightning, or a class named in yaml, gives a meaning: which there are, and what they may be.

Lightning would check them too, but after seconds of imports, after the data was prepared, or not at all. Here nothing is
imported: signatures are read from source, so `plan` and `fit` refuse the same, at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sigma_lite.config import OPTIMIZERS, SCHEDULES, class_named, nearest, require, require_finite
from sigma_lite.signatures import REQUIRED, classes_in, fits, names_in, parameters, signature, type_name

TAKERS = {
    "trainer": "lightning.pytorch.Trainer",
    "save": "sigma_lite.train.callbacks.save.Save",
    "spike_guard": "sigma_lite.train.callbacks.spike_guard.SpikeGuard",
    "telemetry": "sigma_lite.train.callbacks.telemetry.Telemetry",
}
HOMES = {  # keys of the trainer that name classes, and where the usual ones live
    "logger": "lightning.pytorch.loggers",
    "callbacks": "lightning.pytorch.callbacks",
    "plugins": "lightning.pytorch.plugins",
    "strategy": "lightning.pytorch.strategies",
    "profiler": "lightning.pytorch.profilers",
    "accelerator": "lightning.pytorch.accelerators",
}
WORDS = ("strategy", "profiler", "accelerator")  # of these, Lightning knows some by short names of its own
PAPERS = tuple(sorted(f"sigma_lite.papers.{file.stem}" for file in Path(__file__).with_name("papers").glob("[!_]*.py")))
BALANCERS = ("sigma_lite.balance.balancer", "sigma_lite.balance.scale_free", "sigma_lite.balance.shuffled", *PAPERS)
RENAMED = {"save.beside": "save.in_background"}  # keys that had another name
PARTS = {  # of a model, and where the usual ones live; the model hands its config to each but dispatch
    "router": ("sigma_lite.model.router", *PAPERS),
    "experts": ("sigma_lite.model.experts", *PAPERS),
    "attention": ("sigma_lite.model.attention", *PAPERS),
    "dispatch": ("sigma_lite.model.dispatch", *PAPERS),
    "stack": ("sigma_lite.convert.blocks",),
}
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
PRECISIONS = {None: "32-true", 32: "32-true", "32": "32-true", "32-true": "32-true"} | dict.fromkeys(
    ("bf16", "bf16-mixed"), "bf16-mixed"
)


def group(given: object, where: str) -> Mapping[str, Any]:
    """A group of keys that was given. Raises ConfigError for a value in its place, and for a group without keys."""
    require(given is not None, f"{where} is empty: write keys below it, or leave it out")
    require(isinstance(given, Mapping), f"{where} must be a group of keys, not {given!r}")
    return given


def check_lightning_keys(settings: Mapping[str, Any]) -> None:
    """ConfigError for a key of a group in TAKERS or a named class that is unknown or cannot be so."""
    for section, path in TAKERS.items():
        known = parameters(path)
        for key, value in group(settings.get(section, {}), section).items():
            now = RENAMED.get(f"{section}.{key}")
            require(key in known, f"unknown key {section}.{key}; {f'it is now {now}' if now else nearest(key, known)}")
            reason = FIXED.get(key) if section == "trainer" else None
            require(reason is None, f"trainer.{key}={value} cannot be chosen: leave it out; {reason}")
            require(fits(value, known[key].hint), f"{section}.{key}={value}: expected {type_name(known[key].hint)}")
            require_finite(f"{section}.{key}", value)
    trainer = settings.get("trainer", {})
    for key in HOMES.keys() & trainer.keys():
        supplied = {"save_dir"} if key == "logger" else set()  # it is the run's folder
        check_class(trainer[key], f"trainer.{key}", (HOMES[key],), words=key in WORDS, supplied=supplied)
    check_class(settings.get("model", {}).get("custom_balance"), "model.custom_balance", BALANCERS)
    check_parts(settings.get("model", {}).get("parts"))
    check_optim(settings.get("model", {}).get("optim"))
    _check_values(trainer, settings)


def check_parts(given: object) -> None:
    """ConfigError for a part that does not exist, or that names no class."""
    if given is None:
        return
    for name, part in group(given, "model.parts").items():
        require(name in PARTS, f"unknown key model.parts.{name}; {nearest(name, PARTS)}")
        check_class(part, f"model.parts.{name}", PARTS[name], supplied={"config"})


def check_optim(given: object) -> None:
    """ConfigError for an optimizer or a schedule that does not exist, or that takes no such arguments."""
    optim, supplied = group(given or {}, "model.optim"), {"params", "lr", "step", "total_steps", "optim"}
    homes = {"optimizer": ("sigma_lite.train.muon", "torch.optim"), "schedule": ("sigma_lite.train.schedules",)}
    for key, names in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if key in optim:
            require_type(optim[key], str | dict, f"model.optim.{key}")
            path, args = class_named(optim[key], f"model.optim.{key}", names)
            for name in sorted(args.keys() & supplied):
                require(False, f"model.optim.{key}: {name} is given to it already; leave it out, and set model.optim.lr")
            check_class({"class_path": path, "init_args": args}, f"model.optim.{key}", homes[key], supplied=supplied)


def _check_values(trainer: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Values of the right type that no run can have: said before any folder is looked at."""
    steps = trainer.get("max_steps", -1)
    require(steps == -1 or steps > 0, f"trainer.max_steps={steps}: must be at least 1 optimizer step")
    interval = trainer.get("val_check_interval")
    whole = interval is None or (type(interval) is int and interval > 0)
    require(whole, f"trainer.val_check_interval={interval}: give a whole number of optimizer steps, at least 1")
    require_precision(trainer.get("precision"))
    require_clipping(trainer.get("gradient_clip_algorithm"))
    _check_amounts(trainer)
    save = settings.get("save", {})
    require_kept(save.get("every", 1), save.get("keep", 2))
    if "every" in save:
        require_end_is_saved(save["every"], steps)
    seed, workers = settings.get("seed_everything", 0), settings.get("data", {}).get("num_workers", 0)
    fine = fits(seed, int) and 0 <= seed < 2**32  # Lightning would take true for 0, and false for another one each time
    require(fine, f"seed_everything={seed!r}: give a whole number from 0 to {2**32 - 1}")
    fine = fits(workers, int) and workers >= 0
    require(fine, f"data.num_workers={workers!r}: give a whole number of processes, 0 for none beside the trainer's own")
    path = settings.get("ckpt_path")
    require(path is None or isinstance(path, str), f"ckpt_path={path!r}: give the path of a file in RUN/checkpoints")


def _check_amounts(trainer: Mapping[str, Any]) -> None:
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
    accelerator = trainer.get("accelerator", "auto")
    known = not isinstance(accelerator, str) or "." in accelerator or accelerator in ACCELERATORS
    require(known, f"trainer.accelerator={accelerator} does not exist; {nearest(str(accelerator), ACCELERATORS)}")
    for key, special in (("num_nodes", ()), ("devices", (-1,))):
        count = trainer.get(key, 1)
        require(not isinstance(count, int) or count > 0 or count in special, f"trainer.{key}={count}: must be at least 1")


def require_kept(every: int, keep: int) -> None:
    require(every >= 1, f"save.every={every}: must be at least 1 optimizer step")
    require(keep >= 2, f"save.keep={keep}: keep at least 2, so that a damaged one is not the only one")


def check_end(settings: Mapping[str, Any]) -> None:
    """For commands that train or plan training: the last step must be saved, also where `save.every` is its default."""
    every, last = parameters(TAKERS["save"])["every"].default, settings.get("trainer", {}).get("max_steps", -1)
    why = "learning rate and schedule need the end of the run"
    require(last > 0, f"trainer.max_steps={last}: set trainer.max_steps to at least 1, or give -c FILE; {why}")
    require_end_is_saved(settings.get("save", {}).get("every", every), last)


def require_precision(given: object) -> None:
    """A 16-mixed gradient is still scaled when it is clipped: fused AdamW unscales it last. True 16 bits round the bias."""
    kept = isinstance(given, (int, str, type(None))) and given in PRECISIONS
    said = f"trainer.precision={given}: choose 32-true or bf16-mixed, which keep weights, router and bias in fp32"
    require(kept, said)


def require_clipping(algorithm: object) -> None:
    fine = algorithm in (None, "norm")
    require(fine, f"trainer.gradient_clip_algorithm={algorithm}: leave it out, clipping is by the total norm")


def require_end_is_saved(every: int, last: int) -> None:
    """`save.every` divides `trainer.max_steps`, where one is set."""
    require(
        last < 1 or last % every == 0,
        f"save.every={every} does not divide trainer.max_steps={last}, so the end would not be saved;"
        f" try save.every={next((n for n in range(every, 0, -1) if last % n == 0), 1)}",
    )


def require_type(value: object, hint: object, where: str) -> None:
    require(fits(value, hint), f"{where}={_short(value)}: expected {type_name(hint)}")


# ----------------------------------------------------------------------------------------------------- named classes


def check_class(
    given: object, where: str, homes: tuple[str, ...], words: bool = False, supplied: Set[str] = frozenset()
) -> None:
    """A class by its path, with `init_args`; a list of such; or nothing. ConfigError names the class that is meant.

    Args:
        homes: modules of classes that a short name may mean.
        words: whether a short name may also be one that only Lightning knows, such as `auto`.
        supplied: arguments that a yaml need not give.
    """
    if given is None or isinstance(given, bool):
        return
    if isinstance(given, list):
        for place, one in enumerate(given):
            check_class(one, f"{where}[{place}]", homes, words)
        return
    path = given.get("class_path") if isinstance(given, Mapping) else given
    require(isinstance(path, str), f"{where}={_short(given)} is no class; {class_hint('', homes)}")
    full = resolved(path, homes)
    if full is None:
        module, _, name = path.rpartition(".")
        what = f": {module} has no attribute {name!r}" if names_in(module) else f"={path!r} is no class"
        require(words and not module, f"{where}{what}; {class_hint(path, homes)}")
        return
    given = given if isinstance(given, Mapping) else {}
    args = group(given.get("init_args", {}), f"{where}.init_args")
    beside = {key: value for key, value in given.items() if key not in ("class_path", "init_args", "dict_kwargs")}
    _check_arguments(full, {**args, **beside}, where)
    _require_all(full, args.keys() | beside.keys() | supplied, where)


def _require_all(path: str, given: Set[str], where: str) -> None:
    takes = signature(path)
    if takes is None or not path.rpartition(".")[2][:1].isupper():  # a function is named, not called
        return
    missing = [name for name, parameter in takes.parameters.items() if parameter.default is REQUIRED and name not in given]
    require(not missing, f"{where}: {path} needs {' and '.join(missing)}: write `init_args: {{{', '.join(missing)}: ...}}`")


def _check_arguments(path: str, args: Mapping[str, Any], where: str) -> None:
    takes = signature(path)
    if takes is None:
        return
    for key, value in args.items():
        known = key in takes.parameters
        almost = not takes.open or difflib.get_close_matches(str(key), takes.parameters, n=1, cutoff=0.75)
        hint = nearest(key, takes.parameters) if takes.parameters else "it takes none"
        require(known or not almost, f"{where}: Option {key!r} is not accepted by {path}; {hint}")
        if known:
            require_type(value, takes.parameters[key].hint, f"{where}.{key}")
        if isinstance(value, Mapping) and "class_path" in value:
            check_class(value, f"{where}.{key}", BALANCERS, words=True)


def resolved(path: str, homes: tuple[str, ...]) -> str | None:
    """The full path of a class that is there, or that no source can tell about; None for one that is not."""
    module, _, name = path.rpartition(".")
    if not module:
        return next((f"{home}.{name}" for home in homes if name in classes_in(home)), None)
    names = names_in(module)
    if names is None:
        return path if _may_be_there(module) else None
    return path if name in names else None


def _may_be_there(module: str) -> bool:
    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def class_hint(meant: str, homes: tuple[str, ...]) -> str:
    """The end of a message: the class that was probably meant, as one writes it in yaml."""
    paths = {name: f"{home}.{name}" for home in homes for name in classes_in(home)}
    plain = {name.lower(): name for name in paths}
    wanted = meant.rpartition(".")[2].replace("_", "").replace("-", "").lower()
    inside = [plain[name] for name in plain if wanted and wanted in name]
    close = [plain[name] for name in difflib.get_close_matches(wanted, plain, n=1, cutoff=0.6)]
    found = close[:1] or sorted(inside, key=len)[:1]
    if found:
        return f"did you mean `class_path: {paths[found[0]]}`?"
    kinds = ", ".join(sorted(paths)[:8])
    return f"give `class_path: MODULE.CLASS`, such as {homes[0]}.{next(iter(sorted(paths)), 'CLASS')}; known are {kinds}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
