"""A run from yaml: LightningCLI with our module, data, callbacks, checkpoints and rules of resuming."""

from __future__ import annotations

import dataclasses
import logging
import platform
import shlex
import tempfile
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import sigma_lite
from sigma_lite import record
from sigma_lite.checkpoint import newest_checkpoint, read_settings, step_of
from sigma_lite.config import ConfigError, require
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.reading import overlay
from sigma_lite.runfile import RunConfig, checked, overrides, read_files, split_files
from sigma_lite.scale.lost import lost_rank
from sigma_lite.scale.plan import plan
from sigma_lite.train.callbacks.diary import Diary, heldout_facts
from sigma_lite.train.callbacks.load_recorder import LoadRecorder
from sigma_lite.train.callbacks.progress import StepProgress
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.callbacks.spike_guard import SpikeGuard
from sigma_lite.train.callbacks.stop import REQUEUE, Stopped, StopWhenAsked, requeue
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.checkpoint import SafeCheckpointIO
from sigma_lite.train.memory import keep_freed_memory
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.parser import StrictParser, one_sentence
from sigma_lite.train.predictions import write_predictions
from sigma_lite.train.provenance import device_name, git_commit
from sigma_lite.train.settings import require_same_settings

TRAINER_DEFAULTS = {
    "max_steps": -1,
    "logger": False,  # the diary keeps the record; add a logger to have one more
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
    "default_root_dir": "runs/default",
}
OURS = {  # of the keys in FIXED, those for which Lightning's default is another
    "use_distributed_sampler": False,  # our sampler already gives each rank its own rows
    "check_val_every_n_epoch": None,  # validation is counted in batches, not epochs
}


class RunCLI(LightningCLI):
    """`fit` continues a run that was cut off, leaves a finished one alone, and refuses one made with other settings."""

    def __init__(self, args: list[str], own: Any = None):
        _quiet()
        self.own = own  # a balancer that exists only in memory, such as one defined in a notebook
        self.command = ["sigma-lite", *args]
        files, options = split_files(args)
        self.given = read_files(files)  # once: the parser gets what was read here, whatever this system's text encoding
        if not {"--help", "-h"} & set(args):
            checked(overlay(self.given, overrides(options)), fit=args[0] == "fit")
        super().__init__(
            SigmaLit,
            TokenDataModule,
            parser_class=StrictParser,
            trainer_defaults=TRAINER_DEFAULTS
            | {"callbacks": [Throughput(), Diary(), LoadRecorder(), StepProgress(), StopWhenAsked()]},
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            args=options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without options that ours would drop: no checkpoint holds a pickle, and predict writes a file."""
        without = {"weights_only", "return_predictions"}
        return {name: skipped | without for name, skipped in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command, *options = args
            if self.given:
                unknown = {"verbose"} if command in ("fit", "predict") else set()  # of a config that `validate` printed
                given = {key: value for key, value in self.given.items() if key not in unknown}
                file = Path(folder, "given.yaml")
                file.write_text(yaml.safe_dump(given), "ascii")  # which writes "é" as an escape
                options = ["--config", str(file), *options]
            super().parse_arguments(parser, [command, *options])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.net.vocab_size", "data.corpus.vocab_size")
        parser.add_lightning_class_args(Save, "save")
        parser.add_lightning_class_args(SpikeGuard, "spike_guard")

    def _parse_ckpt_path(self) -> None:
        """Lightning would unpickle the file to look for settings; ours hold none that override the config."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs | OURS)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise ConfigError(f"this trainer cannot be built: {' '.join(str(error).split())}") from error
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ConfigError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # jsonargparse wraps what a class says
            raise ConfigError(one_sentence(str(error))) from error
        if self.own is not None:
            self.model.balance_with(self.own)

    def fit(self, model: SigmaLit, datamodule: TokenDataModule, ckpt_path: str | None = None, **_: Any) -> None:
        """Train to trainer.max_steps, from the newest checkpoint of the run's folder if there is one."""
        trainer, run_dir = self.trainer, self.run_dir
        require(ckpt_path is None, "fit continues from its own folder by itself: leave ckpt_path out")
        require(trainer.max_steps > 0, "set trainer.max_steps: learning rate and schedule need the end of the run")
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        trainer.accumulate_grad_batches = datamodule.rows.accumulation(trainer.world_size)
        if isinstance(trainer.val_check_interval, int):  # in optimizer steps; Lightning counts micro-batches
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        newest = newest_checkpoint(run_dir)
        if newest is not None:
            require_same_settings(newest, self.settings())
            if step_of(newest) >= trainer.max_steps:
                return
        diary = next(c for c in trainer.callbacks if isinstance(c, Diary))
        diary.facts = self.facts
        model.run_settings = self.settings()
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=newest, weights_only=True)
        except Stopped as stop:
            if stop.number == REQUEUE and trainer.is_global_zero:
                requeue()
            raise KeyboardInterrupt from None
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            require(not lost_rank(error), f"{lost_rank(error)}; the same command continues from the last checkpoint")
            raise

    def validate(self, model: SigmaLit, datamodule: TokenDataModule, ckpt_path: str | None = None, **options: Any) -> Any:
        return self.trainer.validate(model, datamodule=datamodule, ckpt_path=self.trained(ckpt_path), **options)

    def validate_at_end(self) -> None:
        """Measure a finished run on held-out text and write it down as the `validation` of its step, once."""
        diary = self.run_dir / "record.jsonl"
        done = any(entry["step"] == self.trainer.max_steps for entry in record.read(diary, "validation"))
        if self.trainer.strategy.broadcast(done):
            return
        self.validate(self.model, self.datamodule, verbose=False)
        facts = heldout_facts(self.model)  # on every rank: it sums over them
        if self.trainer.is_global_zero:
            record.append(diary, "validation", step_of(self.trained(None)), **facts)

    def test(self, model: SigmaLit, datamodule: TokenDataModule, ckpt_path: str | None = None, **options: Any) -> Any:
        return self.trainer.test(model, datamodule=datamodule, ckpt_path=self.trained(ckpt_path), **options)

    def predict(self, model: SigmaLit, datamodule: TokenDataModule, ckpt_path: str | None = None, **_: Any) -> Path:
        """Write RUN/predictions.safetensors: ids, nats, kinds [rows, S] and experts [rows, L, S] of the held-out rows."""
        parts = self.trainer.predict(model, datamodule=datamodule, ckpt_path=self.trained(ckpt_path))
        path = self.run_dir / "predictions.safetensors"
        write_predictions(path, parts, len(self.trainer.predict_dataloaders.dataset))
        if self.trainer.is_global_zero:
            print(f"predictions   {path}")
        return path

    # ------------------------------------------------------------------------------------------------------- facts

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def trained(self, ckpt_path: str | None) -> Path:
        """The checkpoint asked for, or the newest of the run's folder. ConfigError when its model is another."""
        path = Path(ckpt_path) if ckpt_path else newest_checkpoint(self.run_dir)
        require(path is not None, f"{self.run_dir} holds no checkpoint: run `sigma-lite fit` with this config first")
        saved, now = read_settings(path).get("net", {}), self.settings()["net"]
        for name, value in now.items():
            was = saved.get(name)
            require(was == value, f"{path} holds a model with {name}={was}, this config says {value}: give its own config")
        return path

    def settings(self) -> dict[str, Any]:
        """Everything the weights depend on, and where the data was."""
        data = {name: dataclasses.asdict(getattr(self.datamodule, name)) for name in ("corpus", "rows")}
        trainer = {
            "max_steps": self.trainer.max_steps,
            "gradient_clip_val": self.trainer.gradient_clip_val,
            "precision": str(self.trainer.precision),
        }
        seed = self.config[self.subcommand].seed_everything
        return {**self.model.settings(), **data, "trainer": trainer, "seed_everything": seed}

    def facts(self) -> dict[str, Any]:
        """The `run` entry of the diary; called when the data is ready."""
        counts = plan(RunConfig(net=self.model.net, sparsity=self.model.sparsity))
        versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__}
        return {
            "command": shlex.join(self.command),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {**versions, "sigma_lite": sigma_lite.__version__},
            "device": device_name(self.trainer.strategy.root_device, self.trainer.world_size),
            "commit": git_commit(),
            "config": self.settings(),
            "ledger": {
                "total": counts["total_params"],
                "non_embedding": counts["non_embedding_params"],
                "embedding": counts["embedding_params"],
                "active_initial": counts["active_params_initial"],
                "active_target": counts["active_params_target"],
            },
            "data": self.datamodule.prepared.facts(),
        }


def _quiet() -> None:
    """Lightning says much that is not about this run; progress, errors and our own lines stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for text in (
        "LightningCLI's args parameter",
        "does not have many workers",
        "You are using a custom batch sampler",
        "isinstance.treespec, LeafSpec",
    ):
        warnings.filterwarnings("ignore", message=f".*{text}")
