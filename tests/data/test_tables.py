"""Tables of every kind, packed or not: the same rows, and an error that names file, row and fix."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections import Counter

import pytest

from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data.corpora import documents, expected

ROWS = [{"id": i, "text": f"sentence {i}: a, \"b\" and\n'c' é", "url": "x"} for i in range(5)]
TEXTS = [row["text"] for row in ROWS]


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def parquet(rows=ROWS, **options) -> bytes:
    pyarrow, module = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    module.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    try:
        from compression.zstd import compress
    except ImportError:
        compress = pytest.importorskip("zstandard").compress
    return compress(content)


CONTENT = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda: json.dumps(ROWS).encode(),
    ".csv": lambda: table(","),
    ".tsv": lambda: table("\t"),
    ".parquet": parquet,
}
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
PACKED = [(kind, pack) for kind in CONTENT for pack in PACK if kind != ".parquet" or not pack]


def read(folder, skipped=None, **changes) -> list[str]:
    return [d.text for d in documents(CorpusConfig(source="files", path=str(folder), **changes), skipped)]


def refused(folder, pattern: str, **changes) -> None:
    with pytest.raises(ConfigError, match=pattern):
        read(folder, **changes)


@pytest.mark.parametrize(("kind", "pack"), PACKED)
@pytest.mark.parametrize("spelled", [str.lower, str.upper])
def test_every_kind_gives_the_same_rows(tmp_path, kind, pack, spelled):
    path = tmp_path / ("a" + spelled(kind + pack))
    path.write_bytes(PACK[pack](CONTENT[kind]()))
    skipped = Counter()
    assert read(tmp_path, skipped) == TEXTS and not skipped
    assert next(documents(CorpusConfig(source="files", path=str(path)))).name == f"{path.name}:1"
    assert expected(CorpusConfig(source="files", path=str(path))) in (None, 5)


@pytest.mark.parametrize("pack", PACK)
def test_packed_text_is_one_document(tmp_path, pack):
    (tmp_path / f"a.txt{pack}").write_bytes(PACK[pack]("Grüße\n".encode()))
    assert read(tmp_path) == ["Grüße\n"]


@pytest.mark.parametrize("pack", [p for p in PACK if p])
def test_several_frames_in_one_file_are_all_read(tmp_path, pack):
    """As pzstd, bgzip and `cat a.gz b.gz` write them."""
    halves = lines(ROWS[:3]), lines(ROWS[3:])
    (tmp_path / f"a.jsonl{pack}").write_bytes(b"".join(map(PACK[pack], halves)))
    assert read(tmp_path) == TEXTS


def test_json_is_never_trained_on_as_it_stands(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff {"text": "one"}\n{"text": "two"}')  # lines under the wrong name
    (tmp_path / "b.json").write_text('{"text":\n "three"}')
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    skipped = Counter()
    assert read(tmp_path, skipped) == ["one", "two", "three"]
    assert skipped == {"JSON without 'text'": 1, "JSON without rows": 1}


def test_a_json_array_larger_than_a_block(tmp_path, monkeypatch):
    for block in (1, 7, 50, 10_000):
        monkeypatch.setattr("sigma_lite.data.json_values.BLOCK", block)
        (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
        assert read(tmp_path) == TEXTS


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("kind", "pack"), [p for p in PACKED if p[1]])
def test_a_packed_file_that_was_cut_is_named(tmp_path, kind, pack):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "first"}]))
    whole = PACK[pack](CONTENT[kind]())
    for content in (whole[:-9], whole[: len(whole) // 2], b"no such format " * 9):
        (tmp_path / f"b{kind}{pack}").write_bytes(content)
        refused(tmp_path, rf"b{kind}{pack} cannot be read after row \d \(.*: mend it or copy it again")
    (tmp_path / f"b{kind}{pack}").rename(tmp_path / f"b.txt{pack}")
    refused(tmp_path, rf"cannot read .*b\.txt{pack} of the corpus \(.*copy it again")


BROKEN = {
    "a.jsonl": (lines()[:-20], r"a\.jsonl line 5 is not valid JSON .* mend that line or take it out"),
    "b.jsonl": (b"[" * 100_000 + b"\n", r"b\.jsonl line 1 is not valid JSON"),
    "c.jsonl": (b'{"text": "caf\xe9"}\n', r"c\.jsonl line 1 is not valid JSON .*utf-8"),
    "a.json": (json.dumps(ROWS).encode()[:-20], r"a\.json is not valid JSON after row 4 .*: mend it or copy it again"),
    "b.json": (json.dumps(ROWS).encode()[:-1], r"b\.json is not valid JSON after row 5 \(the array has no end"),
    "c.json": (b'[{"text": "a"}] more', r"c\.json is not valid JSON after row 1 \(something follows"),
    "d.json": (b'[{"text": "a"}, 3]', r"d\.json row 2 holds int: each row must be a JSON object"),
    "e.json": (b"{'text': 3}", r"e\.json is not valid JSON after row 0"),
    "a.csv": (b'id,text\n1,fine\n2,"open\n', r"a\.csv cannot be read after row 1 \(unexpected end"),
    "b.csv": (b"id,text\n1,caf\xe9\n", r"b\.csv cannot be read after row 0 \(.*utf-8"),
    "c.csv": (b"id,text\n1,one\n2,a,b\n", r"c\.csv row 2 \(line 3\) has more values than the 2 columns"),
    "d.csv": (b"id,text\n1,one\n2\n", r"d\.csv row 2 \(line 3\) has no column 'text'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_among_others_is_named_with_its_row(tmp_path, name):
    (tmp_path / "0.jsonl").write_bytes(lines([{"text": "before"}]))
    (tmp_path / "z.jsonl").write_bytes(lines([{"text": "behind"}]))
    (tmp_path / name).write_bytes(BROKEN[name][0])
    refused(tmp_path, BROKEN[name][1])


def test_a_parquet_file_that_is_damaged_inside(tmp_path):
    rows = [{"text": f"{i} " * 40} for i in range(4000)]
    content = bytearray(parquet(rows, row_group_size=1000, compression="zstd", use_dictionary=False))
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(content)
    refused(tmp_path, r"a\.parquet cannot be read after row \d+ \(.*: mend it or copy it again")


def test_zstd_without_a_library_says_what_to_install(tmp_path, monkeypatch):
    for module in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"anything")
    refused(tmp_path, r"reading .*a\.jsonl\.zst needs the package 'zstandard': run `pip install zstandard`")


def test_packed_parquet(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"x"))
    refused(tmp_path, r"a\.parquet\.gz: parquet is packed inside already: unpack the file")


# --------------------------------------------------------------------------------------------------------------- column


@pytest.mark.parametrize("kind", CONTENT)
def test_rows_without_the_column_may_count_as_empty(tmp_path, kind):
    (tmp_path / f"a{kind}").write_bytes(CONTENT[kind]())
    (tmp_path / "b.jsonl").write_bytes(lines([{"body": "one"}, {"id": 3}]))
    refused(tmp_path / f"a{kind}", rf"a\{kind}.* has no column 'body'; .*missing_text to 'empty'", text_field="body")
    skipped = Counter()
    assert read(tmp_path, skipped, text_field="body", missing_text="empty") == ["one"] and skipped == {"empty": 6}


def test_the_hint_names_a_column_of_text_or_none(tmp_path):
    path = tmp_path / "a.jsonl"

    def hint(row: dict) -> str:
        path.write_bytes(lines([row]))
        with pytest.raises(ConfigError) as error:
            read(path)
        return str(error.value)

    assert "did you mean text_field='content'?" in hint({"id": 1, "content": "x"})
    assert "did you mean text_field='Text'?" in hint({"next": 5, "Text": "x"})
    assert "did you mean text_field='story'?" in hint({"id": 1, "story": "x"})  # the only one that holds text
    for row in ({"id": 1, "n": 2}, {"id": "a", "url": "b"}, {"texts": ["a"]}):
        assert "did you mean" not in hint(row)
    assert "'c11' and 28 more;" in hint({f"c{i}": i for i in range(40)})
