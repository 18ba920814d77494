"""`prepare` in parts: whoever prepares them, in whatever order, wherever killed, the same files come out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sigma_lite import cli
from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data import corpora
from sigma_lite.data.shards import load, prepare, prepare_parts

from .conftest import corpus_of, write_texts
from .test_interrupted import contents

PARTS = 3
QUIET = {"progress": False, "shard_tokens": 1500}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """A folder with a corpus in text/ and its three parts in data/, prepared by one process. Do not write into it."""
    folder = tmp_path_factory.mktemp("together")
    write_texts(folder / "text")
    prepare(corpus_of(folder, parts=PARTS), **QUIET)
    return folder


def names_of(folder: Path) -> list[str]:
    return [row["name"] for row in load(folder).documents()]


def beside(together: Path, folder: Path) -> CorpusConfig:
    """The same corpus, prepared in another folder."""
    return corpus_of(together, parts=PARTS, dir=str(folder / "data"))


# ------------------------------------------------------------------------------------------------------------ slices


def write_tables(folder: Path, files: int, rows: int) -> None:
    folder.mkdir()
    for file in range(files):
        lines = (json.dumps({"text": f"row {row} of file {file}"}) for row in range(rows))
        (folder / f"{file}.jsonl").write_text("\n".join(lines))


def sliced(config: CorpusConfig) -> list[list[str]]:
    return [[d.text for d in corpora.documents_of_part(config, part, Counter())] for part in range(config.parts)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("source", ["files", "hf", "mixed"])
def test_every_document_is_in_one_part(tmp_path, monkeypatch, source, parts):
    folder = tmp_path / "text"
    write_tables(folder, files=5, rows=4)
    config = CorpusConfig(source="files", path=str(folder), parts=parts)
    if source == "hf":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        config = CorpusConfig(source="hf", dataset=str(folder), parts=parts)
    elif source == "mixed":
        write_texts(folder)
        (folder / "a_copy.txt").write_bytes((folder / "package_1" / "module_4.py").read_bytes())
    slices = sliced(config)
    assert min(map(len, slices)) > 0 and sum(map(len, slices)) == len(set().union(*slices))
    whole = [d.text for d in corpora.documents(dataclasses.replace(config, parts=1))]
    assert sorted(itertools.chain(*slices)) == sorted(whole)
    if source == "hf":
        assert list(itertools.chain(*slices)) == whole, "parts of a dataset are neighbours, so its order stays"
    most = dataclasses.replace(config, max_documents=2 * parts + 1)
    assert [len(own) for own in sliced(most)] == [3] + [2] * (parts - 1)


def test_copies_are_left_out_and_counted_once(tmp_path):
    texts = write_texts(tmp_path)
    (tmp_path / "z_copy.txt").write_bytes((tmp_path / "one.txt").read_bytes())
    skipped = Counter()
    found = list(corpora.documents(CorpusConfig(source="files", path=str(tmp_path), parts=4), skipped))
    assert len(found) == len(texts) and skipped == {"duplicate": 1}


def test_more_parts_than_there_is_to_share_out(tmp_path, monkeypatch):
    write_tables(tmp_path / "text", files=2, rows=4)
    config = CorpusConfig(source="files", path=str(tmp_path / "text"), parts=3)
    with pytest.raises(ConfigError, match="part 2 of 3 of the corpus .* holds no document .* set parts to a smaller number"):
        list(corpora.documents(config))
    with pytest.raises(ConfigError, match="parts=0: must be at least 1"):
        dataclasses.replace(config, parts=0)
    with pytest.raises(ConfigError, match="parts=3 is more than max_documents=2: lower it"):
        dataclasses.replace(config, max_documents=2)
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"parts=3: dataset .* has 2 file\(s\); set parts to that or less"):
        list(corpora.documents(CorpusConfig(source="hf", dataset=str(tmp_path / "text"), parts=3)))


# --------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_whoever_prepares_a_part_writes_the_same_files(together, tmp_path, order):
    corpus, missing = beside(together, tmp_path), {0, 1, 2}
    for rank in order:
        missing.remove(rank)
        assert prepare_parts(corpus, rank, 3, **QUIET) == sorted(missing)
        assert not (tmp_path / "data" / "manifest.json").exists()
    prepare(corpus, **QUIET)
    assert contents(tmp_path / "data") == contents(together / "data")


def test_parts_hold_the_documents_of_the_whole(together, tmp_path):
    one = prepare(corpus_of(together, dir=str(tmp_path / "data")), **QUIET)
    parts = load(together / "data")
    assert sorted(names_of(together / "data")) == sorted(names_of(tmp_path / "data")) != names_of(together / "data")
    for name in ("train_documents", "train_bytes", "heldout_bytes"):
        assert one.manifest[name] == parts.manifest[name]


def test_a_finished_part_is_not_read_again(together, tmp_path, monkeypatch):
    corpus = beside(together, tmp_path)
    prepare_parts(corpus, 1, 3, **QUIET)
    read, original = [], corpora.documents_of_part
    monkeypatch.setattr(corpora, "documents_of_part", lambda c, part, *rest: read.append(part) or original(c, part, *rest))
    prepare(corpus, **QUIET)
    assert read == [0, 2]
    assert contents(tmp_path / "data") == contents(together / "data")


KILLED = """
import os, sys
from sigma_lite.config import CorpusConfig
from sigma_lite.data.shards import prepare_parts

