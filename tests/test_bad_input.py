"""What a person can get wrong: exit code 2, one sentence that names the rule, the value and the fix, and nothing lost."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import tiny

from sigma_lite import cli, storage
from sigma_lite.checkpoint import checkpoints, newest_checkpoint


@pytest.fixture
def run(place, finished):
    """A place with a run that is finished."""
    shutil.copytree(finished / "run", place / "run")
    return place


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(args, *words): the command is refused with these words, before any training, and changes no file."""

    def never(*_, **__):
        raise AssertionError("a training step was made")

    def check(command: str, *words: str, new: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr("sigma_lite.train.module.SigmaLit.training_step", never)
        before = tiny.snapshot(Path.cwd())
        assert tiny.refused(cli.main, *command.split()) == 2
        printed = capsys.readouterr()
        sentence = printed.err.strip()
        assert sentence.startswith("sigma-lite: ") and "\n" not in sentence, sentence
        assert "Traceback" not in sentence and 30 < len(sentence) < 400, sentence
        for word in words:
            assert word in sentence, (word, sentence)
        after = {name: content for name, content in tiny.snapshot(Path.cwd()).items() if not name.startswith(new or "\0")}
        assert {n: c for n, c in before.items() if not n.startswith(new or "\0")} == after
        assert not [name for name in after if name.endswith(".partial")]
        return sentence

    return check


def config(**changes) -> str:
    tiny.write_config(Path.cwd(), "bad.yaml", **changes)
    return "fit -c bad.yaml"


# ---------------------------------------------------------------------------------------------------------- settings

SETTINGS = {
    "unknown section": ({"modle__net": {}}, "modle", "did you mean 'model'"),
    "unknown part": ({"model__nett": {}}, "model.nett", "did you mean 'net'"),
    "unknown key": ({"model__net__n_expert": 8}, "model.net.n_expert", "did you mean 'n_experts'"),
    "unknown key of the trainer": ({"trainer__max_step": 8}, "trainer.max_step", "did you mean 'max_steps'"),
    "unknown key of save": ({"save__evry": 8}, "save.evry", "did you mean 'every'"),
    "more experts chosen than there are": ({"model__net__top_k": 9}, "top_k=9", "n_experts=8", "try top_k=8"),
    "heads that do not divide": ({"model__net__n_heads": 5, "model__net__n_kv_heads": 2}, "n_heads=5", "n_kv_heads=1"),
    "odd head width": ({"model__net__head_dim": 15}, "head_dim=15", "even", "try 16"),
    "nothing of something": ({"model__net__n_layers": 0}, "n_layers=0", "at least 1"),
    "rows that do not divide": ({"data__rows__per_micro": 3}, "per_step=8", "per_micro=3", "try per_step=9"),
    "longer schedule than layers": ({"model__sparsity__head": [2, 2, 2]}, "3 entries", "n_layers=2", "shorten"),
    "schedule above the experts": ({"model__sparsity__head": [9]}, "head[0]=9", "n_experts=8"),
    "unknown balance loss": ({"model__balance__loss": "globl"}, "globl", "did you mean 'global'"),
    "negative rate": ({"model__optim__lr": -1.0}, "lr=-1.0", "greater than 0"),
    "text for a number": ({"model__net__n_experts": "many"}, "model.net.n_experts='many'", "expected int"),
    "a number for a group": ({"model__net": 3}, "model.net", "group of keys"),
    "a number for a section": ({"trainer": 3}, "trainer", "group of keys"),
    "vocabulary given twice": ({"data__corpus__vocab_size": 512}, "vocab_size", "model.net.vocab_size"),
    "vocabulary too small": ({"model__net__vocab_size": 100}, "vocab_size=100", "try 512"),
    "unknown source": ({"data__corpus__source": "file"}, "'file'", "did you mean 'files'"),
    "an address for a folder": ({"trainer__default_root_dir": "s3://bucket/run"}, "trainer.default_root_dir", "address"),
    "an unknown name in a path": ({"trainer__default_root_dir": "$NOWHERE/x"}, "$NOWHERE", "stands for nothing"),
    "a path that is not read": ({"data__corpus__source": "stdlib"}, "would not be read", "data.corpus.source=files"),
    "source without its path": ({"data__corpus__path": None}, "needs path", "a file, folder or glob"),
    "no end": ({"trainer__max_steps": None}, "set trainer.max_steps"),
    "text for the end": ({"trainer__max_steps": "many"}, "trainer.max_steps=many", "expected int"),
    "saves that do not divide": ({"save__every": 5}, "save.every=5", "max_steps=12", "try save.every=4"),
    "one checkpoint": ({"save__keep": 1}, "save.keep=1", "at least 2"),
    "a guard that refuses noise": ({"spike_guard__threshold": 1.0}, "threshold=1.0", "try 8"),
    "a device that is not there": ({"trainer__accelerator": "warp"}, "warp", "cpu"),
    "a precision that is not": ({"trainer__precision": "7"}, "trainer.precision=7"),
    "longer rows than text": ({"data__rows__length": 100_000}, "rows.length=100000", "set it to"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(place, refusal, name):
    changes, *words = SETTINGS[name]
    refusal(config(**changes), *words, new=("bad.yaml",))


COMMAND_LINES = {
    "fit -c tiny.yaml --model.net.n_experts=seven": ("model.net.n_experts='seven'", "expected int"),
    "fit -c tiny.yaml --model.net.n_expert=3": ("model.net.n_expert", "did you mean 'n_experts'"),
    "fit -c tiny.yaml --model.net.n_expert 3": ("model.net.n_expert", "did you mean 'n_experts'"),
    "fit -c tiny.yaml --model.net.top_k=200": ("top_k=200", "try top_k=8"),
    "fit -c tiny.yaml --model.net.top_k": ("--model.net.top_k", "needs a value"),
    "fit -c tiny.yaml --trainer.max_stepz=3": ("trainer.max_stepz", "did you mean 'max_steps'"),
    "fit -c tiny.yaml --trainer.max_steps=x": ("trainer.max_steps=x", "expected int"),
    "fit -c tiny.yaml --bogus=3": ("--bogus=3", "--help"),
    "fit -c tiny.yaml stray": ("stray", "--help"),
    "fit -c tiny.yaml --ckpt_path=x": ("ckpt_path", "leave"),
    "fit -c none.yaml": ("none.yaml does not exist in ",),
    "plan -c tiny.yaml --model.net.n_expert=3": ("did you mean 'n_experts'",),
    "plan -c tiny.yaml --bogus": ("--bogus", "--help"),
    "plan": ("--config", "required"),
    "fitt -c tiny.yaml": ("unknown command 'fitt'", "did you mean 'fit'"),
    "report nowhere": ("nowhere holds no record.jsonl", "folder of a run"),
    "report text": ("text holds no record.jsonl", "folder of a run"),
    "generate nowhere": ("nowhere holds no checkpoint", "folder of a run"),
    "validate -c tiny.yaml": ("run holds no checkpoint", "sigma-lite fit"),
}


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_command_lines(place, refusal, command):
    refusal(command, *COMMAND_LINES[command])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: {net: [", ("not valid yaml",)),
        (b"- 1\n- 2\n", ("must hold keys", "list")),
        (b"\x80\x04\x95", ("not a text file",)),
    ],
)
def test_files_that_are_no_config(place, refusal, content, words):
    Path("broken.yaml").write_bytes(content)
    refusal("fit -c broken.yaml", "broken.yaml", *words)
    refusal("plan -c broken.yaml", "broken.yaml", *words)


# -------------------------------------------------------------------------------------------------------------- data


def test_a_corpus_that_is_not_there(place, refusal):
    refusal(config(data__corpus__path="nowhere", data__corpus__dir="new"), "nowhere", "does not exist", new=("new", "bad"))


def test_an_empty_corpus(place, refusal):
    Path("empty").mkdir()
    refusal(config(data__corpus__path="empty", data__corpus__dir="new"), "no document", "empty", new=("new", "bad"))


def test_a_corpus_without_text(place, refusal):
    Path("photos").mkdir()
    for n in range(3):
        Path("photos", f"{n}.txt").write_bytes(b"\xff\xfe" + bytes([n + 128]))
    refusal(config(data__corpus__path="photos", data__corpus__dir="new"), "3 not UTF-8", new=("new", "bad"))


def test_data_prepared_with_other_settings(place, refusal):
    refusal(config(data__corpus__heldout=0.3), "prepared was prepared with heldout=0.2, not 0.3", "another folder")


def test_data_with_another_vocabulary(place, refusal):
    refusal(config(model__net__vocab_size=400), "prepared with vocab_size=300, not 400", "another folder")


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_shard(place, refusal, damage):
    shard = Path("prepared/train-00000.bin")
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        content = content[:-100]
    else:
        content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refusal("fit -c tiny.yaml", str(shard), "delete")


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_of_other_settings(run, refusal):
    refusal("fit -c tiny.yaml --model.optim.lr=0.1", "optim.lr=0.003", "0.1", "another trainer.default_root_dir")
    refusal("fit -c tiny.yaml --trainer.max_steps=24", "trainer.max_steps=12", "24", "another trainer.default_root_dir")


def test_a_checkpoint_of_another_model(run, refusal):
    refusal("validate -c tiny.yaml --model.net.d_model=48", "d_model=32", "48")
    refusal("predict -c tiny.yaml --ckpt_path=nowhere.safetensors", "nowhere.safetensors does not exist")


def damaged(run: Path, how: str) -> Path:
    """Make the last but one checkpoint the newest, damaged."""
    newest_checkpoint(run / "run").unlink()
    path = newest_checkpoint(run / "run")
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    if how == "cut to nothing":
        content = b""
    if how == "altered":
        content[-1000] ^= 1
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["cut", "cut to nothing", "altered"])
def test_a_damaged_checkpoint(run, refusal, how):
    path = damaged(run, how)
    for command in ("fit -c tiny.yaml", "generate run"):
        refusal(command, path.name, "cut or altered", "delete it")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_never_opened(run, refusal):
    for path in checkpoints("run"):
        path.write_bytes(pickle.dumps({"state_dict": Bomb()}))
    for command in ("fit -c tiny.yaml", "generate run", f"validate -c tiny.yaml --ckpt_path={path}"):
        refusal(command, "cut or altered")
    assert not Path("exploded").exists()
    pickle.loads(path.read_bytes())
    assert Path("exploded").exists(), "the pickle is harmless, so the test showed nothing"


# ------------------------------------------------------------------------------------------------------ full folders


@pytest.fixture
def full(monkeypatch):
    """full(part): from now on the disk is full for files whose path contains `part`."""
    original = os.fsync

    def make(part: str) -> None:
        def fsync(number: int) -> None:
            if part in os.readlink(f"/proc/self/fd/{number}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            original(number)

        monkeypatch.setattr(storage.os, "fsync", fsync)

    return make


@pytest.mark.parametrize("part", ["settings.json", "tokenizer.json", "train-00000.bin", "manifest.json"])
def test_a_full_disk_while_preparing(place, refusal, full, part):
    full("new/" + part)
    tiny.write_config(place, "new.yaml", data__corpus__dir="new")
    refusal("prepare -c new.yaml", f"no room to write new/{part}", "free some space", new=("new/",))


def test_a_full_disk_at_a_checkpoint(run, full, capsys):
    """The checkpoint before it stays whole, and the run goes on from there when there is room."""
    newest_checkpoint("run").unlink()
    before = tiny.snapshot(Path("run"))
    full("checkpoints/step=000012")
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sigma-lite: no room to write") and "step=000012" in error
    after = tiny.snapshot(Path("run"))
    assert {n: c for n, c in after.items() if "checkpoints" in n} == {n: c for n, c in before.items() if "checkpoints" in n}
    full("nothing")
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 0
    assert newest_checkpoint("run").name == "step=000012.safetensors"


def test_a_disk_too_small_for_the_checkpoints(place, refusal, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0))
    refusal("fit -c tiny.yaml", "3 checkpoints need", "0 MB are free")


def test_a_quota(run):
    """Not a pretended error: the system refuses files above 200 kB, and a checkpoint has 500."""
    newest_checkpoint("run").unlink()
    before = {n: c for n, c in tiny.snapshot(Path("run")).items() if "checkpoints" in n}
    limit = tiny.child(["fit", "-c", "tiny.yaml"], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert tiny.ending(limit, 2) == 2
    assert "sigma-lite: no room to write" in Path("child.log").read_text("utf-8").splitlines()[-1]
    assert {n: c for n, c in tiny.snapshot(Path("run")).items() if "checkpoints" in n} == before


def test_a_file_where_a_folder_should_be(place, refusal):
    Path("run").write_text("mine")
    refusal("fit -c tiny.yaml", "cannot write run/run.lock", "choose a folder")


def test_a_folder_that_may_not_be_written(place, refusal):
    Path("run").mkdir(mode=0o500)
    if os.access("run", os.W_OK):
        pytest.skip("root may write anywhere")
    refusal("fit -c tiny.yaml", "cannot write run/run.lock", "choose a folder")


# --------------------------------------------------------------------------------------------------------------- use


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--temperature -1", ("temperature=-1.0", "0 (greedy) or more")),
        ("--temperature nan", ("temperature=nan", "0 (greedy) or more")),
        ("--temperature hot", ("--temperature", "'hot'")),
        ("--top-p 0", ("top_p=0.0", "(0, 1]")),
        ("--max-new-tokens -3", ("max_new_tokens=-3", "0 or more")),
        ("--data text", ("no tokenizer.json in text", "give --data")),
        ("--colour red", ("--colour", "--help")),
    ],
)
def test_generate(run, refusal, option, words):
    refusal(f"generate run {option}", *words)


def test_generate_with_another_tokenizer(run, refusal):
    tiny.write_config(run, "other.yaml", model__net__vocab_size=310, data__corpus__dir="other")
    assert tiny.refused(cli.main, "prepare", "-c", "other.yaml") == 0
    refusal("generate run --data other", "has 310 tokens, the model 300", "--data")
