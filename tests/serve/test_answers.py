"""What a model writes is judged right: by a model that knows the answers, and in a process that stays in its limits."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.data.tasks import encode, problems
from sigma_lite.serve import answers
from sigma_lite.serve.answers import body, code, exact_match, parses
from sigma_lite.serve.generate import Continuation
from sigma_lite.serve.sandbox import run
from sigma_lite.serve.trained import Trained


@pytest.fixture
def trained(finished, monkeypatch) -> Trained:
    monkeypatch.chdir(finished)
    return Trained("run")


# ------------------------------------------------------------------------------------------------------- exact answers


def test_a_model_that_knows_half_of_the_answers_gets_half(trained, monkeypatch):
    given = problems("add2", 40, seed=1, heldout=True)

    def knows(model, prompts, *, max_new_tokens, stop, **options):
        assert all(ids[:2] == [0, 1] and ids[-1] == 2 for ids in prompts) and stop == {3, 0}
        written = []
        for place, one in enumerate(given):
            right = encode(trained.tokenizer, one.response)
            wrong = right[:-1] + [right[-1] + 1]
            assert len(right) < max_new_tokens
            written.append(Continuation(right if place % 4 in (0, 1) else wrong, place % 4 != 1, [], []))
        return written

    monkeypatch.setattr(answers, "generate", knows)
    found = exact_match(trained, "add2", 40, seed=1)
    assert found["exact_match"] == 0.25, "an answer that does not end is none"
    assert found["ended"] == 0.75 and found["standard_error"] == pytest.approx((0.25 * 0.75 / 40) ** 0.5)


@pytest.mark.slow
def test_a_model_learns_to_reverse_two_digits_and_the_score_sees_it(trained):
    """By heart, on its held-out problems: from nothing to nearly all."""
    before = exact_match(trained, "reverse2", 60)
    given = problems("reverse2", 60, heldout=True)
    pairs = [
        ([0, 1, *encode(trained.tokenizer, one.prompt), 2], [*encode(trained.tokenizer, one.answer), 3]) for one in given
    ]
    ids = torch.tensor([prompt + answer for prompt, answer in pairs])
    targets = ids[:, 1:].clone()
    targets[:, : len(pairs[0][0]) - 1] = -100
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=3e-3)
    for _ in range(200):
        loss, _ = trained.model.loss(ids[:, :-1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = exact_match(trained, "reverse2", 60)
    assert before["exact_match"] <= 0.05 and after["exact_match"] >= 0.9, (before, after)


# ---------------------------------------------------------------------------------------------------------------- code


def test_a_continuation_ends_with_its_function():
    assert body(" x + 1\n\n    # more\n\ndef other():\n    pass") == " x + 1\n\n    # more\n"
    assert body(" [\n    1,\n]\nx = 2") == " [\n    1,\n]"
    assert parses("def f():\n    return 1") and not parses("def f(:") and not parses("\0")


def test_code_is_scored_by_parsing_and_by_running(trained, monkeypatch):
    rows = [{"prompt": "def two():\n    return", "check": "assert two() == 2"}] * 4 + [{"prompt": "x ="}]
    texts = [" 2\nprint('not this')", " 3", " (", "", " 1"]

    def writes(model, prompts, **options):
        return [Continuation(trained.ids(text), True, [], []) for text in texts]

    monkeypatch.setattr(answers, "generate", writes)
    found = code(trained, rows)
    assert (found["parses"], found["passes"], found["rows"]) == (3 / 5, 1 / 4, 5), "nothing written is no answer"
    assert "passes" not in code(trained, rows, execute=False)


def test_good_code_runs_and_says_nothing():
    assert run("import math, json, re\nassert math.sqrt(4) == 2\nassert __import__('os').path.exists('.')").ok


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("assert 1 == 2", "AssertionError"),
        ("raise SystemExit(0)", ""),
        ("import os; os._exit(0)", ""),
        ("open('file', 'w')", "writing a file"),
        ("import os; os.open('file', os.O_WRONLY | os.O_CREAT)", "writing a file"),
        ("import os; os.system('true')", "os.system"),
        ("import subprocess; subprocess.run(['true'])", "subprocess"),
        ("import socket; socket.socket()", "refused in the sandbox: socket"),
        ("import os; os.fork()", "os.fork"),
        ("x = 'a' * (1 << 40)", "MemoryError"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_what_does_not_end_well_is_not_passed(wrong, words):
    outcome = run(wrong)
    assert not outcome.ok and words in outcome.why


def test_an_endless_loop_is_stopped():
    begun = time.monotonic()
    outcome = run("while True: pass", seconds=1)
    assert not outcome.ok and "more than 1 s" in outcome.why and time.monotonic() - begun < 30


def test_a_sleeping_process_is_stopped_too(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os; assert 'SECRET' not in os.environ").ok
    assert not run("import time; time.sleep(60)", seconds=1).ok


def test_elsewhere_it_says_that_it_cannot(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(ConfigError, match="POSIX"):
        run("1")


def test_the_command_scores_tasks_and_code(place, finished, capsys):
    import shutil

    shutil.copytree(finished / "run", "run")
    cli.main(["eval", "run", "add2", "sigma_code", "--problems", "8", "--no-execute"])
    out = capsys.readouterr().out
    assert "add2: exact_match 0.0000" in out and "(8 rows)" in out and "sigma_code: parses" in out
    assert Path("run/evals.jsonl").read_text().count("\n") == 2
    assert tiny.refused(cli.main, "eval", "run", "ad2") == 2
    assert "did you mean 'add2'" in capsys.readouterr().err
    assert tiny.refused(cli.main, "eval", "run", "add2", "--problems", "0") == 2
