"""`sigma-lite check`: what a class hands in, judged step by step, whatever is wrong with it."""

from __future__ import annotations

import csv
import io
import json

import pytest

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.teach import check, exercises, grading

RIGHT = "def share(ids_TK, n):\n    return torch.bincount(ids_TK.flatten(), minlength=n) / ids_TK.numel()"
NAMED = "def share(ids_TK, n):\n    return torch.bincount(ids_TK.flatten(), minlength=n) / len(ids_TK)"
CHECK = '\nteach.check.exercise("load_share", share);'


@pytest.fixture(autouse=True)
def _the_readers_check(monkeypatch):
    """`grading.run` puts its own in the place of this one, in a process that ends afterwards."""
    monkeypatch.setattr(check, "exercise", check.exercise)


def graded(*cells: str, hidden=None) -> dict:
    found = {}
    grading.run(["import torch\nfrom sigma_lite import teach", *cells], hidden or {}, found)
    return found


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": []} for cell in cells]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.mark.parametrize(
    "cell, kind, says",
    [
        (RIGHT, "passed", ""),
        (NAMED, "mistake", "divide by the number of slots"),
        ("def share(ids_TK, n): ...", "not tried", "nothing there yet"),
        ("share = 3", "wrong", "that is an int"),
        ("def share(ids_TK, n)\n    return 1", "wrong", "its cell is not Python: expected ':', line 1"),
        ("share = wanted", "wrong", "NameError: name 'wanted' is not defined"),
        ("exit()", "wrong", "its cell stops before the check: SystemExit"),
        (
            "if False:\n    pass\nprint('too late') if 1 else 0\nraise_ = 1\nassert False, 'no'",
            "wrong",
            "AssertionError: no",
        ),
    ],
)
def test_an_answer_gets_its_kind_and_a_sentence(cell, kind, says):
    step = graded(cell + CHECK)["load_share"]
    assert step.kind == kind and says in step.says


def test_a_cell_may_use_what_stands_above_but_no_work_is_done_again():
    above = "import math\nFACTOR = 1\nraise RuntimeError('a training of an hour')\ndef half(x):\n    return x / 2"
    cell = RIGHT.replace("return ", "return FACTOR * 2 * half(math.ceil(0.5)) * ")
    assert graded(above, cell + CHECK)["load_share"].kind == "passed"


def test_one_broken_cell_breaks_no_other_and_the_last_cell_counts():
    found = graded("x = 1 / 0" + CHECK.replace("load_share", "gates"), NAMED + CHECK, RIGHT + CHECK)
    assert "ZeroDivisionError" in found["gates"].says and found["load_share"].kind == "passed"


def test_lines_of_ipython_are_left_out(tmp_path):
    write(tmp_path / "a.ipynb", "%matplotlib inline\n!pip install x\n" + RIGHT + CHECK)
    assert grading.code_cells(tmp_path / "a.ipynb")[0].startswith("\n\ndef share")


def test_hidden_cases_catch_a_table_of_answers(tmp_path):
    file = tmp_path / "hidden.py"
    file.write_text("import torch\nCASES = {'load_share': [(torch.tensor([[1, 2]]), 3)]}")
    known = exercises.find("load_share")
    table = [known.solution(*case).tolist() for case in known.cases()]
    cheat = f"def share(ids_TK, n):\n    return torch.tensor({table[0]} if len(ids_TK) == 9 else {table[1]})"
    assert graded(cheat + CHECK)["load_share"].kind == "passed"
    step = graded(cheat + CHECK, hidden=grading.read_hidden(file))["load_share"]
    assert step.kind == "wrong" and step.says == "right on the cases that you see, wrong on a hidden one"
    assert graded(RIGHT + CHECK, hidden=grading.read_hidden(file))["load_share"].kind == "passed"


@pytest.mark.parametrize(
    "text, says",
    [
        ("x = 1", "defines no CASES"),
        ("CASES = {'load_shar': []}", "did you mean 'load_share'"),
        ("CASES = {'load_share': [(1,)]}", "the package's own solution of 'load_share' cannot take"),
        ("CASES = {'load_share': [3]}", "a case is a tuple of arguments"),
    ],
)
def test_a_file_of_hidden_cases_that_cannot_work_is_refused(tmp_path, text, says):
    (tmp_path / "hidden.py").write_text(text)
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        grading.read_hidden(tmp_path / "hidden.py")


def test_a_folder_is_graded_by_student(tmp_path, capsys):
    write(tmp_path / "anna" / "04.ipynb", "import torch\nfrom sigma_lite import teach", RIGHT + CHECK)
    (tmp_path / "ben.ipynb").write_text("{")
    write(tmp_path / "carl.ipynb", "print(1)")
    cli.main(["check", str(tmp_path), "--csv", "--seconds", "900"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["student"], row["step"], row["result"]) for row in rows] == [
        ("anna", "load_share", "passed"),
        ("ben", "", "not graded"),
        ("carl", "", "not graded"),
    ]
    assert "cannot be read as a notebook" in rows[1]["says"] and "no exercise" in rows[2]["says"]


def test_a_machine_too_busy_to_begin_makes_nobody_wrong(tmp_path, capsys):
    write(tmp_path / "anna.ipynb", "import torch\nfrom sigma_lite import teach", RIGHT + CHECK)
    cli.main(["check", str(tmp_path), "--json", "--seconds", "0.01"])
    (anna,) = json.loads(capsys.readouterr().out)
    assert [step["kind"] for step in anna["steps"]] == ["not graded"] and "give more --seconds" in anna["says"]


@pytest.mark.slow
def test_a_process_that_ends_or_never_ends_gets_a_sentence(tmp_path, capsys):
    setup = "import torch, os\nfrom sigma_lite import teach"
    late = NAMED + CHECK.replace("load_share", "load_balancing_loss")
    write(tmp_path / "anna.ipynb", setup, RIGHT + CHECK, "os._exit(3)" + CHECK.replace("load_share", "gates"), late)
    sleep = "__import__('time').sleep(1000)" + CHECK.replace("load_share", "gates")  # one call into C: not interrupted
    write(tmp_path / "ben.ipynb", setup, RIGHT + CHECK, sleep)
    cli.main(["check", str(tmp_path), "--json", "--seconds", "40"])
    anna, ben = json.loads(capsys.readouterr().out)
    assert [step["kind"] for step in anna["steps"]] == ["passed", "wrong", "not graded"]
    assert [step["kind"] for step in ben["steps"]] == ["passed", "wrong"]
    assert "exit code 3" in anna["says"] and "stopped after 40 seconds" in ben["says"]


def test_the_list_names_every_step(capsys):
    cli.main(["check", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == list(exercises.ALL)
    assert lines[-1].startswith(f"{len(exercises.ALL)} steps in ")
    cli.main(["check", "--list", "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(exercises.ALL)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "which folder"),
        (["nowhere"], "nowhere does not exist"),
        (["--list", "."], "leave FOLDER out"),
        ([".", "--json", "--csv"], "not both"),
        ([".", "--hidden", "nowhere.py"], "nowhere.py does not exist"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["check", *arguments])
    assert says in capsys.readouterr().err
