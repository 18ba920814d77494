"""Rows for a Lightning Trainer: prepared by one process, the same on any number of ranks, resumed at the exact row.

The Trainer must run with `use_distributed_sampler=False` (Lightning would shuffle once more) and with `max_steps`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from sigma_lite.config import CorpusConfig, MixtureConfig, RowsConfig, check_mixture, require
from sigma_lite.data.mixture import PreparedMixture, has_all_heldout, load_mixture, prepare_mixture
from sigma_lite.data.of_run import RunData
from sigma_lite.data.order import Begun, Order
from sigma_lite.data.packed import PackedRows
from sigma_lite.data.rows import Batch, Rows, heldout_loader, require_a_row, train_loader
from sigma_lite.data.shards import Prepared, has_heldout, load, prepare
from sigma_lite.data.stages import SPLITS
from sigma_lite.data.tokenizer import keep_tokenizer


class TokenDataModule(pl.LightningDataModule):
    """Training and held-out rows of a corpus, or of a mixture of several.

    Order needs no state but the step; of a branch also what its parent had read of each source.
    """

    def __init__(
        self,
        corpus: CorpusConfig,
        rows: RowsConfig,
        num_workers: int = 0,
        mixture: MixtureConfig = MixtureConfig(),  # noqa: B008  frozen: safe to share
    ):
        super().__init__()
        require(num_workers >= 0, f"data.num_workers={num_workers}: must be 0 (read in the same process) or more")
        check_mixture(corpus, rows, mixture)
        self.corpus, self.rows, self.num_workers, self.mixture = corpus, rows, num_workers, mixture
        self.prepared: Prepared | PreparedMixture | None = None
        self.order: Order | None = None  # of the training rows, once they are asked for
        self.unequal = False  # whether training rows differ in how many of their tokens are read and scored
        self.weighed_otherwise = False  # by the run that a checkpoint is of, up to there
        self.prepare_data_per_node = False  # the folder is on a disk that all nodes see
        self._splits: tuple[str, ...] = SPLITS  # of which `prepared` was found complete
        self._saved_micros: int | None = None
        self.begun: Begun | None = None  # of a branch

    def prepare_data(self) -> None:
        if self.mixture.sources:
            if not (self._only_measures() and has_all_heldout(self.corpus, self.mixture)):
                prepare_mixture(self.corpus, self.mixture)
        elif not (self._only_measures() and has_heldout(self.corpus)):
            prepare(self.corpus)

    def setup(self, stage: str | None = None) -> None:
        splits = ("heldout",) if self._only_measures() else SPLITS
        if self.prepared is None or not {*splits} <= {*self._splits}:
            several = self.mixture.sources
            opened = load_mixture(self.corpus, self.mixture, splits) if several else load(self.corpus.dir, splits=splits)
            self.prepared, self._splits = opened, splits

    def _only_measures(self) -> bool:
        """Validation, test and prediction need no training tokens: they are gigabytes, and stay where a run was made."""
        measures = self.trainer is not None and self.trainer.state.fn not in (None, TrainerFn.FITTING)
        return measures and self.rows.split_above >= 1  # copies of tokens are counted in the training text

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents: what held-out nats are divided by."""
        return self.prepared.manifest["heldout_bytes"]

    # ---------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        parts = self.training_rows()
        for name, part in parts.items():
            require_a_row(part, self.rows.length, f"source {name} of data.mixture" if self.mixture.sources else "")
        rows = self._data.together([*parts.values()])
        require(
            trainer.max_steps > 0,
            f"trainer.max_steps={trainer.max_steps}: a run is measured in optimizer steps; one pass over this corpus is"
            f" {-(-len(rows) // self.rows.per_step)}",
        )
        rank, world = self._place()
        micros = self.rows.accumulation(world)
        require(
            trainer.accumulate_grad_batches == micros,
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: per_step={self.rows.per_step} rows on"
            f" {world} rank(s) with per_micro={self.rows.per_micro} are {micros} micro-batches; set it to {micros}",
        )
        saved, self._saved_micros = self._saved_micros, None
        self._count_in(saved or micros, micros)
        self.order = self.training_order(parts)
        steps, first_step = trainer.max_steps, lambda: trainer.global_step
        options = {"rows_of": self.order.rows, "cls": _Resumable, **self._options()}
        loader = train_loader(rows, self.rows, rank, world, steps, first_step, **options)
        loader.before_batch, self._loader = self._ramp, loader
        self.unequal = any(isinstance(part, PackedRows) for part in parts.values())
        if trainer.is_global_zero:  # as late as this: a start that is refused leaves the run's folder as it was
            keep_tokenizer(trainer.default_root_dir, self.prepared.dir)
        return loader

    def val_dataloader(self) -> DataLoader:
        parts = [*self._data.parts("heldout").values()]
        return heldout_loader(self._data.together(parts), self.rows, *self._place(), **self._options())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    @property
    def _data(self) -> RunData:
        return RunData(self.prepared, self.rows, self.mixture)

    def training_rows(self) -> dict[str, Rows]:
        """The training rows of each source, once the data is set up."""
        return self._data.parts("train")

    def training_order(self, rows: dict[str, Rows] | None = None) -> Order:
        """The rows of every step, once the data is set up; `rows` are the training rows of each source."""
        return self._data.order([*(rows or self.training_rows()).values()], self.begun)

    def batches_of(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, once the training rows were asked for."""
        return [self._loader.dataset.__getitems__(rows) for rows in self._loader.batch_sampler.of_step(step)]

    def read_in(self, step: int) -> dict[str, dict[str, float]]:
        """Rows of a step from each source, and how often it was read by its end: 1.5 is in the middle of a second pass."""
        if self.order is None:
            return {}
        rows = self.order.taken(step + 1) - self.order.taken(step)
        passes = [float(f"{p:.6g}") for p in self.order.passes(step + 1)]
        return {
            "rows": dict(zip(self.prepared.sources, rows.tolist(), strict=True)),
            "passes": dict(zip(self.prepared.sources, passes, strict=True)),
        }

    def _place(self) -> tuple[int, int]:
        """(rank, world) among the processes that see different rows."""
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (shared["rank"], shared["num_replicas"]) if shared else (0, 1)

    def _options(self) -> dict:
        workers = {"num_workers": self.num_workers, "worker_init_fn": _leave_signals_to_the_run}
        return {**workers, "pin_memory": torch.cuda.is_available()}

    # ----------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict:
        step = self.trainer.global_step
        tokenizer = self.prepared.manifest["tokenizer"]["sha256"]
        taken = self.order.taken(step).tolist() if self.order else []
        return {
            **self._sequence(),
            "rows_consumed": self.rows.before(step),
            "micro_batches": self.trainer.accumulate_grad_batches,
            "tokenizer sha256": tokenizer,  # serve/ would write nonsense with another
            "step": step,
            "taken": dict(zip(self._fingerprints(), taken, strict=False)),
            **({"begun": list(self.begun)} if self.begun else {}),
            **({"weighs": "tokens"} if self.unequal else {}),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Refuse to continue on another sequence of rows; where to go on in the same one follows from the Trainer's step.

        Raises ConfigError naming the first setting that differs. Any rows will do to validate or test a checkpoint.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        unnamed = {"rows.domain_run": 1, "rows.ramp": [], "rows.packed": True}  # by older checkpoints
        saved = {**unnamed, **state_dict}
        branched = state_dict.get("branched", False)  # onto other rows, and that was asked for
        for name, value in ({} if branched else self._sequence()).items():
            was = saved.get(name)
            require(
                was == value,
                f"the checkpoint was trained with {name}={was}, this run has {value}: resume with the same data"
                " settings, or start a new run",
            )
        self._saved_micros = state_dict["micro_batches"]
        self.weighed_otherwise = "weighs" not in state_dict and not branched  # onto rows that may be the first to differ
        begun = saved.get("begun")
        if branched:
            begun = self._behind(state_dict) if self.mixture.sources else None
        self.begun = Begun(begun[0], tuple(begun[1])) if begun else None

    def _behind(self, saved: dict) -> tuple[int, list[int]]:
        """Where a branch goes on: each source behind what the parent took of the same text; a new one at its beginning."""
        before = {saved["corpus fingerprint"]: saved["rows_consumed"]}  # older checkpoints: of their one corpus
        taken, longer = saved.get("taken", before), saved["rows.length"] / self.rows.length
        step = saved.get("step", saved["rows_consumed"] // saved["rows.per_step"])
        return step, [int(taken.get(fingerprint, 0) * longer) for fingerprint in self._fingerprints()]

    def _fingerprints(self) -> list[str]:
        return [source.manifest["fingerprint"] for source in self.prepared.sources.values()]

    # ------------------------------------------------------------------------------------------------------- ramp

    def _ramp(self) -> None:
        """Before a micro-batch is counted: as many of them a step as the step has rows for."""
        now, was = self.rows.accumulation(self._place()[1], self.trainer.global_step), self.trainer.accumulate_grad_batches
        if now != was:
            self._count_in(was, now)
            self.trainer.accumulate_grad_batches = now
            self.trainer.fit_loop._data_fetcher.fetched += self.trainer.global_step * (now - was)
            if isinstance(self.trainer.val_check_interval, int):
                self.trainer.val_check_batch = self.trainer.val_check_batch // was * now

    def teardown(self, stage: str) -> None:
        if self.order and stage == "fit":  # as it was before, for another fit of the same trainer
            self.trainer.accumulate_grad_batches = self.rows.accumulation(self._place()[1])

    def _count_in(self, was: int, now: int) -> None:
        """Restate Lightning's counters for another number of micro-batches a step: another number of ranks, or a ramp.

        They count micro-batches. The optimizer steps when their number divides by accumulate_grad_batches, so a count
        made with another accumulation would end the first step early, and validation would come at other steps.
        """
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        for counter in (progress.current, progress.total):
            more = counter.ready // was * (now - was)
            for name in ("ready", "started", "processed", "completed"):
                setattr(counter, name, getattr(counter, name) + more)

    def _sequence(self) -> dict[str, Any]:
        """The settings that fix which tokens row number i holds, and how many rows a step takes."""
        self.setup()
        names = ("length", "per_step", "seed", "domain_run", "packed")
        settings = {f"rows.{name}": getattr(self.rows, name) for name in names}
        settings["rows.ramp"] = [list(pair) for pair in self.rows.ramp]
        if self.mixture.sources:
            stages = self.mixture.shares(self.prepared.tokens)
            settings["mixture shares"] = [[step, list(shares)] for step, shares in stages]
        return {"corpus fingerprint": self.prepared.manifest["fingerprint"], **settings}


def _leave_signals_to_the_run(worker: int) -> None:
    """A terminal sends Ctrl-C to workers too; without them the run could not finish its step and save it."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Resumable(DataLoader):
    """Tells Lightning that these rows survive a resume. There is no state to keep: the sampler asks for the step."""

    before_batch: Callable[[], None] = staticmethod(lambda: None)  # called before Lightning counts a micro-batch

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.before_batch()
            yield batch

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass
