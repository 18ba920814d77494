"""Fingerprints of a reader's code: an edit of anything that it executes gives another one, and nothing else does."""

from __future__ import annotations

import copy
import functools
import importlib
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from sigma_lite.balance.balancer import Balancer, WithBias
from sigma_lite.balance.scale_free import ScaleFreeLBL
from sigma_lite.identity import changed_files, difference, doubt, identify, identify_named, in_words, package_code
from sigma_lite.identity.package import ROOT, TRAINING
from sigma_lite.papers.shinka import Shinka

NOTEBOOK = """
    import functools
    import torch
    from sigma_lite.balance.balancer import Balancer

    SCALE = 2.0
    TABLE = {"a": torch.tensor([1.0, 2.0])}

    def helper(x):
        return SCALE * x

    def other(x):
        return x

    def factory(power):
        def inner(routing, f_E):
            '''Says what it does.'''
            return helper(routing.probs.pow(power).sum())
        return inner

    class Base(Balancer):
        weight = 1.0
        def scaled(self, x):
            return self.weight * x

    class Mine(Base):
        def __init__(self, strength=0.1):
            self.strength, self.targets = strength, torch.ones(3)
        def loss(self, routing, f_E):
            return self.scaled(helper(routing.probs.sum())) * TABLE["a"][0]
        @staticmethod
        def square(x):
            return x * x
        @property
        def half(self):
            return self.strength / 2

    nested = factory(2)
    lambdas = {"one": lambda routing, f_E: routing.probs.sum(),
               "two": lambda routing, f_E: (
                   routing.probs.max())}
    partial = functools.partial(lambda a, routing, f_E: a * routing.probs.sum(), 3)
"""
OWN = {
    "class": lambda ns: ns["Mine"](),
    "nested function": lambda ns: ns["nested"],
    "lambda": lambda ns: ns["lambdas"]["two"],
    "partial": lambda ns: ns["partial"],
    "bound method": lambda ns: ns["Mine"]().loss,
}


def notebook(*edits: tuple[str, str]) -> dict:
    """The cell as __main__ would hold it, without a file behind it."""
    cell = NOTEBOOK
    for old, new in edits:
        assert cell.count(old) >= 1, old
        cell = cell.replace(old, new)
    namespace = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(cell), "<cell>", "exec"), namespace)
    return namespace


def code(what: str, *edits: tuple[str, str]) -> str:
    return identify(OWN[what](notebook(*edits)))["code"]


@pytest.mark.parametrize("what", OWN)
def test_the_same_code_has_the_same_fingerprint_each_time(what):
    assert code(what) == code(what)


EDITS = [
    ("class", "return self.scaled(helper", "return self.scaled(other"),  # the method
    ("class", "return SCALE * x", "return SCALE + x"),  # a helper of the same notebook
    ("class", "SCALE = 2.0", "SCALE = 3.0"),  # a value that the helper reads
    ("class", "torch.tensor([1.0, 2.0])", "torch.tensor([1.5, 2.0])"),  # numbers in a tensor in a dictionary
    ("class", "weight = 1.0", "weight = 2.0"),  # of the class that it inherits from
    ("class", "return self.weight * x", "return x / self.weight"),  # a method of that class
    ("class", "strength=0.1", "strength=0.2"),  # the object's state
    ("class", "torch.ones(3)", "torch.ones(4)"),  # array state
    ("class", "torch.ones(3)", "torch.zeros(3)"),
    ("class", "return x * x", "return x * x * x"),  # a static method
    ("class", "self.strength / 2", "self.strength / 3"),  # a property
    ("nested function", "factory(2)", "factory(3)"),  # a value that it closes over
    ("nested function", "probs.pow(power).sum()", "probs.pow(power).mean()"),
    ("nested function", "SCALE = 2.0", "SCALE = 3.0"),
    ("lambda", "routing.probs.max())", "routing.probs.min())"),  # on its second line
    ("partial", "3)", "4)"),
    ("partial", "a * routing", "a + routing"),
    ("bound method", "strength=0.1", "strength=0.2"),
    ("bound method", "SCALE = 2.0", "SCALE = 3.0"),
]


@pytest.mark.parametrize(("what", "old", "new"), EDITS)
def test_an_edit_of_what_it_executes_is_seen(what, old, new):
    assert code(what, (old, new)) != code(what)


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("nested function", "'''Says what it does.'''", "'''Says it better.'''"),
        ("nested function", "'''Says what it does.'''", "# a comment"),
        ("class", "def other(x):", "def other(x, y=1):"),  # which nothing here calls
        ("class", "factory(2)", "factory(3)"),
        ("lambda", "SCALE = 2.0", "SCALE = 3.0"),
        ("class", "SCALE = 2.0", "SCALE = 2.0; probs = 5; loss = 'a variable named as an attribute'"),
    ],
)
def test_an_edit_of_something_else_is_not(what, old, new):
    assert code(what, (old, new)) == code(what)


def test_first_constants_that_are_no_docstrings_count():
    def made(body: str) -> str:
        namespace: dict = {"__name__": "__main__"}
        exec(f"f = lambda r, f_E: {body}", namespace)
        return identify(namespace["f"])["code"]

    assert made("'a'") != made("'b'") and made("['a' for _ in r]") != made("['b' for _ in r]")


def test_a_class_whose_module_is_no_name_is_taken_by_its_name():
    """So compiled types of Cython are, which numpy's generators hold."""
    compiled = type("Compiled", (), {"__module__": property(lambda self: "x")})
    own = Balancer()
    own.value = compiled
    assert identify(own)["code"] == identify(own)["code"]


def test_values_of_many_kinds_are_told_apart():
    def with_state(value: object) -> str:
        own = Balancer()
        own.value = value
        return identify(own)["code"]

    values = [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        (1,),
        {1},
        {"a": 1},
        {"b": 1},
        np.ones(2),
        np.ones(3),
        np.zeros(2),
        np.float64(1),
    ]
    values += [torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(1, 2), torch.zeros(2), torch.tensor(1)]
    values += [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2), np.random.default_rng(1)]
    values += [np.random.default_rng(2), torch.nn.Linear(2, 2), torch.float32, Path("a"), types.SimpleNamespace(a=1)]
    found = [with_state(value) for value in values]
    assert len(set(found)) == len(values)
    assert with_state(np.ones(2)) == with_state(np.ones(2)) and with_state({"a": 1, "b": 2}) == with_state({"b": 2, "a": 1})


def test_being_looked_at_and_copied_changes_nothing():
    """Python keeps notes in a class when an object of it is copied."""
    own = notebook()["Mine"]()
    first = identify(own)
    copy.deepcopy(own)
    assert identify(own) == first


def test_circles_end():
    own = Balancer()
    own.itself, own.names = own, [own]
    assert identify(own)["code"] == identify(own)["code"] and "itself=..." in repr(own)


def test_what_cannot_be_told_is_named(tmp_path):
    own = Balancer()
    own.numbers = (number for number in range(3))
    found = identify(own)
    assert found["unknown"] == ["it.numbers (generator)"]
    assert "it.numbers (generator)" in doubt(found, found) and not difference(found, found)
    assert "unknown" not in identify(Balancer())


def test_a_helper_in_another_file_of_the_reader_counts_and_an_installed_one_does_not(tmp_path, monkeypatch):
    (tmp_path / "own_helpers.py").write_text("def scale(x):\n    return 2 * x\n")
    (tmp_path / "own_ideas.py").write_text(
        "import own_helpers as h\nimport torch\n\n\ndef mine(routing, f_E):\n    return torch.sum(h.scale(routing.probs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    first = identify_named("own_ideas.mine")
    (tmp_path / "own_helpers.py").write_text("def scale(x):\n    return 3 * x + 1\n")
    helpers = importlib.reload(sys.modules["own_helpers"])
    changed = identify_named("own_ideas.mine")
    assert changed != first
    helpers.unused = 5
    monkeypatch.setattr(torch, "sum", lambda x: x)  # its version says what it does
    assert identify_named("own_ideas.mine") == changed
    for name in ("own_helpers", "own_ideas"):
        del sys.modules[name]


def test_another_process_finds_the_same():
    """Sets of text have another order in each process, objects other addresses."""
    code = (
        "from sigma_lite.identity import identify, package_code, code_digest\n"
        "from sigma_lite.papers.shinka import Shinka\n"
        "own = Shinka()\nown.names = {'a', 'b', 'c'}\n"
        "print(identify(own)['code'], code_digest(package_code()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT.parent)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# ------------------------------------------------------------------------------------------------------- what is recorded


def test_what_is_recorded_of_a_balancer():
    found = identify(WithBias(Shinka(0.5), "sign"))
    inner = {"class": "sigma_lite.papers.shinka.Shinka", "settings": {"threshold": 0.5, "strength": 0.1, "hinge": "counts"}}
    assert found["class"] == "sigma_lite.balance.balancer.WithBias"
    assert found["settings"] == {"inner": inner, "rule": "sign", "rate": 0.001, "decay": "none", "centre": False}
    assert found["code"].startswith(f"py{sys.version_info.major}.{sys.version_info.minor}:")
    scaled = functools.partial(in_words, 2.0, far=True)
    assert identify(scaled)["settings"] == {"0": 2.0, "far": True} and identify(scaled)["class"].endswith("own.in_words")


def test_two_records_differ_by_class_settings_or_code_and_the_sentence_says_which():
    now = identify(Shinka(0.5))
    assert difference(now, now) == "" == doubt(now, now)
    assert difference(None, None) == "" and "None then, sigma_lite.papers.shinka.Shinka" in difference(None, now)
    assert "threshold=0.25" in difference(identify(Shinka(0.25)), now)
    assert "whose code has changed" in difference({**now, "code": now["code"][:-1] + "x"}, now)
    elsewhere = {**now, "code": "py3.9:1234"}
    assert difference(elsewhere, now) == "" and "recorded under py3.9" in doubt(elsewhere, now)


def test_a_balancer_recorded_as_text_before_it_had_a_setting_is_still_the_same():
    path, now = "sigma_lite.balance.scale_free.ScaleFreeLBL", identify(ScaleFreeLBL())
    for then in (f"{path}(temperature=0.3)", f"{path}(temperature=0.3, through_spread=False)"):
        assert difference(then, now) == difference(now, then) == "" and "was not recorded" in doubt(then, now)
    others = [f"{path}(temperature=0.1)", f"{path}(temperature=0.3, through_spread=True)"]
    for then in (None, path, "not.imported.Mine()", "ideas.<lambda>", *others):
        assert difference(then, now) and difference(now, then)
    both = identify(WithBias(Shinka(0.5), "sign"))
    shinka = "Shinka(threshold=0.5, strength=0.1, hinge='counts')"
    older = f"sigma_lite.balance.balancer.WithBias(inner={shinka}, rule='sign', rate=0.001, decay='none', centre=False)"
    assert difference(older, both) == "" and difference(older.replace("0.5", "0.6"), both)
    assert difference("ideas.flat", {"class": "ideas.flat", "settings": {}, "code": "py3.11:1"}) == ""


# ------------------------------------------------------------------------------------------------------------ the package


@pytest.fixture
def package(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "model" / "router.py").write_text(
        '"""A router."""\n\n\ndef choose(x):\n    """Best."""\n    return x.max()  # why\n'
    )
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "k.cpp").write_text("int k = 1;\n")
    (tmp_path / "config.py").write_text("WIDTH = 3\n")
    (tmp_path / "figures" / "lines.py").write_text("COLOUR = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new", "seen"),
    [
        ("model/router.py", "x.max()", "x.min()", True),
        ("model/router.py", "# why", "# how", False),
        ("model/router.py", '"""Best."""', '"""The best."""', False),
        ("config.py", "3", "4", True),
        ("kernels/k.cpp", "1", "2", True),
        ("figures/lines.py", "1", "2", False),
    ],
)
def test_files_that_changed_are_named(package, file, old, new, seen):
    before = package_code(package)
    (package / file).write_text((package / file).read_text().replace(old, new))
    assert changed_files(before, package_code(package)) == ([file] if seen else [])


def test_new_and_lost_files_and_another_python_are_said(package):
    before = package_code(package)
    (package / "model" / "new.py").write_text("x = 1\n")
    (package / "config.py").unlink()
    assert changed_files(before, package_code(package)) == ["config.py", "model/new.py"]
    (line,) = changed_files({**before, "python": "py3.9"}, before)
    assert line.startswith("Python 3.9 then")


def test_what_decides_training_is_there():
    files = package_code()
    assert {path.split("/")[0] for path in files} == {*TRAINING, "python"} and "kernels/cpu/tile.h" in files
