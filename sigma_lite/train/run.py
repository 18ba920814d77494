"""A run from yaml: what `fit`, `validate`, `test` and `predict` do with a model, its data and a trainer."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import sigma_lite
from sigma_lite import record
from sigma_lite.checkpoint import newest_checkpoint, newest_whole, read_settings, step_of
from sigma_lite.config import plain_path, require
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.identity import changed_files, differences, package_code
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.expected import expected
from sigma_lite.scale.lost import lost_rank
from sigma_lite.scale.plan import plan
from sigma_lite.storage import run_alone
from sigma_lite.train.built import BuiltCLI
from sigma_lite.train.callbacks.begin import Begin
from sigma_lite.train.callbacks.diary import Diary, heldout_facts
from sigma_lite.train.callbacks.names import of_validation, publish
from sigma_lite.train.callbacks.stop import Stopped, requeue
from sigma_lite.train.callbacks.telemetry import Telemetry
from sigma_lite.train.memory import keep_freed_memory
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.predictions import write_predictions
from sigma_lite.train.provenance import origin
from sigma_lite.train.settings import ROUNDING, completed
from sigma_lite.train.start import Start, find_start
from sigma_lite.train.threads import Threads, candidates, cores, measure, recorded, threads_for, trial_step


class RunCLI(BuiltCLI):
    """`fit` begins a run as train/start.py says, leaves a finished one alone, and refuses one made with other settings.

    What writes into the run's folder keeps it locked until the `with` block of this object ends.
    """

    threads: Threads | None = None  # of one process on a CPU, once `fit` has begun

    def fit(self, model: SigmaLit, datamodule: TokenDataModule, ckpt_path: str | None = None, **_: Any) -> None:
        """Train to trainer.max_steps from where train/start.py says: mostly the newest checkpoint of the run's folder."""
        trainer, run_dir = self.trainer, self.run_dir
        require(ckpt_path is None, "fit continues from its own folder by itself: leave ckpt_path out")
        require(trainer.max_steps > 0, "set trainer.max_steps: learning rate and schedule need the end of the run")
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        trainer.accumulate_grad_batches = datamodule.rows.accumulation(trainer.world_size)
        if isinstance(trainer.val_check_interval, int):  # in optimizer steps; Lightning counts micro-batches
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        self._lock()
        start = find_start(run_dir, self.words, self.settings(), None if trainer.is_global_zero else lambda sentence: None)
        if start.how == "resume" and step_of(start.checkpoint) >= trainer.max_steps:
            return
        self._set_threads(start)
        if trainer.is_global_zero:
            self._say_at_start(start)
        next(c for c in trainer.callbacks if isinstance(c, Begin)).start = start
        next(c for c in trainer.callbacks if isinstance(c, Diary)).facts = self.facts
        model.branched = start.branch
        model.run_settings = self.settings() | ({"parent": start.parent} if start.parent else {})
        try:
            trainer.fit(model, datamodule=datamodule, ckpt_path=start.restored, weights_only=True)
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

    def _set_threads(self, start: Start) -> None:
        """One process on a CPU chooses; several share the cores out among themselves, and a GPU needs none."""
        if self.trainer.strategy.root_device.type != "cpu" or self.trainer.world_size > 1:
            return
        goes_on = start.how in ("resume", "extend")
        before = next(iter(record.read(self.run_dir / "record.jsonl", "run")), None) if goes_on else None
        own = self.threads = threads_for(self.planned.threads, before, self._measured)
        torch.set_num_threads(own.number)
        self.remarks += [f"threads: {own.number}, {own.why}"] if self.planned.threads == "auto" else []
        if before and (was := recorded(before)) != own.number:
            keep = f"threads={was} goes on to the last digit"
            self.remarks.append(f"this run began with threads={was}, and goes on with {own.number}: {keep}")

    def _measured(self) -> Threads:
        return measure(trial_step(self.model, self.datamodule.rows), candidates(cores()))

    def _lock(self) -> None:
        """On the first rank only, which does the writing; the others follow it, or wait for it in vain."""
        if self.trainer.is_global_zero:
            self.held.enter_context(run_alone(self.run_dir))

    def _say_at_start(self, start: Start) -> None:
        """What changes nothing in this run, what begins anew, and where code is other than it was."""
        for sentence in self.remarks:
            print(f"note          {sentence}")
        diary = self.run_dir / "record.jsonl"
        if start.how == "new" and (step := record.last_step(diary)) >= self.config[self.subcommand].save.every:
            print(f"note          {self.run_dir} has a diary up to step {step}, but no checkpoint: both begin anew")
        starts = record.read(diary, "run") if start.how in ("resume", "extend") else []
        changed = changed_files(starts[-1]["code"], package_code()) if starts and "code" in starts[-1] else []
        if changed:
            warnings.warn(
                f"{self.run_dir} goes on with other code than it was trained by so far; changed: {', '.join(changed)}."
                " Each start in its record.jsonl holds its commit and code",
                stacklevel=2,
            )

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
        loggers, self.trainer.loggers = self.trainer.loggers, []  # Lightning would tell them under other names
        self.validate(self.model, self.datamodule, verbose=False)
        self.trainer.loggers = loggers
        facts = heldout_facts(self.model)  # on every rank: it sums over them
        if self.trainer.is_global_zero:
            record.append(diary, "validation", step_of(self.trained(None)), **facts)
            publish(self.trainer, self.trainer.max_steps, of_validation(facts))
            for logger in self.trainer.loggers:
                logger.finalize("success")  # once more: Lightning has done it before these numbers came

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
        named = ("corpus", "rows", *(["mixture"] if self.datamodule.mixture.sources else []))
        data = {name: dataclasses.asdict(getattr(self.datamodule, name)) for name in named}
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
        counts = plan(RunConfig(net=self.model.shape, sparsity=self.model.sparsity))
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
            **({"threads": self.threads._asdict()} if self.threads else {}),
            "config": self.model.run_settings or self.settings(),
            "ledger": {
                "total": counts["total_params"],
                "non_embedding": counts["non_embedding_params"],
                "embedding": counts["embedding_params"],
                "active_initial": counts["active_params_initial"],
                "active_target": counts["active_params_target"],
            },
            "parameters": sum(p.numel() for p in self.model.model.parameters()),  # counted, where the ledger is computed
            "plan": self._plan(),
            "data": self.datamodule.prepared.facts(),
        }

    def _plan(self) -> dict[str, Any]:
        """What the report compares this run with."""
        telemetry = next(c for c in self.trainer.callbacks if isinstance(c, Telemetry))
        device = self.trainer.strategy.root_device
        return expected(self.planned, telemetry.cluster, torch.cuda.get_device_name(device) if device.type == "cuda" else "")
