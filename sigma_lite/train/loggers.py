"""Loggers named in yaml: which package one needs, with the command that installs it, and where it writes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from sigma_lite.config import require
from sigma_lite.lightning_keys import HOMES, resolved
from sigma_lite.signatures import REQUIRED, parameters

NEEDS = {  # name of the class: packages of which one must be there, the first as pip calls it
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
    "MLFlowLogger": ("mlflow",),
    "CometLogger": ("comet_ml",),
    "NeptuneLogger": ("neptune",),
    "LitLogger": ("litlogger",),
}
EXTRAS = {"tensorboard": "'sigma-lite[watch]'"}


def require_packages(loggers: object) -> None:
    """ConfigError for a `trainer.logger` of yaml whose package is not installed: this Python's and no other one's."""
    for given in loggers if isinstance(loggers, list) else [loggers]:
        path = given.get("class_path") if isinstance(given, Mapping) else given
        name = path.rpartition(".")[2] if isinstance(path, str) else ""
        if not name or path not in (name, f"lightning.pytorch.loggers.{name}"):
            continue  # a class of the reader's own
        missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
        package = NEEDS.get(name, ("",))[0]
        require(
            len(missing) < len(NEEDS.get(name, ("",))),
            f"trainer.logger={name} needs the package {package}, which is not installed: `pip install"
            f" {EXTRAS.get(package, package.replace('_', '-'))}`, or --trainer.logger=false to keep the diary alone",
        )


def in_run_folder(logger: object, root: str) -> list[str]:
    """Options that have a logger write into the run's folder, where it needs a `save_dir` and was given none."""
    path = logger.get("class_path") if isinstance(logger, Mapping) else logger
    full = resolved(path, (HOMES["logger"],)) if isinstance(path, str) else None
    takes = parameters(full).get("save_dir") if full else None
    given = {**logger, **logger.get("init_args", {})} if isinstance(logger, Mapping) else {}
    needed = takes is not None and takes.default is REQUIRED and "save_dir" not in given
    return [f"--trainer.logger.save_dir={root}"] if needed else []
