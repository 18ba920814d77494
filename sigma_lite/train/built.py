"""From a command line to a model, its data and a trainer: LightningCLI with our settings, parser and callbacks."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sigma_lite.config import ConfigError, StartConfig, plain_path, require
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.model.parts import as_parts
from sigma_lite.reading import overlay
from sigma_lite.runfile import FLAGS, STARTS, checked, overrides, read_files, split_files
from sigma_lite.scale.layout import strategy_config
from sigma_lite.scale.shard import refuse_custom
from sigma_lite.train.callbacks.begin import Begin
from sigma_lite.train.callbacks.data_stages import DataStages
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.load_recorder import LoadRecorder
from sigma_lite.train.callbacks.progress import StepProgress
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.callbacks.spike_guard import SpikeGuard
from sigma_lite.train.callbacks.stop import StopWhenAsked
from sigma_lite.train.callbacks.telemetry import Telemetry
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.callbacks.verify_data import VerifyData
from sigma_lite.train.checkpoint import SafeCheckpointIO
from sigma_lite.train.loggers import in_run_folder, require_packages
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.parser import StrictParser, one_sentence
from sigma_lite.train.settings import without_effect
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
START_HELP = {
    "extend": "Go on with a finished or interrupted run to a larger trainer.max_steps, from its newest checkpoint up to"
    " which both lengths have the same rates.",
    "branch_from": "RUN or CHECKPOINT to go on from in another folder with other settings: weights, moments, step, diary."
    " The routers' bias counts as a weight: without a bias rule it stays as it is.",
    "init_from": "RUN or CHECKPOINT to take weights from, the routers' bias too, and nothing else; the tokenizer must be the"
    " same.",
    "new_weights": "refuse (default) or begin: what becomes of parameters that init_from lacks or has in another shape.",
}

THREADS_HELP = (
    "Of the CPU that `fit` computes on: a number; auto: timed when a run begins and kept when it goes on, unless"
    " OMP_NUM_THREADS is set; null (default): what OMP_NUM_THREADS says, or torch chooses."
)


class BuiltCLI(LightningCLI):
    """Settings are checked before Lightning sees them; commands are methods of a subclass.

    What goes into `held` is held until the `with` block of this object ends.
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
            require_packages(run.trainer.get("logger"))
            root = run.trainer.get("default_root_dir", TRAINER_DEFAULTS["default_root_dir"])
            options = [*options, *in_run_folder(run.trainer.get("logger"), root)]
            if strategy_config(run.trainer.get("strategy")):
                refuse_custom(as_parts(run.parts).custom)
                alone = "ranks would write answers of different lengths, and wait for each other's experts for ever"
                require(
                    not run.reward.answers, f"model.reward with expert parallelism: {alone}; choose trainer.strategy=ddp"
                )
            self.remarks, self.words, self.planned = without_effect(run, self.own is not None), run.start, run
            if parts is None and run.parts:
                self.parts = as_parts(run.parts)
        with contextlib.ExitStack() as self.held:
            super().__init__(
                SigmaLit,
                TokenDataModule,
                parser_class=StrictParser,
                trainer_defaults=TRAINER_DEFAULTS
                | {
                    "callbacks": [
                        Throughput(),
                        Begin(),
                        Diary(),
                        LoadRecorder(),
                        StepProgress(),
                        StopWhenAsked(),
                        VerifyData(),
                        DataStages(),
                    ]
                },
                seed_everything_default=0,
                save_config_callback=None,
                auto_configure_optimizers=False,
                args=options,
            )
            self.held = self.held.pop_all()  # what has gone well so far goes on

    def __enter__(self) -> BuiltCLI:
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
        parser.add_lightning_class_args(Telemetry, "telemetry")
        for name in STARTS:
            default = getattr(StartConfig(), name)
            kind = {"action": "store_true"} if name in FLAGS else {"type": str | None, "default": default}
            parser.add_argument(f"--{name}", **kind, help=START_HELP[name])
        parser.add_argument("--threads", type=int | str | None, default=None, help=THREADS_HELP)

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
        self.config[self.subcommand].model.parts = None  # read and checked by us: it would make a router without a config
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
        if self.subcommand == "fit":
            self.model.require_fit()


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
