"""Configs as people write them: what is said twice, what is no yaml, and classes named in short. Nothing is imported."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.lightning_keys import TAKERS
from sigma_lite.reading import from_yaml, imported, overlay, read_yaml
from sigma_lite.runfile import load_run, overrides, split_files
from sigma_lite.signatures import REQUIRED, UNKNOWN, parameters, signature

DUPLICATES = {
    "a section": ("trainer: {max_steps: 1}\nmodel: {}\ntrainer:\n  devices: 1\n", "trainer", 1, 3),
    "a part": ("model:\n  net:\n    top_k: 1\n  net:\n    n_layers: 2\n", "model.net", 2, 4),
    "a key": ("model:\n  net:\n    top_k: 1\n    n_layers: 2\n    top_k: 2\n", "model.net.top_k", 3, 5),
    "a quoted key": ("save: {every: 1,\n 'every': 2}\n", "save.every", 1, 2),
    "in a list": ("trainer:\n  logger:\n  - {class_path: a,\n     class_path: b}\n", "trainer.logger[0].class_path", 3, 4),
    "equal values": ("save:\n  every: 1\n  every: 1\n", "save.every", 2, 3),
    "one number, written twice": ("save:\n  1: 1\n  0x1: 2\n", "save.0x1", 2, 3),
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_key_given_twice_is_refused_with_both_lines(tmp_path, name):
    text, key, first, second = DUPLICATES[name]
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_yaml(path)
    said = str(refused.value)
    assert f"twice.yaml gives {key} twice" in said and f"in line {first} and in line {second}" in said


def test_a_later_file_may_say_it_again(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {net: {top_k: 1, n_layers: 2}}")
    (tmp_path / "b.yaml").write_text("model: {net: {top_k: 2}}")
    assert load_run([tmp_path / "a.yaml", tmp_path / "b.yaml"]).net.top_k == 2


def test_a_merged_group_may_be_changed():
    """`<<` is there to be overridden; the same group may be merged by several."""
    text = "base: &b {x: 1, y: 2}\none: &o {<<: *b, x: 3}\ntwo: {<<: *o, y: 4}\nsame: {<<: [*b, *o]}\n"
    read = from_yaml(text, "here")
    assert read["one"] == {"x": 3, "y": 2} and read["two"] == {"x": 3, "y": 4} and read["same"] == {"x": 1, "y": 2}


def test_a_group_that_contains_itself_is_refused():
    with pytest.raises(ConfigError, match="line 1: trainer.logger contains itself"):
        from_yaml("trainer: &t {logger: *t}", "here")


def test_a_command_line_value_is_read_as_strictly():
    with pytest.raises(ConfigError, match="--model.net gives top_k twice"):
        overrides(["--model.net={top_k: 1, top_k: 2}"])


def test_names_that_look_like_dates_stay_names():
    assert from_yaml("a: 2024-01-01\nb: 2024-99-99", "here") == {"a": "2024-01-01", "b": "2024-99-99"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: write settings into it, or leave it out"),
        (b"# only a comment\n", "is empty"),
        ("model: {}".encode("utf-16"), "not a text file in UTF-8"),
        ("a: \u00e9".encode("latin-1"), "not a text file in UTF-8"),
        (b"a: 1\x00", "not valid yaml"),
        (b"a: 1\n---\nb: 2\n", "not valid yaml"),
        (b"--- 3\n", "must hold keys, found int"),
        (b"model:\n", "model is empty: write keys below it, or leave it out"),
        (b"model: {net: }\n", "model.net is empty"),
        (b"model: {net: 0}\n", "model.net must be a group of keys, not 0"),
        (b"model: false\n", "model must be a group of keys, not False"),
        (b"data: {rows: []}\n", "data.rows must be a group of keys"),
    ],
)
def test_a_file_that_says_nothing_or_something_else(tmp_path, content, words):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_run([path])
    assert words in str(refused.value) and "odd.yaml" in str(refused.value) or words.startswith(("model.", "data."))


def test_an_empty_group_does_not_wipe_out_the_file_before(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 5}")
    (tmp_path / "b.yaml").write_text("trainer:\n  # max_steps: 7\n")
    with pytest.raises(ConfigError, match="b.yaml: trainer is empty"):
        load_run([tmp_path / "a.yaml", tmp_path / "b.yaml"])


def test_a_folder_names_a_file_in_it(tmp_path):
    (tmp_path / "toy.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"is a folder: give one of the yaml files in it, such as .*toy\.yaml"):
        read_yaml(tmp_path)


def test_a_mark_of_byte_order_is_no_key(tmp_path):
    (tmp_path / "windows.yaml").write_bytes("\ufeffmodel: {}\r\n".encode())
    assert read_yaml(tmp_path / "windows.yaml") == {"model": {}}


def test_another_class_begins_without_the_first_ones_arguments():
    one = {"logger": {"class_path": "A", "init_args": {"x": 1}}}
    assert overlay(one, {"logger": {"class_path": "B"}})["logger"] == {"class_path": "B"}
    assert overlay(one, {"logger": {"init_args": {"y": 2}}})["logger"]["init_args"] == {"x": 1, "y": 2}


def test_files_of_a_command_line_in_every_spelling():
    args = ["fit", "-c", "a", "--config=b", "-cc", "--config", "d", "-c=e", "--trainer.max_steps=3"]
    assert split_files(args) == (["a", "b", "c", "d", "e"], ["fit", "--trainer.max_steps=3"])
    with pytest.raises(ConfigError, match="-c needs a value"):
        split_files(["fit", "-c"])


# ------------------------------------------------------------------------------------------------------ named classes


@pytest.mark.parametrize("path", [*TAKERS.values(), "lightning.pytorch.loggers.CSVLogger", "sigma_lite.papers.shinka.Shinka",
                                  "lightning.pytorch.loggers.TensorBoardLogger",
                                  "lightning.pytorch.callbacks.EarlyStopping", "sigma_lite.balance.balancer.MicroLBL",
                                  "sigma_lite.scale.strategy.ExpertParallel"])  # fmt: skip
def test_what_the_source_says_is_what_the_class_takes(path):
    module, _, name = path.rpartition(".")
    there = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters
    plain = {n: p for n, p in there.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    read = parameters(path)
    assert list(read) == list(plain)
    for name, parameter in plain.items():
        expected = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        assert read[name].default in (expected, UNKNOWN)


def test_reading_a_config_imports_neither_torch_nor_lightning(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny.settings(trainer__strategy={
        "class_path": "sigma_lite.scale.strategy.ExpertParallel", "init_args": {"expert_parallel": 2}})))  # fmt: skip
    code = "import sys; from sigma_lite.runfile import load_run; load_run([sys.argv[1]], fit=True)\n"
    code += "sys.exit(bool({'torch', 'lightning'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_class_that_no_source_tells_about_is_not_judged():
    assert signature("torch.nn.Linear") is None and signature("nowhere.at.All") is None


CSV, WANDB = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.WandbLogger"
NAMED = {
    "a tool's name": ({"trainer__logger": "wandb"}, "trainer.logger", f"`class_path: {WANDB}`"),
    "another": ({"trainer__logger": "csv"}, "trainer.logger", CSV),
    "in a list": ({"trainer__logger": ["tensorboard"]}, "trainer.logger[0]", "loggers.TensorBoardLogger"),
    "a callback's": ({"trainer__callbacks": ["early_stopping"]}, "trainer.callbacks[0]", "callbacks.EarlyStopping"),
    "a misspelt class": ({"trainer__logger": {"class_path": "lightning.pytorch.loggers.CSVLoger"}}, "'CSVLoger'", CSV),
    "a number": ({"trainer__logger": 5}, "trainer.logger=5", CSV),
    "a plugin": ({"trainer__plugins": "sync"}, "trainer.plugins='sync'", "class_path: "),
    "a balancer": ({"model__custom_balance": "shinka"}, "model.custom_balance", "sigma_lite.papers.shinka.Shinka"),
    "a misspelt argument": ({"trainer__logger": {"class_path": CSV, "init_args": {"save_dri": "x"}}}, "trainer.logger",
                            "'save_dri'", "did you mean 'save_dir'"),
    "of one that takes more": ({"trainer__logger": {"class_path": WANDB, "init_args": {"projct": "x"}}}, "trainer.logger",
                               "'projct'", "did you mean 'project'"),
    "of a callback": ({"trainer__callbacks": {"class_path": "EarlyStopping", "init_args": {"monitor": "lm", "patince": 3}}},
                      "trainer.callbacks", "'patince'", "did you mean 'patience'"),
    "of a strategy": ({"trainer__strategy": {"class_path": "sigma_lite.scale.strategy.ExpertParallel",
                                             "init_args": {"expert_paralel": 2}}}, "'expert_paralel'", "'expert_parallel'"),
    "a wrong type inside": ({"trainer__strategy": {"class_path": "sigma_lite.scale.strategy.ExpertParallel",
                                                   "init_args": {"expert_parallel": "two"}}}, "parallel='two'", "int"),
    "an argument forgotten": ({"trainer__callbacks": ["EarlyStopping"]}, "needs monitor", "init_args: {monitor: ...}"),
    "nothing for the number": ({"save__keep": "two"}, "save.keep=two", "expected int"),
    "text or nothing": ({"trainer__benchmark": 5}, "trainer.benchmark=5", "expected bool or null"),
    "no steps": ({"trainer__max_steps": -5}, "trainer.max_steps=-5", "at least 1"),
    "half precision": ({"trainer__precision": "16-mixed"}, "trainer.precision=16-mixed", "bf16-mixed"),
    "a negative seed": ({"seed_everything": -4}, "seed_everything=-4", "from 0 to"),
    "a seed that is none": ({"seed_everything": False}, "seed_everything=False", "from 0 to"),
    "a folder that nobody would read": ({"data__corpus__source": None}, "path='nowhere' would not be read", "source=files"),
    "a schedule that never begins": ({"model__sparsity__switch_step": 0}, "sparsity.head=[2] has no effect", "switch_step"),
    "negative workers": ({"data__num_workers": -1}, "data.num_workers=-1", "0 for none"),
    "a path that is a number": ({"ckpt_path": 5}, "ckpt_path=5", "path of a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_plan_and_fit_refuse_it_in_the_same_words_before_any_folder(tmp_path, monkeypatch, capsys, name):
    """Neither the data nor the run's folder can be used, and the first complaint is about the value all the same."""
    changes, *words = NAMED[name]
    monkeypatch.chdir(tmp_path)
    Path("run").write_text("a file where the folder should be")
    tiny.write_config(tmp_path, "bad.yaml", data__corpus__path="nowhere", data__corpus__dir="run/x", **changes)
    said = []
    for command in ("plan", "fit"):
        assert tiny.refused(cli.main, command, "-c", "bad.yaml") == 2
        said.append(capsys.readouterr().err.strip())
    assert said[0] == said[1] and "\n" not in said[0] and len(said[0]) < 400
    for word in words:
        assert word in said[0]


