"""Rows for a Lightning Trainer: prepared by one process, the same on any number of ranks, resumed at the exact row.

The Trainer must run with `use_distributed_sampler=False` (Lightning would shuffle once more) and with `max_steps`.
"""

from __future__ import annotations

import signal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from sigma_lite.config import CorpusConfig, RowsConfig, require
from sigma_lite.data.rows import Rows, heldout_loader, train_loader
from sigma_lite.data.shards import Prepared, has_heldout, load, prepare
from sigma_lite.data.stages import SPLITS
from sigma_lite.data.stream import TokenStream
from sigma_lite.data.tokenizer import keep_tokenizer


class TokenDataModule(pl.LightningDataModule):
    """Training and held-out rows of a corpus.

    Order needs no state but the number of rows consumed, which is `global_step * rows.per_step`.
    """

    def __init__(self, corpus: CorpusConfig, rows: RowsConfig, num_workers: int = 0):
        super().__init__()
        require(num_workers >= 0, f"data.num_workers={num_workers}: must be 0 (read in the same process) or more")
        self.corpus, self.rows, self.num_workers = corpus, rows, num_workers
        self.prepared: Prepared | None = None
        self.prepare_data_per_node = False  # the folder is on a disk that all nodes see
        self._splits: tuple[str, ...] = SPLITS  # of which `prepared` was found complete
        self._saved_micros: int | None = None

    def prepare_data(self) -> None:
        if not (self._only_measures() and has_heldout(self.corpus)):
            prepare(self.corpus)

    def setup(self, stage: str | None = None) -> None:
        splits = ("heldout",) if self._only_measures() else SPLITS
        if self.prepared is None or not {*splits} <= {*self._splits}:
            self.prepared, self._splits = load(self.corpus.dir, splits=splits), splits

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
        rows = self._rows(self.prepared.train)
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
        self._count_in(micros)
        steps, first_step = trainer.max_steps, lambda: trainer.global_step
        loader = train_loader(rows, self.rows, rank, world, steps, first_step, cls=_Resumable, **self._options())
        if trainer.is_global_zero:  # as late as this: a start that is refused leaves the run's folder as it was
            keep_tokenizer(trainer.default_root_dir, self.prepared.dir)
        return loader

    def val_dataloader(self) -> DataLoader:
        return heldout_loader(self._rows(self.prepared.heldout, padded=True), self.rows, *self._place(), **self._options())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _rows(self, stream: TokenStream, padded: bool = False) -> Rows:
        copies = self.prepared.copies(self.rows.split_above)
        return Rows(stream, self.prepared.token_bytes, self.rows.length, padded, copies)

    def _place(self) -> tuple[int, int]:
        """(rank, world) among the processes that see different rows."""
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (shared["rank"], shared["num_replicas"]) if shared else (0, 1)

    def _options(self) -> dict:
        workers = {"num_workers": self.num_workers, "worker_init_fn": _leave_signals_to_the_run}
        return {**workers, "pin_memory": torch.cuda.is_available()}

    # ----------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict:
        micros = self.rows.accumulation(self._place()[1])
        consumed = self.trainer.global_step * self.rows.per_step
        tokenizer = self.prepared.manifest["tokenizer"]["sha256"]
        return {
            **self._sequence(),
            "rows_consumed": consumed,
            "micro_batches": micros,
            "tokenizer sha256": tokenizer,  # serve/ would write nonsense with another
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Refuse to continue on another sequence of rows; where to go on in the same one follows from the Trainer's step.

        Raises ConfigError naming the first setting that differs. Any rows will do to validate or test a checkpoint.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        saved = {"rows.domain_run": 1, **state_dict}  # which older checkpoints do not name
        branched = state_dict.get("branched", False)  # onto other rows, and that was asked for
        for name, value in ({} if branched else self._sequence()).items():
            was = saved.get(name)
            require(
                was == value,
                f"the checkpoint was trained with {name}={was}, this run has {value}: resume with the same data"
                " settings, or start a new run",
            )
        self._saved_micros = state_dict["micro_batches"]

    def _count_in(self, micros: int) -> None:
        """Restate Lightning's batch counters after a resume on another number of ranks.

        They count micro-batches. The optimizer steps when their number divides by accumulate_grad_batches, so a count
        made with another accumulation would end the first step early, and validation would come at other steps.
        """
        saved, self._saved_micros = self._saved_micros, None
        if saved:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress
            for counter in (progress.current, progress.total):
                more = counter.ready // saved * (micros - saved)
                for name in ("ready", "started", "processed", "completed"):
                    setattr(counter, name, getattr(counter, name) + more)

    def _sequence(self) -> dict:
        """The settings that fix which tokens row number i holds, and how many rows a step takes."""
        self.setup()
        names = ("length", "per_step", "seed", "domain_run")
        settings = {f"rows.{name}": getattr(self.rows, name) for name in names}
        return {"corpus fingerprint": self.prepared.manifest["fingerprint"], **settings}


def _leave_signals_to_the_run(worker: int) -> None:
    """A terminal sends Ctrl-C to workers too; without them the run could not finish its step and save it."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Resumable(DataLoader):
    """Tells Lightning that these rows survive a resume. There is no state to keep: the sampler asks for the step."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass
