"""Data made by other code: the same text may then be other tokens, and a folder does not show it."""

import hashlib
import json
import warnings

import pytest

from sigma_lite.config import ConfigError
from sigma_lite.data import shards
from sigma_lite.data.shards import prepare

from .conftest import corpus_of, prepare_quietly

MADE = {1: "7d4eaba262dbbc1f"}  # recipe: digest of the tokens, kinds and split of the small corpus


def digest(data) -> str:
    found = hashlib.sha256()
    for split in ("train", "heldout"):
        stream = getattr(data, split)
        for array in stream.read(0, len(stream)):
            found.update(array.astype("<u4").tobytes())
    found.update(json.dumps([[row["name"], row["split"], row["bytes"]] for row in data.documents()]).encode())
    return found.hexdigest()[:16]


def test_a_change_of_the_tokens_needs_a_new_recipe(data):
    """If this fails, old folders hold what this code would not make: raise shards.RECIPE and write the new digest beside."""
    assert MADE[shards.RECIPE] == digest(data)
    assert data.manifest["recipe"] == data.facts()["recipe"] == shards.RECIPE


def older(folder) -> None:
    """As a version of sigma-lite without recipes left it."""
    for name in ("settings.json", "manifest.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text("utf-8"))
            del content["recipe"]
            (folder / name).write_text(json.dumps(content))


def test_a_finished_folder_of_an_older_recipe_is_used_and_that_is_said(fresh, monkeypatch):
    prepare_quietly(corpus_of(fresh))
    older(fresh / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_quietly(corpus_of(fresh)).facts()["recipe"] == 1
    monkeypatch.setattr(shards, "RECIPE", 2)
    with pytest.warns(
        UserWarning, match=r"older sigma-lite \(recipe 1, now 2\): delete the folder to prepare it anew, but a run"
    ):
        assert prepare_quietly(corpus_of(fresh)).facts()["recipe"] == 1


def test_two_recipes_are_not_mixed_in_one_folder(fresh, monkeypatch):
    prepare_quietly(corpus_of(fresh))
    older(fresh / "data")
    (fresh / "data" / "manifest.json").unlink()
    (fresh / "data" / "train-00001.bin").unlink()
    monkeypatch.setattr(shards, "RECIPE", 2)
    with pytest.raises(ConfigError, match=r"begun by an older sigma-lite \(recipe 1, this is 2\).*: delete it"):
        prepare_quietly(corpus_of(fresh))


def test_a_newer_recipe_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(shards, "RECIPE", 3)
    prepare_quietly(corpus_of(fresh))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"newer sigma-lite \(recipe 3, this knows 1\): set data.corpus.dir"):
        prepare(corpus_of(fresh), progress=False)