@pytest.mark.parametrize("changes", [{"trainer__max_steps": None}, {"trainer__max_steps": -1}, {"save__every": 7}])
def test_an_end_that_no_run_can_have_comes_before_the_folder(tmp_path, monkeypatch, capsys, changes):
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path, "bad.yaml", data__corpus__path="nowhere", data__corpus__dir="new", **changes)
    assert tiny.refused(cli.main, "fit", "-c", "bad.yaml") == 2
    assert next(iter(changes)).replace("__", ".").rpartition(".")[2] in capsys.readouterr().err
    assert not Path("new").exists() and not Path("run").exists()


# ------------------------------------------------------------------------------------------------------ --print_config


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_what_a_command_prints_is_what_it_accepts(finished, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(finished)
    full, own = tmp_path / "full.yaml", {"class_path": "sigma_lite.papers.shinka.Shinka", "init_args": {"threshold": 0.5}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"custom_balance": own}}))
    printed = []
    for files in (["tiny.yaml", tmp_path / "own.yaml"], [full]):
        flags = [word for file in files for word in ("-c", str(file))]
        assert tiny.refused(cli.main, command, *flags, "--print_config") == 0
        full.write_text(capsys.readouterr().out, "utf-8")
        printed.append(full.read_text("utf-8"))
    assert printed[0] == printed[1] and "threshold: 0.5" in printed[0]
    for reader in ("fit", "validate"):
        assert tiny.refused(cli.main, reader, "-c", str(full), "--print_config") == 0
    load_run([full], fit=command == "fit")


def test_the_printed_config_is_the_same_run(finished, tmp_path, monkeypatch, capsys):
    """`fit` finds the run finished: not one setting that weights depend on is another."""
    monkeypatch.chdir(finished)
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--print_config") == 0
    (tmp_path / "full.yaml").write_text(capsys.readouterr().out, "utf-8")
    assert tiny.refused(cli.main, "fit", "-c", str(tmp_path / "full.yaml")) == 0
    assert "bits per byte" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- a name of the reader's


@pytest.mark.parametrize(("path", "words"), [
    ("read_typo.Mine", r"x=read_typo.Mine cannot be imported: SyntaxError: .*read_typo.py, line 1"),
    ("read_fails.Mine", "x=read_fails.Mine cannot be imported: ZeroDivisionError"),
    ("read_nowhere.Mine", "x=read_nowhere.Mine cannot be imported: ModuleNotFoundError"),
    ("read_good.Mien", "read_good has no Mien; did you mean 'Mine'"),
    ("read_good.number", "cannot be called: it is of type int"),
    ("Mine", "x='Mine': give the whole path, MODULE.NAME"),
])  # fmt: skip
def test_a_name_that_means_nothing_is_refused_in_a_sentence(tmp_path, monkeypatch, path, words):
    files = {"typo": "class Mine(:\n", "fails": "1 / 0\n", "good": "number = 1\nclass Mine: ...\n"}
    for name, text in files.items():
        (tmp_path / f"read_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        imported(path, "x")
    assert imported("read_good.Mine", "x").__name__ == "Mine"
