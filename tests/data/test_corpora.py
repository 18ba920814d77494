import json
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data.corpora import Document, documents, expected, is_heldout, split_position


def files(path, **changes) -> CorpusConfig:
    return CorpusConfig(source="files", path=str(path), **changes)


def names(config: CorpusConfig) -> list[str]:
    return [d.name for d in documents(config)]


def write_rows(path, *rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------- library


def test_the_library_is_big_sorted_and_without_tests_or_duplicates():
    found = list(documents(CorpusConfig()))
    assert "json/decoder.py" in {d.name for d in found}
    assert [d.name for d in found] == sorted(d.name for d in found)
    assert len({d.text for d in found}) == len(found)
    folders = {part for d in found for part in d.name.split("/")}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any(part.startswith("test_") for part in folders)
    assert sum(len(d.text) for d in found) > 5e6


def test_a_smaller_corpus_is_the_beginning_of_the_larger_one():
    few = list(documents(CorpusConfig(max_documents=20)))
    more = list(documents(CorpusConfig(max_documents=30)))
    assert len(few) == 20 and more[:20] == few
    assert expected(CorpusConfig(max_documents=20)) == 20


# ------------------------------------------------------------------------------------------------------------- files


def test_folder_file_and_glob(tmp_path, monkeypatch):
    for name in ("b.py", "a.txt", "sub/c.md", ".hidden", "sub/__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert names(files(tmp_path)) == ["a.txt", "b.py", "sub/c.md"]
    assert names(files(tmp_path / "b.py")) == ["b.py"]
    assert names(files(tmp_path / "*.*")) == ["a.txt", "b.py"]
    assert names(files(tmp_path / "**" / "*.md")) == ["sub/c.md"]
    monkeypatch.chdir(tmp_path)
    assert names(files("*.txt")) == ["a.txt"]
    assert names(files(".")) == ["a.txt", "b.py", "sub/c.md"]


def test_the_folder_that_prepare_writes_is_no_part_of_the_corpus(tmp_path):
    for name in ("a.txt", "data/set/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert names(files(tmp_path, dir=str(tmp_path / "data" / "set"))) == ["a.txt"]


def test_text_arrives_as_it_is(tmp_path):
    text = "\ufeffa\r\nb\rc\n\n\u2028é"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert [d.text for d in documents(files(tmp_path))] == [text]


def test_what_is_left_out_is_counted(tmp_path):
    contents = {"a": b"text", "b": b"text", "c": b"", "d": b"\xff\xfe", "e": b"PK\0\3", "f": b"more"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    skipped = Counter()
    assert [d.name for d in documents(files(tmp_path), skipped)] == ["a", "f"]
    assert skipped == {"duplicate": 1, "empty": 1, "not UTF-8": 1, "binary": 1}


def test_jsonl_and_parquet_give_a_document_a_row(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    write_rows(tmp_path / "a.jsonl", {"text": "one", "n": 1}, {"n": 2, "text": "two"}, {"text": None})
    parquet.write_table(pyarrow.table({"n": [3, 4], "text": ["three", "four"]}), tmp_path / "b.parquet")
    config = files(tmp_path)
    assert [(d.name, d.text) for d in documents(config)] == [
        ("a.jsonl:1", "one"), ("a.jsonl:2", "two"), ("b.parquet:1", "three"), ("b.parquet:2", "four"),
    ]  # fmt: skip
    assert expected(config) == 5


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    skipped = Counter()
    assert [d.text for d in documents(files(tmp_path), skipped)] == ["\U0001f642"]
    assert skipped == {"not UTF-8": 1}


# ------------------------------------------------------------------------------------------------------------ errors


def refused(config: CorpusConfig, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        list(documents(config))


def test_bad_paths(tmp_path):
    refused(files(tmp_path / "nowhere"), r"corpus path .*nowhere does not exist \(looked from ")
    refused(files(tmp_path / "*.txt"), r"\*\.txt does not exist")
    refused(files(tmp_path), r"holds no document with text \(it is empty\)")
    (tmp_path / "a").write_bytes(b"\xff")
    (tmp_path / "b").write_bytes(b"")
    refused(files(tmp_path), r"holds no document with text \(1 empty, 1 not UTF-8\)")


def test_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, {"text": "fine"}, {"txt": "no", "id": 3})
    refused(files(path), r"a\.jsonl line 2 has no column 'text'; did you mean text_field='txt'\? It has 'txt', 'id'")
    path.write_text('{"text": "fine"}\n{"text": ')
    refused(files(path), r"a\.jsonl line 2 is not valid JSON")
    path.write_text('["text"]\n')
    refused(files(path), r"a\.jsonl line 1 holds list: each line must be one JSON object")
    write_rows(path, {"text": 3})
    refused(files(path), r"line 1: 'text' holds int")


def test_bad_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    refused(files(tmp_path), r"a\.parquet has no column 'text'; did you mean text_field='content'\?")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    refused(files(tmp_path, text_field="content"), r"a\.parquet is not a parquet file")
    with pytest.raises(ConfigError, match=r"a\.parquet is not a parquet file"):
        expected(files(tmp_path))


# ------------------------------------------------------------------------------------------------------ Hugging Face


def test_hugging_face_from_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "train.jsonl", *({"text": f"row {i}", "n": i} for i in range(5)))
    config = CorpusConfig(source="hf", dataset=str(tmp_path), max_documents=3)
    assert [d.text for d in documents(config)] == ["row 0", "row 1", "row 2"]
    refused(
        CorpusConfig(source="hf", dataset=str(tmp_path), text_field="txt"),
        r"row 1 has no column 'txt'; did you mean .*'text'",
    )
    refused(CorpusConfig(source="hf", dataset=str(tmp_path), split="tain"), r"\(split 'tain'\) cannot be opened")


def test_without_datasets_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(
        CorpusConfig(source="hf", dataset="a/b"),
        r"corpus source 'hf' needs the package 'datasets': run `pip install datasets`",
    )


# ------------------------------------------------------------------------------------------------------------- split


@settings(deadline=None)
@given(st.text(min_size=1), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_larger_share_keeps_what_a_smaller_one_held_out(key, a, b):
    document = Document("name", "text", key)
    assert is_heldout(document, min(a, b)) <= is_heldout(document, max(a, b))


def test_the_split_takes_its_share_and_looks_at_the_key_alone():
    positions = [split_position(Document(f"n{i}", "text", f"file {i}")) for i in range(4000)]
    for share in (0.08, 0.5):
        assert sum(p < share for p in positions) == pytest.approx(share * 4000, rel=0.15)
    assert split_position(Document("other name", "other text", "file 7")) == positions[7]


def test_rows_with_the_same_text_fall_on_the_same_side(tmp_path):
    write_rows(tmp_path / "a.jsonl", *({"text": f"text {i % 7}"} for i in range(70)))
    sides = {(d.text, is_heldout(d, 0.5)) for d in documents(files(tmp_path))}
    assert len(sides) == 7
