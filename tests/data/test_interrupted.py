import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sigma_lite.config import ConfigError
from sigma_lite.data.shards import load, prepare
from sigma_lite.storage import StorageError

from .conftest import corpus_of, prepare_quietly


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock"}


# --------------------------------------------------------------------------------------------------- again, and again


def test_a_second_call_does_nothing(fresh):
    first = prepare_quietly(corpus_of(fresh))
    folder = fresh / "data"
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    shutil.rmtree(fresh / "text")  # not even reading the corpus
    assert prepare_quietly(corpus_of(fresh)).manifest == first.manifest
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times


def test_the_size_of_a_shard_changes_no_token(fresh, data):
    whole = prepare(corpus_of(fresh), progress=False)
    assert len(whole.manifest["shards"]) == 1 < len(data.manifest["shards"])
    for one, many in ((whole.train, data.train), (whole.heldout, data.heldout)):
        assert all((a == b).all() for a, b in zip(one.read(0, len(one)), many.read(0, len(many)), strict=True))
    assert whole.manifest["baselines"] == data.manifest["baselines"]


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from sigma_lite.config import CorpusConfig
from sigma_lite.data.shards import prepare

path, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def attempt(name, before_child=lambda: None, from_parent=lambda pid: None):
    '''Whether `prepare` ended by itself. The parent never runs it, so every child starts from a clean library.'''
    pid = os.fork()
    if pid == 0:
        before_child()
        corpus = CorpusConfig(source="files", path=path, dir=str(folder / name), vocab_size=300, heldout=0.2)
        prepare(corpus, progress=False, shard_tokens=3000)
        os._exit(0)
    from_parent(pid)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status == 0

def die_at_rename(number):
    rename, left = os.replace, [number]
    def replace(a, b):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
    os.replace = replace

def files(name):
    return {p.name: p.read_bytes() for p in (folder / name).iterdir()}

assert attempt("whole")
whole = files("whole")

renames = 0
while not attempt(f"at-{renames}", lambda: die_at_rename(renames)):
    assert "manifest.json" not in files(f"at-{renames}")
    assert attempt(f"at-{renames}")
    assert files(f"at-{renames}") == whole, renames
    renames += 1

random.seed(seed)
kills = 0
def kill_later(pid):
    time.sleep(random.uniform(0.0, 0.004) * 1.4**kills)
    os.kill(pid, signal.SIGKILL)
while not attempt("any-time", from_parent=kill_later):
    kills += 1
