"""Which files a path names: odd names, links that lead back, globs, and what is left out and said."""

import os
from collections import Counter
from pathlib import Path

import pytest

from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data.corpora import documents
from sigma_lite.data.listing import Skipped


def names(path, skipped=None, **changes) -> list[str]:
    return [d.name for d in documents(CorpusConfig(source="files", path=str(path), **changes), skipped)]


def write(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")


@pytest.mark.parametrize("folder", ["books [2024]", "a[b", "[x]", "what?", "*", "{a,b}", "a]b[c]", "[!a] é"])
def test_a_name_that_is_there_is_no_pattern(tmp_path, folder):
    write(tmp_path, f"{folder}/a.txt", f"{folder}/sub [1]/b.md")
    both = ["a.txt", "sub [1]/b.md"]
    assert names(tmp_path / folder) == both
    assert names(tmp_path / folder / "**") == both
    assert names(tmp_path / folder / "*.txt") == ["a.txt"]
    assert names(tmp_path / folder / "a.txt") == ["a.txt"]
    assert names(tmp_path / folder / "sub [1]" / "*") == ["b.md"]


def test_brackets_are_a_pattern_where_no_such_name_is_there(tmp_path):
    write(tmp_path, "a1/x.txt", "a2/x [1].md", "b1/x.txt", "a1/y.txt")
    assert names(tmp_path / "a[12]" / "x*") == ["a1/x.txt", "a2/x [1].md"]
    assert names(tmp_path / "a*" / "x [1].md") == ["a2/x [1].md"]  # brackets behind a star are read both ways
    assert names(tmp_path / "**" / "[xy].txt") == ["a1/x.txt", "a1/y.txt", "b1/x.txt"]
    assert names(tmp_path / "?1" / "**" / "*.txt") == ["a1/x.txt", "a1/y.txt", "b1/x.txt"]


def test_relative_globs(tmp_path, monkeypatch):
    write(tmp_path, "a/x.txt", "a/b/y.txt", "z.txt")
    monkeypatch.chdir(tmp_path / "a")
    assert names("**/*.txt") == ["b/y.txt", "x.txt"]
    assert names("../*.txt") == ["z.txt"]
    assert names("../a*/b/*") == ["a/b/y.txt"]


LINKS = {
    "to itself": {"self": "."},
    "two to itself": {"self": ".", "again": "."},  # as a tree that is followed this has no end
    "to the folder above": {"sub/up": ".."},
    "from one to the other": {"sub/there": "../other", "other/back": "../sub"},
    "file to file": {"A.jsonl": "rows.jsonl", "sub/b.txt": "a.txt"},
    "folder to folder": {"0": "sub"},
}


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("pattern", ["", "**", "**/*"])
def test_a_file_is_read_once_however_many_links_lead_to_it(tmp_path, links, pattern):
    write(tmp_path, "sub/a.txt", "other/c.txt")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    assert names(tmp_path / pattern) == ["other/c.txt", "sub/a.txt", "rows.jsonl:1", "rows.jsonl:2"]


def test_links_out_of_the_folder_are_followed(tmp_path):
    write(tmp_path, "elsewhere/a.txt", "text/b.txt")
    (tmp_path / "text/link").symlink_to("../elsewhere")
    (tmp_path / "text/file.txt").symlink_to("../elsewhere/a.txt")
    skipped = Counter()
    assert names(tmp_path / "text", skipped) == ["b.txt", "link/a.txt"] and skipped == {"duplicate": 1}


def test_a_hard_link_is_a_duplicate(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    skipped = Skipped()
    assert names(tmp_path, skipped) == ["a.jsonl:1"]
    assert skipped == {"duplicate": 1} and skipped.first == {"duplicate": "b.jsonl"}


def test_what_is_no_document_is_counted(tmp_path):
    write(tmp_path, "a.txt", ".hidden", ".git/config", "__pycache__/a.pyc")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    skipped = Counter()
    assert names(tmp_path, skipped) == ["a.txt"]
    assert skipped == {"hidden": 2, "a broken link": 2, "not a file": 1}


def test_the_folder_that_prepare_writes_is_known_by_any_name(tmp_path):
    write(tmp_path, "a.txt", "data/tokenizer.json")
    (tmp_path / "link").symlink_to("data")
    for own in ("data", "link", "data/../data"):
        assert names(tmp_path, dir=str(tmp_path / own)) == ["a.txt"]


def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("coffee")
    with open(os.fsencode(tmp_path) + b"/th\xe9.jsonl", "w") as file:
        file.write('{"text": "tea"}\n')
    assert names(tmp_path) == [r"caf\xe9.txt", r"th\xe9.jsonl:1"]


def test_a_glob_that_matches_only_folders(tmp_path):
    write(tmp_path, "a1/x.txt")
    with pytest.raises(ConfigError, match=r"a\? matches only folders: write .*a\?/\*\* for"):
        names(tmp_path / "a?")


# --------------------------------------------------------------------------------------------------------------- paths


def test_home_and_variables_are_filled_in_everywhere(tmp_path, monkeypatch):
    write(tmp_path, "text/a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    corpus = CorpusConfig(source="files", path="~/text", dir="$SCRATCH/data")
    assert (corpus.path, corpus.dir) == (str(tmp_path / "text"), str(tmp_path / "scratch/data"))
    assert names("~/t*/*.txt") == ["text/a.txt"] and names("~/text/*.txt") == ["a.txt"]
    assert CorpusConfig(source="hf", dataset="~/set").dataset == str(tmp_path / "set")
    assert CorpusConfig(source="hf", dataset="org/name").dataset == "org/name"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "is empty"),
        ("s3://bucket/data", "address"),
        ("a\0b", "zero byte"),
        ("$NO_SUCH_NAME/x", r"\$NO_SUCH_NAME stands for nothing"),
        ("~no_such_user/x", "~no_such_user stands for nothing"),
    ],
)
def test_paths_that_would_become_folders_of_an_odd_name(path, words):
    for changes in ({"dir": path}, *([{"source": "files", "path": path}] if path else [])):
        with pytest.raises(ConfigError, match=words):
            CorpusConfig(**changes)


@pytest.mark.parametrize(
    "given", [{"path": "text"}, {"dataset": "a/b"}, {"subset": "en"}, {"source": "hf", "dataset": "a/b", "path": "text"}]
)
def test_a_corpus_that_would_not_be_read_is_refused(given):
    with pytest.raises(ConfigError, match="would not be read: source .* has none; set data.corpus.source="):
        CorpusConfig(**given)
