"""An interrupted `prepare` begins behind what is done: finished documents are not read again, and the files are the same."""

import json
import os
from pathlib import Path

import pytest

from sigma_lite.config import CorpusConfig
from sigma_lite.data import corpora, stages, tables
from sigma_lite.data.shards import prepare
from sigma_lite.storage import StorageError

from .test_tables import PACK

SHARD = 600  # tokens
ROWS = [
    f"document {n} of table {t}: " + f"words {n * t * 7919} and then some more; " * 3 for t in range(3) for n in range(40)
]


class Killed(BaseException):
    pass


def write_lines(folder: Path, pack: str = "") -> None:
    for table in range(3):
        lines = "\n".join(json.dumps({"text": text}) for text in ROWS[40 * table : 40 * table + 40])
        (folder / f"table{table}.jsonl{pack}").write_bytes(PACK[pack](lines.encode()))


def write_parquet(folder: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for table in range(3):
        content = arrow.table({"text": ROWS[40 * table : 40 * table + 40]})
        parquet.write_table(content, folder / f"table{table}.parquet", row_group_size=7)


def write_csv(folder: Path) -> None:
    for table in range(3):
        (folder / f"table{table}.csv").write_text("text\n" + "\n".join(ROWS[40 * table : 40 * table + 40]))


def write_json_arrays(folder: Path) -> None:
    for table in range(3):
        (folder / f"table{table}.json").write_text(json.dumps([{"text": t} for t in ROWS[40 * table : 40 * table + 40]]))


def write_files(folder: Path) -> None:
    """With what is left out on the way: copies, and a file that is no UTF-8, twice."""
    for number, text in enumerate(ROWS):
        (folder / f"{number:03}.txt").write_text(text)
    for number in (20, 90):
        (folder / f"{number:03}b.txt").write_text(ROWS[3])
        (folder / f"{number:03}c.txt").write_bytes(b"caf\xe9")


CORPORA = {
    "files": write_files,
    "jsonl": write_lines,
    "jsonl.gz": lambda folder: write_lines(folder, ".gz"),
    "jsonl.zst": lambda folder: write_lines(folder, ".zst"),
    "parquet": write_parquet,
    "csv": write_csv,
    "json": write_json_arrays,
}


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """What is read from now on: "FILE row N" of tables, names of whole files."""
    seen: list[str] = []
    text_of, whole = tables.text_of, corpora._read

    def row(given, column, where):
        seen.append(where.split(" (")[0].replace(" line ", " row "))
        return text_of(given, column, where)

    monkeypatch.setattr(tables, "text_of", row)
    monkeypatch.setattr(corpora, "_read", lambda path: seen.append(str(path)) or whole(path))
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def prepared(corpus: CorpusConfig) -> None:
    prepare(corpus, progress=False, shard_tokens=SHARD)


def interrupt(monkeypatch, corpus: CorpusConfig, shard: int) -> None:
    """Prepare, and die before `shard` is written."""
    write = stages._write_shard

    def write_or_die(folder, tail, *rest):
        if int(tail[-5:]) == shard:
            raise Killed
        return write(folder, tail, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages, "_write_shard", write_or_die)
        prepared(corpus)


def half_prepared(tmp_path: Path, monkeypatch) -> CorpusConfig:
    """Three tables of lines, of which two shards were finished."""
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text")
    corpus = CorpusConfig(source="files", path=str(tmp_path / "text"), dir=str(tmp_path / "a"), vocab_size=300, heldout=0.2)
    interrupt(monkeypatch, corpus, 2)
    return corpus


def names_in(folder: Path, shards: int) -> list[str]:
    lines = (line for n in range(shards) for line in (folder / f"documents-{n:05}.jsonl").read_text().splitlines())
    return [json.loads(line)["name"] for line in lines]


@pytest.mark.parametrize("kind", CORPORA)
@pytest.mark.parametrize("killed_at", [1, 3])
def test_finished_documents_are_not_read_again(tmp_path, monkeypatch, read, kind, killed_at):
    text = tmp_path / "text"
    text.mkdir()
    CORPORA[kind](text)
    corpus = CorpusConfig(source="files", path=str(text), dir=str(tmp_path / "a"), vocab_size=300, heldout=0.2)
    whole = CorpusConfig(source="files", path=str(text), dir=str(tmp_path / "b"), vocab_size=300, heldout=0.2)
    prepared(whole)
    interrupt(monkeypatch, corpus, killed_at)
    finished = {str(text / name.replace(":", " row ")) for name in names_in(tmp_path / "a", killed_at)}
    read.clear()
    prepared(corpus)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    everything = {
        str(text / name.replace(":", " row ")) for name in names_in(tmp_path / "b", len(list(text.parent.glob("b/shard-*"))))
    }
    assert len(everything) == len(ROWS) and 0 < len(finished) < len(ROWS)
    assert not finished & set(read)
    assert everything - finished <= set(read) and len(read) == len(set(read))


def test_plain_lines_and_parquet_are_not_even_passed_over(tmp_path, monkeypatch):
    """A file of 100 GB would take minutes."""
    for kind, name in (("jsonl", "table0.jsonl"), ("parquet", "table0.parquet")):
        (tmp_path / kind).mkdir()
        CORPORA[kind](tmp_path / kind)
        path, place = tmp_path / kind / name, {}
        rows = tables.table_rows(path, tables.Column("text"), place)
        first = [next(rows) for _ in range(30)]
        assert place["row"] == 30
        content = bytearray(path.read_bytes())
        content[8 : len(content) // 3] = b"\xff" * (len(content) // 3 - 8)  # what is done, gone
        path.write_bytes(content)
        rest = list(tables.table_rows(path, tables.Column("text"), dict(place)))
        assert [*first, *rest] == list(enumerate(ROWS[:40], start=1))


def test_a_dataset_goes_on_where_it_was(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text")
    options = {"source": "hf", "dataset": str(tmp_path / "text"), "vocab_size": 300, "heldout": 0.2}
    prepared(CorpusConfig(**options, dir=str(tmp_path / "b")))
    corpus, rows, text_of = CorpusConfig(**options, dir=str(tmp_path / "a")), [], corpora.text_of
    interrupt(monkeypatch, corpus, 2)
    done = len(names_in(tmp_path / "a", 2))
    monkeypatch.setattr(corpora, "text_of", lambda *given: rows.append(given[2]) or text_of(*given))
    prepared(corpus)
    assert len(rows) == len(ROWS) - done > 0
    a, b = (contents(tmp_path / name) for name in "ab")
    sidecars = [name for name in b if name.startswith("shard-")]  # datasets says the same place in different words
    assert [a.pop(name) and name for name in sidecars] == [b.pop(name) and name for name in sidecars]
    assert a == b


def test_a_file_that_was_touched_is_compared_and_one_that_changed_is_refused(tmp_path, monkeypatch, read):
    corpus = half_prepared(tmp_path, monkeypatch)
    table, before = tmp_path / "text" / "table0.jsonl", contents(tmp_path / "a")
    content = table.read_text()
    table.write_text(content.replace("document 0", "document x"))
    with pytest.raises(StorageError, match="the documents changed since .* was begun"):
        prepared(corpus)
    assert contents(tmp_path / "a") == before
    table.write_text(content)
    os.utime(table, (1, 1))
    read.clear()
    prepared(corpus)
    assert f"{table} row 1" in read


def test_max_documents_are_counted_over_the_interruption(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    write_lines(tmp_path / "text", ".gz")
    options = {"source": "files", "path": str(tmp_path / "text"), "vocab_size": 300, "heldout": 0.2, "max_documents": 70}
    prepared(CorpusConfig(**options, dir=str(tmp_path / "b")))
    corpus = CorpusConfig(**options, dir=str(tmp_path / "a"))
    interrupt(monkeypatch, corpus, 2)
    prepared(corpus)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(names_in(tmp_path / "a", len(list((tmp_path / "a").glob("shard-*"))))) == 70


def test_a_sidecar_of_before_is_read_from_the_beginning(tmp_path, monkeypatch, read):
    corpus = half_prepared(tmp_path, monkeypatch)
    for path in (tmp_path / "a").glob("shard-*.json"):
        shard = json.loads(path.read_text())
        del shard["next"]
        path.write_text(json.dumps(shard))
    prepared(corpus)
    assert len({row for row in read if row.endswith(" row 1")}) == 3
