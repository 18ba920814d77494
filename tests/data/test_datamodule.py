"""Lightning's side of the rows: the laws of the order are in test_rows.py."""

import logging
import tempfile
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sigma_lite.config import ConfigError, RowsConfig
from sigma_lite.data.datamodule import TokenDataModule

from .conftest import corpus_of

ROWS = RowsConfig(length=32, per_step=8, per_micro=4)


class Watcher(pl.LightningModule):
    """Learns nothing and remembers which rows it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows, self.heldout_bytes = [], 0

    def training_step(self, batch, _):
        self.rows += batch.ids_BS.tolist()
        return 0 * self.weight

    def validation_step(self, batch, _):
        self.heldout_bytes += int(batch.bytes_BS.sum())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_for(steps: int, accumulate: int = 2, folder=None, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options.setdefault("default_root_dir", folder or tempfile.mkdtemp(prefix="sigma-lite-"))  # where the tokenizer goes
    every = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, accumulate_grad_batches=accumulate, callbacks=every,
        enable_checkpointing=bool(folder), use_distributed_sampler=False, **quiet, **options,
    )  # fmt: skip


@pytest.fixture
def rows_seen(data):
    """fit(steps, ...) → the rows of each optimizer step."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    corpus = corpus_of(data.dir.parent)

    def fit(steps, resume=None, config=ROWS, save=None, **options):
        model, module = Watcher(), TokenDataModule(corpus, config)
        trainer = trainer_for(steps, config.accumulation(1), save, limit_val_batches=0, **options)
        trainer.fit(model, datamodule=module, ckpt_path=resume, weights_only=True)
        assert trainer.global_step == steps
        return [model.rows[i : i + config.per_step] for i in range(0, len(model.rows), config.per_step)]

    yield fit
    logger.setLevel(level)  # others look at what is printed


def test_resume_continues_at_the_exact_row(rows_seen, data, tmp_path):
    n_rows = (len(data.train) - 1) // 32
    steps = 2 * n_rows // 8 + 3  # into the third pass over the corpus
    whole = rows_seen(steps, save=tmp_path)
    assert len(whole) == steps
    for at in (1, n_rows // 8, steps - 1):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*not resumable.*")
            assert rows_seen(steps, tmp_path / f"step={at}.ckpt") == whole[at:]


@pytest.mark.parametrize("per_micro", [1, 2, 8])
def test_resume_with_another_split_into_micro_batches(rows_seen, tmp_path, per_micro):
    """As after a change of the rank count: Lightning's own count of micro-batches no longer fits."""
    whole = rows_seen(9, save=tmp_path)
    config = RowsConfig(length=32, per_step=8, per_micro=per_micro)
    assert rows_seen(9, tmp_path / "step=3.ckpt", config) == whole[3:]


def test_a_finished_run_can_be_made_longer(rows_seen, tmp_path):
    rows_seen(4, save=tmp_path)
    assert rows_seen(7, tmp_path / "step=4.ckpt") == rows_seen(7)[4:]


def test_a_run_is_one_epoch_so_that_progress_has_an_end(data):
    module = TokenDataModule(corpus_of(data.dir.parent), ROWS)
    trainer = trainer_for(40, limit_val_batches=0)
    trainer.fit(Watcher(), datamodule=module)
    assert trainer.num_training_batches == 80 and trainer.current_epoch == 1


def test_validate_and_test_score_every_held_out_byte(data):
    module = TokenDataModule(corpus_of(data.dir.parent), ROWS)
    for loop in (trainer_for(1).validate, trainer_for(1).test):
        model = Watcher()
        loop(model, datamodule=module, verbose=False)
        assert model.heldout_bytes == module.heldout_bytes == data.manifest["heldout_bytes"]


def test_a_checkpoint_can_be_validated_on_rows_of_another_length(rows_seen, data, tmp_path):
    rows_seen(2, save=tmp_path)
    module = TokenDataModule(corpus_of(data.dir.parent), RowsConfig(length=100, per_step=8, per_micro=4))
    trainer_for(1).validate(Watcher(), datamodule=module, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)


def test_a_checkpoint_from_before_there_was_domain_run_goes_on(rows_seen, tmp_path):
    whole = rows_seen(5, save=tmp_path)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert saved["TokenDataModule"].pop("rows.domain_run") == 1
    for name in ("rows.ramp", "step", "taken"):  # nor these
        saved["TokenDataModule"].pop(name)
    torch.save(saved, tmp_path / "old.ckpt")
    assert rows_seen(5, tmp_path / "old.ckpt") == whole[2:]


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_run_needs_a_number_of_steps(data):
    module = TokenDataModule(corpus_of(data.dir.parent), ROWS)
    passes = -(-((len(data.train) - 1) // 32) // 8)
    with pytest.raises(ConfigError, match=f"max_steps=-1: .* one pass over this corpus is {passes}"):
        trainer_for(-1, max_epochs=1).fit(Watcher(), datamodule=module)


def test_accumulation_must_be_what_the_rows_say(data):
    module = TokenDataModule(corpus_of(data.dir.parent), ROWS)
    with pytest.raises(ConfigError, match="accumulate_grad_batches=3: .* are 2 micro-batches; set it to 2"):
        trainer_for(5, accumulate=3).fit(Watcher(), datamodule=module)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"length": 16}, "rows.length=32"), ({"seed": 1}, "rows.seed=0"), ({"domain_run": 2}, "rows.domain_run=1")],
)
def test_a_checkpoint_of_other_rows_is_refused(rows_seen, tmp_path, change, said):
    rows_seen(2, save=tmp_path)
    other = RowsConfig(**{"length": 32, "per_step": 8, "per_micro": 4} | change)
    with pytest.raises(ConfigError, match=f"the checkpoint was trained with {said}, this run has"):
        rows_seen(4, tmp_path / "step=2.ckpt", other)
