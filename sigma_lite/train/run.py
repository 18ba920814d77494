"""A run from yaml: LightningCLI with our module, data, callbacks, checkpoints and rules of resuming."""

from __future__ import annotations

import contextlib
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
from sigma_lite.checkpoint import newest_checkpoint, newest_whole, read_settings, step_of
from sigma_lite.config import ConfigError, plain_path, require
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.identity import changed_files, differences, package_code
from sigma_lite.model.parts import as_parts
from sigma_lite.reading import overlay
from sigma_lite.runfile import RunConfig, checked, overrides, read_files, split_files
from sigma_lite.scale.layout import strategy_config
from sigma_lite.scale.lost import lost_rank
from sigma_lite.scale.plan import plan
from sigma_lite.scale.shard import refuse_custom
from sigma_lite.storage import run_alone
from sigma_lite.train.callbacks.diary import Diary, heldout_facts
from sigma_lite.train.callbacks.load_recorder import LoadRecorder
from sigma_lite.train.callbacks.progress import StepProgress
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.callbacks.spike_guard import SpikeGuard
from sigma_lite.train.callbacks.stop import Stopped, StopWhenAsked, requeue
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.callbacks.verify_data import VerifyData
from sigma_lite.train.checkpoint import SafeCheckpointIO
from sigma_lite.train.memory import keep_freed_memory
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.parser import StrictParser, one_sentence
from sigma_lite.train.predictions import write_predictions
from sigma_lite.train.provenance import origin
from sigma_lite.train.settings import ROUNDING, completed, require_same_settings, without_effect
from sigma_lite.train.strategies import check_made, check_named, outside_srun

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

WITH_PARTS = ("total_params", "non_embedding_params", "active_params_initial", "active_params_target")


class RunCLI(LightningCLI):
    """`fit` continues a run that was cut off, leaves a finished one alone, and refuses one made with other settings.

    What writes into the run's folder keeps it locked until the `with` block of this object ends.
    """

    def __init__(self, args: list[str], own: Any = None, parts: Any = None):
        _quiet()
        self.own, self.parts = own, parts  # what exists only in memory, such as a balancer defined in a notebook
        self.command = ["sigma-lite", *args]
        files, options = split_files(args)
        self.given = read_files(files)  # once: the parser gets what was read here, whatever this system's text encoding
        self.remarks: list[str] = []
        if not {"--help", "-h"} & set(args):
            run = checked(overlay(self.given, overrides(options)), fit=args[0] == "fit")
            check_named(run.trainer.get("strategy"))
            if strategy_config(run.trainer.get("strategy")):
                refuse_custom(as_parts(run.parts).custom)
            self.remarks = without_effect(run)
            if parts is None and run.parts:  # jsonargparse would make a router itself, with a config of its own
                self.parts = as_parts(run.parts)
        with contextlib.ExitStack() as self.held:
            super().__init__(
                SigmaLit,
                TokenDataModule,
                parser_class=StrictParser,
                trainer_defaults=TRAINER_DEFAULTS
                | {"callbacks": [Throughput(), Diary(), LoadRecorder(), StepProgress(), StopWhenAsked(), VerifyData()]},
                seed_everything_default=0,
                save_config_callback=None,
                auto_configure_optimizers=False,
                args=options,
            )
            self.held = self.held.pop_all()  # what has gone well so far goes on

    def __enter__(self) -> RunCLI:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

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

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything={self.config[self.subcommand].seed_everything}: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would unpickle the file to look for settings; ours hold none that override the config."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        root = plain_path(self._get(self.config_init, "trainer")["default_root_dir"], "trainer.default_root_dir")
        plugins = outside_srun(self._get(self.config_init, "trainer").get("plugins"))
        kwargs |= {"default_root_dir": root} | ({"plugins": plugins} if plugins else {})
        try:
            trainer = super().instantiate_trainer(**kwargs | OURS)
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise ConfigError(f"this trainer cannot be built: {' '.join(str(error).split())}") from error
        check_made(trainer.strategy)
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
        if self.parts is not None:
            self.model.made_of(self.parts)

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
        self._lock()
        newest = newest_whole(run_dir, None if trainer.is_global_zero else lambda sentence: None)
        if newest is not None:
            require_same_settings(newest, self.settings())
            if step_of(newest) >= trainer.max_steps:
                return
            self._say_other_code()
        self._say_at_start(newest)
        diary = next(c for c in trainer.callbacks if isinstance(c, Diary))
        diary.facts = self.facts
        model.run_settings = self.settings()
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=newest, weights_only=True)
        except Stopped as stop:
            if stop.requeue and trainer.is_global_zero:
                requeue()
            if stop.number:
                raise KeyboardInterrupt(self.where_it_stopped()) from None
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            require(not lost_rank(error), f"{lost_rank(error)}; the same command continues from the last checkpoint")
            raise

    def _say_other_code(self) -> None:
        """A run may go on after an update of this package, but not without a word."""
        starts = record.read(self.run_dir / "record.jsonl", "run")
        changed = changed_files(starts[-1]["code"], package_code()) if starts and "code" in starts[-1] else []
        if changed and self.trainer.is_global_zero:
            warnings.warn(
                f"{self.run_dir} goes on with other code than it was trained by so far; changed: {', '.join(changed)}."
                " Each start in its record.jsonl holds its commit and code",
                stacklevel=2,
            )

    def _lock(self) -> None:
        """On the first rank only, which does the writing; the others follow it, or wait for it in vain."""
        if self.trainer.is_global_zero:
            self.held.enter_context(run_alone(self.run_dir))

    def _say_at_start(self, newest: Path | None) -> None:
        if not self.trainer.is_global_zero:
            return
        for sentence in self.remarks:
            print(f"note          {sentence}")
        diary = self.run_dir / "record.jsonl"
        if newest is None and (step := record.last_step(diary)) >= self.config[self.subcommand].save.every:
            print(f"note          {self.run_dir} has a diary up to step {step}, but no checkpoint: both begin anew")

    @property
    def finished(self) -> bool:
        """Whether the run's last step is saved."""
        newest = newest_checkpoint(self.run_dir)
        return newest is not None and step_of(newest) >= self.trainer.max_steps

    def where_it_stopped(self) -> str:
        newest, end = newest_checkpoint(self.run_dir), self.trainer.max_steps
        if newest is None:
            return f"stopped before a step of {end} was saved; the same command begins again"
        return f"stopped at step {step_of(newest)} of {end}; the same command continues from {newest}"

    def validate(self, model: SigmaLit, datamodule: TokenDataModule, ckpt_path: str | None = None, **options: Any) -> Any:
        return self.trainer.validate(model, datamodule=datamodule, ckpt_path=self.trained(ckpt_path), **options)

    def validate_at_end(self) -> None:
        """Measure a finished run on held-out text and write it down as the `validation` of its last step, once."""
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
        self._lock()
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
        path = Path(plain_path(ckpt_path, "ckpt_path")) if ckpt_path else newest_whole(self.run_dir)
        require(path is not None, f"{self.run_dir} holds no checkpoint: run `sigma-lite fit` with this config first")
        saved, now = completed(read_settings(path)).get("net", {}), self.settings()["net"]
        for name, value in now.items():
            if f"net.{name}" == ROUNDING:
                continue
            was = saved.get(name)
            require(was == value, f"{path} holds a model with {name}={was}, this config says {value}: give its own config")
        parts = [
            {n: v for n, v in side.items() if n.startswith("parts.")} for side in (read_settings(path), self.settings())
        ]
        require(not (differs := differences(*parts)), f"{path} holds a model with {differs}: give its own config")
        return path

    def settings(self) -> dict[str, Any]:
        """Everything the weights depend on, and where the data was."""
        data = {name: dataclasses.asdict(getattr(self.datamodule, name)) for name in ("corpus", "rows")}
        trainer = {
            "max_steps": self.trainer.max_steps,
            "gradient_clip_val": self.trainer.gradient_clip_val or None,  # 0 means the same
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "precision": str(self.trainer.precision),
        }
        seed = self.config[self.subcommand].seed_everything
        return {**self.model.settings(), **data, "trainer": trainer, "seed_everything": seed}

    def facts(self) -> dict[str, Any]:
        """The `run` entry of the diary; called when the data is ready."""
        counts = plan(RunConfig(net=self.model.net, sparsity=self.model.sparsity))
        if self.model.parts.custom:  # counted, not computed; each token is taken to use all that is not an expert of ours
            more = sum(p.numel() for p in self.model.model.parameters()) - counts["total_params"]
            counts |= {name: count + more for name, count in counts.items() if name in WITH_PARTS}
        versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__}
        return {
            "command": shlex.join(self.command),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {**versions, "sigma_lite": sigma_lite.__version__},
            **origin(
                self.trainer.strategy.root_device,
                self.trainer.world_size,
                self.model.net,
                self.datamodule.rows.per_micro * self.datamodule.rows.length,
                str(self.trainer.precision),
            ),
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