path, folder, rank, renames = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rename = os.replace
def replace(a, b):
    global renames
    renames -= 1
    if renames < 0:
        os.kill(os.getpid(), 9)
    rename(a, b)
os.replace = replace
corpus = CorpusConfig(source="files", path=path, dir=folder, vocab_size=300, heldout=0.2, parts=3)
prepare_parts(corpus, rank, 3, progress=False, shard_tokens=1500)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks and SIGKILL")
def test_three_processes_at_once_killed_and_begun_again(together, tmp_path):
    corpus, chance = beside(together, tmp_path), random.Random(0)

    def start(rank: int, renames: int) -> subprocess.Popen:
        args = [together / "text", corpus.dir, rank, renames]
        return subprocess.Popen([sys.executable, "-c", KILLED, *map(str, args)])

    first = [start(rank, chance.randrange(8)) for rank in range(3)]
    assert -signal.SIGKILL in [process.wait() for process in first]
    second = [start(rank, 1000) for rank in range(3)]
    assert [process.wait() for process in second] == [0, 0, 0]
    prepare(corpus, **QUIET)
    assert contents(tmp_path / "data") == contents(together / "data")


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_says_what_is_missing_and_the_last_one_finishes(together, tmp_path, capsys):
    corpus = beside(together, tmp_path)
    own = dataclasses.asdict(corpus)
    settings = {"model": {"net": {"vocab_size": own.pop("vocab_size")}}, "data": {"corpus": own}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    command = ["prepare", "-c", str(tmp_path / "run.yaml"), "--ranks", "2", "--rank"]
    cli.main([*command, "0"])
    assert "1 of 3 parts are not finished yet" in capsys.readouterr().out
    cli.main([*command, "1"])
    assert "training and" in capsys.readouterr().out
    assert sorted(names_of(tmp_path / "data")) == sorted(names_of(together / "data"))


@pytest.mark.parametrize(
    ("rank", "ranks", "said"),
    [
        (2, 2, "rank=2: must be from 0 to ranks - 1 = 1"),
        (-1, 2, "rank=-1: must be from 0"),
        (1, 1, "rank=1: must be from 0 to ranks - 1 = 0"),
        (0, 4, "ranks=4: there are parts=3 of the corpus .* set data.corpus.parts=4 or more"),
    ],
)
def test_a_rank_that_cannot_be(together, tmp_path, rank, ranks, said):
    with pytest.raises(ConfigError, match=said):
        prepare_parts(beside(together, tmp_path), rank, ranks)
    assert not (tmp_path / "data").exists()


def test_a_folder_from_before_there_were_parts_is_still_taken(fresh):
    corpus = corpus_of(fresh)
    prepare(corpus, **QUIET)
    settings = json.loads((fresh / "data" / "settings.json").read_text("utf-8"))
    del settings["corpus"]["parts"]
    (fresh / "data" / "settings.json").write_text(json.dumps(settings))
    os.remove(fresh / "data" / "part-00000.json")
    prepare(corpus, **QUIET)
    with pytest.raises(ConfigError, match="was prepared with parts=1, not 2"):
        prepare(dataclasses.replace(corpus, parts=2), **QUIET)