assert files("any-time") == whole
print(renames, kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_any_moment_the_same_call_continues(fresh):
    command = [sys.executable, "-c", KILLER, str(fresh / "text"), str(fresh), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    renames, _ = map(int, done.stdout.split())
    assert renames == len(contents(fresh / "whole"))  # each file was once the one that the kill forestalled


def test_finished_shards_are_kept(fresh):
    prepare_quietly(corpus_of(fresh))
    folder = fresh / "data"
    before = contents(folder)
    again = ("manifest.json", "part-00000.json")
    kept = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if "00001" not in p.name and p.name not in again}
    for name in ("manifest.json", "train-00001.bin", "shard-00001.json"):
        (folder / name).unlink()
    prepare_quietly(corpus_of(fresh))
    assert contents(folder) == before
    assert {name: (folder / name).stat().st_mtime_ns for name in kept if not name.endswith(".lock")} == {
        name: time for name, time in kept.items() if not name.endswith(".lock")
    }


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_a_second_prepare_waits_for_the_first(fresh):
    import fcntl

    code = """
        import sys
        from sigma_lite.config import CorpusConfig
        from sigma_lite.data.shards import prepare
        corpus = CorpusConfig(source="files", path=sys.argv[1], dir=sys.argv[2], vocab_size=300, heldout=0.2)
        print("begins", flush=True)
        prepare(corpus, progress=False)
    """
    (fresh / "data").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(code), str(fresh / "text"), str(fresh / "data")]
    with open(fresh / "data" / "tokenizer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the first one does
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "begins\n"
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        assert [p.name for p in (fresh / "data").iterdir()] == ["tokenizer.lock"]
    assert second.wait() == 0
    load(fresh / "data", full_check=True)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["train-00001.bin", "heldout-00000.kinds.bin", "tokenizer.json", "documents-00000.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_file_is_named_and_deleting_it_heals(fresh, name, damage):
    corpus = corpus_of(fresh)
    prepare_quietly(corpus)
    path = fresh / "data" / name
    whole = contents(path.parent)
    if damage == "cut":
        path.write_bytes(whole[name][:-3])
    elif damage == "altered":
        middle = len(whole[name]) // 2
        path.write_bytes(whole[name][:middle] + bytes([whole[name][middle] ^ 1]) + whole[name][middle + 1 :])
    else:
        path.unlink()
    fix = "run `sigma-lite prepare`" if damage == "missing" else "delete it and run `sigma-lite prepare`"
    with pytest.raises(StorageError, match=f"{name} .*{fix}"):
        load(path.parent)
    if damage != "missing":
        damaged = contents(path.parent)
        with pytest.raises(StorageError, match=f"{name} .*{fix}"):
            prepare_quietly(corpus)
        assert contents(path.parent) == damaged
        path.unlink()
    prepare_quietly(corpus)
    assert contents(path.parent) == whole


@pytest.mark.parametrize("name", ["settings.json", "manifest.json"])
def test_a_damaged_description_is_named_and_the_fix_works(fresh, name):
    before = prepare_quietly(corpus_of(fresh)).manifest
    (fresh / "data" / name).write_text("{")
    what = "the folder" if name == "settings.json" else "it"
    with pytest.raises(StorageError, match=f"{name} is damaged .*delete {what} and run `sigma-lite prepare`"):
        prepare_quietly(corpus_of(fresh))
    shutil.rmtree(fresh / "data") if what == "the folder" else (fresh / "data" / name).unlink()
    assert prepare_quietly(corpus_of(fresh)).manifest == before


def test_documents_that_changed_under_an_unfinished_prepare_are_noticed(fresh):
    prepare_quietly(corpus_of(fresh))
    for name in ("manifest.json", "part-00000.json"):
        (fresh / "data" / name).unlink()
    (fresh / "text" / "blank.txt").write_text("other text")
    with pytest.raises(StorageError, match="the documents changed since .* delete it to prepare it anew"):
        prepare_quietly(corpus_of(fresh))


def test_a_shard_rebuilt_from_other_documents_is_not_taken_for_the_old_one(fresh):
    prepare(corpus_of(fresh), progress=False)
    (fresh / "data" / "train-00000.bin").unlink()
    (fresh / "text" / "package_0" / "module_3.py").write_text("other = 'text'\n")
    with pytest.raises(StorageError, match="what was built again differs, the corpus has changed"):
        prepare(corpus_of(fresh), progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize(
    ("kilobytes", "full_at"), [(0, "settings.json"), (2, "tokenizer.json"), (1, "documents-00000.jsonl")]
)
def test_a_full_disk_loses_nothing(fresh, kilobytes, full_at, data):
    code = """
        import resource, sys
        from sigma_lite.config import CorpusConfig
        from sigma_lite.data.shards import prepare
        from sigma_lite.storage import StorageError
        corpus = CorpusConfig(source="files", path=sys.argv[1], dir=sys.argv[2], vocab_size=300, heldout=0.2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]) * 1024, resource.RLIM_INFINITY))
        try:
            prepare(corpus, progress=False, shard_tokens=1500)
        except StorageError as error:
            print(error)
    """
    folder = fresh / "data"
    if full_at.startswith("documents"):  # an earlier call got as far as the tokenizer
        shutil.copytree(data.dir, folder, ignore=shutil.ignore_patterns("*0000*", "manifest.json"))
        change_path(folder, fresh / "text")
    arguments = [str(fresh / "text"), str(folder), str(kilobytes)]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True)
    assert f"no room to write {folder / full_at}" in done.stdout and "free some space" in done.stdout, done.stderr
    assert not list(folder.glob("*.partial"))
    assert prepare_quietly(corpus_of(fresh)).manifest["baselines"] == data.manifest["baselines"]


def change_path(folder: Path, text: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    settings["corpus"]["path"] = str(text)
    (folder / "settings.json").write_text(json.dumps(settings))


# ------------------------------------------------------------------------------------------------------- wrong folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 301}, "vocab_size=300, not 301"),
        ({"heldout": 0.3}, "heldout=0.2, not 0.3"),
        ({"max_documents": 9}, "max_documents=None, not 9"),
        ({"source": "stdlib", "path": None}, "source='files', not 'stdlib'"),
    ],
)
def test_data_of_other_settings_are_never_overwritten(fresh, change, said):
    prepare_quietly(corpus_of(fresh))
    before = contents(fresh / "data")
    with pytest.raises(ConfigError, match=f"prepared with {said}: set data.corpus.dir to another folder, or delete"):
        prepare_quietly(dataclasses.replace(corpus_of(fresh), **change))
    assert contents(fresh / "data") == before


def test_a_folder_with_other_files_is_left_alone(fresh):
    with pytest.raises(
        ConfigError, match=r"text holds files that `prepare` did not write .* set data.corpus.dir to another"
    ):
        prepare_quietly(corpus_of(fresh, dir=str(fresh / "text")))
    (fresh / "data").mkdir()
    prepare_quietly(corpus_of(fresh))  # an empty folder is welcome


def test_a_file_in_place_of_the_folder(fresh):
    (fresh / "data").write_text("mine")
    with pytest.raises(StorageError, match="cannot write .*data.*choose a folder"):
        prepare_quietly(corpus_of(fresh))
    assert (fresh / "data").read_text("utf-8") == "mine"


def test_loading_what_was_never_prepared(tmp_path):
    with pytest.raises(StorageError, match=r"holds no finished data \(no manifest.json\): run `sigma-lite prepare`"):
        load(tmp_path)
