"""What a disk does: the newest checkpoint is not what was written, or a token file too large to be hashed each time."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import tiny
from test_resume import diary, same

from sigma_lite import cli
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, newest_whole, read_checkpoint, step_of
from sigma_lite.data import verified
from sigma_lite.data.shards import load
from sigma_lite.storage import StorageError
from sigma_lite.train.callbacks import verify_data
from sigma_lite.train.module import SigmaLit


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    if how == "emptied":
        content = b""
    if how == "altered":
        content[-1000] ^= 1
    path.write_bytes(content)


@pytest.fixture
def run(place, finished):
    shutil.copytree(finished / "run", place / "run")
    return place / "run"


@pytest.mark.parametrize("how", ["cut", "emptied", "altered"])
def test_fit_goes_on_from_the_one_before(run, finished, capsys, how):
    """Also where the run was finished: its last steps are made again, to the same weights and the same diary."""
    damage(newest_checkpoint(run), how)
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0
    assert "step=000012.safetensors: cut or altered, so step=000010.safetensors" in capsys.readouterr().err
    same(read_checkpoint(newest_checkpoint(run)), read_checkpoint(newest_checkpoint(finished / "run")))
    assert diary(run) == diary(finished / "run")


def test_generate_and_validate_take_the_one_before_and_say_so(run, capsys):
    damage(newest_checkpoint(run), "altered")
    for line in ("generate run --max-new-tokens=2", "validate -c tiny.yaml", "predict -c tiny.yaml"):
        assert tiny.refused(cli.main, *line.split()) == 0
        assert capsys.readouterr().err.count("step=000010.safetensors, the one before, is taken") == 1


def test_an_older_one_is_not_taken_for_one_that_may_not_be_read(run, monkeypatch):
    """No permission is no damage: training again what is there would be the wrong help."""

    def refused(path):
        raise StorageError(f"cannot read checkpoint {path}: Permission denied")

    monkeypatch.setattr("sigma_lite.checkpoint.read_settings", refused)
    with pytest.raises(StorageError, match="step=000012.*Permission denied"):
        newest_whole(run)


def test_a_folder_whose_pieces_are_short_is_damaged(run, monkeypatch):
    """Of a sharded checkpoint one process looks at sizes only."""
    from sigma_lite import checkpoint

    newest = newest_checkpoint(run)
    whole = newest.read_bytes()
    newest.unlink()
    checkpoint.write_checkpoint(newest / checkpoint.REST, {"tree": {"settings": "{}"}, "files": {"a.safetensors": {}}})
    said = []
    assert step_of(newest_whole(run, said.append)) == 10 and len(said) == 1  # the piece is missing
    (newest / "a.safetensors").write_bytes(whole)
    assert newest_whole(run, said.append) == newest and len(said) == 1
    (newest / "a.safetensors").write_bytes(whole[:-1])
    assert step_of(newest_whole(run, said.append)) == 10
    (newest / checkpoint.REST).unlink()
    assert step_of(newest_whole(run, said.append)) == 10
    assert [step_of(path) for path in checkpoints(run)] == [10, 12]  # nothing is deleted


# --------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def large(place, monkeypatch):
    """The training tokens count as a file too large to be hashed at every start."""
    shard = Path("prepared/train-00000.bin")
    for module in (verified, "sigma_lite.data.stream"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.ALWAYS_HASHED", shard.stat().st_size)
    return shard


def slow_steps(monkeypatch) -> None:
    original = SigmaLit.training_step

    def training_step(self, *args):
        time.sleep(0.05)
        return original(self, *args)

    monkeypatch.setattr(SigmaLit, "training_step", training_step)


def test_a_large_file_is_hashed_once_and_that_is_recorded(large, monkeypatch, capsys):
    slow_steps(monkeypatch)
    read = []
    original = verified.verify

    def verify(folder, files, stopped):
        read.extend(entry["file"] for entry in files)
        return original(folder, files, stopped)

    monkeypatch.setattr(verify_data, "verify", verify)
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0
    assert "comparing the checksums of 1 large files" in capsys.readouterr().out
    assert read == ["train-00000.bin"] and not verified.unverified(load("prepared"))
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--trainer.default_root_dir=again") == 0
    assert read == ["train-00000.bin"]
    large.touch()  # written since
    assert [entry["file"] for entry in verified.unverified(load("prepared"))] == ["train-00000.bin"]


def test_an_altered_large_file_ends_the_run(large, monkeypatch, capsys):
    slow_steps(monkeypatch)
    damage(large, "altered")
    load("prepared")  # sees nothing
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--trainer.max_steps=200", "--save.every=200") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"sigma-lite: {large} was altered after it was written") and "begin it anew" in said
    assert newest_checkpoint("run") is None and not Path("prepared/verified.json").exists()


def test_a_reader_that_is_stopped_records_nothing(large):
    verified.verify(Path("prepared"), verified.unverified(load("prepared")), lambda: True)
    assert verified.unverified(load("prepared")) and not Path("prepared/verified.json").exists()
    Path("prepared/verified.json").write_text("[")  # such as a full disk leaves
    assert verified.unverified(load("prepared"))
