"""Scores of a run by the definitions of lm-evaluation-harness, and the harness itself on the export."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.serve.evaluate import TASKS, evaluate
from sigma_lite.serve.export import export
from sigma_lite.serve.likelihood import log_likelihoods, rolling
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError


@pytest.fixture
def trained(finished, monkeypatch) -> Trained:
    monkeypatch.chdir(finished)
    return Trained("run")


def rows(path: Path, *found: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_equal_logits_cost_log_v_a_token(trained, tmp_path):
    with torch.no_grad():
        trained.model.norm.weight.zero_()
    texts = ["def rule(x):\n    return x\n" * 9, "größe"]
    found = evaluate(trained, rows(tmp_path / "a.jsonl", *({"text": text} for text in texts)))
    tokens = sum(len(trained.tokenizer.encode(text).ids) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(300) / size)
    assert math.log2(found["byte_perplexity"]) == pytest.approx(found["bits_per_byte"])


def test_a_long_document_is_read_in_windows_that_score_each_token_once(trained):
    text = "def rule(x):\n    return x + 1\n" * 8
    ids = [0, *trained.tokenizer.encode(text).ids]
    S, total = trained.length, 0.0
    assert len(ids) > 2 * S + 5
    for place in range(1, len(ids)):
        window = (place - 1) // S  # the last one is filled up with what stands before it
        start = min(window * S, len(ids) - 1 - S)
        total += float(log_likelihoods(trained, ids[start:place], ids[place : place + 1]))
    assert sum(float(window.sum()) for window in rolling(trained, text)) == pytest.approx(total, rel=1e-5)


def test_a_choice_is_the_likelier_answer_and_its_length_counts_where_asked(trained, tmp_path):
    def score(answer: str) -> float:
        context = trained.tokenizer.encode("def rule").ids
        own = trained.tokenizer.encode("def rule" + answer).ids[len(context) :]
        return float(log_likelihoods(trained, context, own).sum())

    answers = ["_1_1(x):", "zq", "_"]
    best = max(range(3), key=lambda i: score(answers[i]))
    best_norm = max(range(3), key=lambda i: score(answers[i]) / len(answers[i]))
    assert best != best_norm, "or nothing tells the two apart"
    found = evaluate(trained, rows(tmp_path / "a.jsonl", {"query": "def rule", "choices": answers, "gold": best}))
    assert found == {"rows": 1, "acc": 1.0, "acc_norm": 0.0}


def test_the_command_prints_the_shipped_tasks(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    cli.main(["eval", "run", "sigma_text", "sigma_choice"])
    first, *marks, second = capsys.readouterr().out.splitlines()
    assert marks and all(line.startswith("  kind ") for line in marks)
    assert "sigma_text: bits_per_byte" in first and "(9 rows)" in first
    assert "sigma_choice: acc" in second and "(16 rows)" in second


def test_wrong_tasks_are_refused(trained, tmp_path, capsys):
    assert tiny.refused(cli.main, "eval", "run", "sigma_txt") == 2
    assert "did you mean 'sigma_text'" in capsys.readouterr().err
    assert tiny.refused(cli.main, "eval", "run", "sort2", "sigma_txt") == 2
    said = capsys.readouterr()
    assert "there is no task 'sigma_txt'" in said.err and "eval " not in said.out, "refused before the first is measured"
    with pytest.raises(ConfigError, match="text must be a string"):
        evaluate(trained, rows(tmp_path / "a.jsonl", {"text": 5}))
    with pytest.raises(ConfigError, match="check must be a string"):
        evaluate(trained, rows(tmp_path / "a.jsonl", {"prompt": "a", "check": 5}))
    with pytest.raises(ConfigError, match="all rows need"):
        evaluate(trained, rows(tmp_path / "a.jsonl", {"text": "a"}, {"query": "a"}))
    with pytest.raises(ConfigError, match="is no choice: it needs"):
        evaluate(trained, rows(tmp_path / "a.jsonl", {"query": "a", "choices": []}))
    with pytest.raises(StorageError, match="cannot read"):
        evaluate(trained, "elsewhere.jsonl")


HARNESS = os.environ.get("LM_EVAL_PYTHON", "")  # a Python with lm_eval 0.4.13


@pytest.mark.slow
@pytest.mark.skipif(not HARNESS, reason="set LM_EVAL_PYTHON to a Python that has lm_eval")
def test_the_harness_prints_the_same_digits(trained, tmp_path):
    export("run", tmp_path / "hf")
    command = [HARNESS, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4", "--include_path", "."]
    command += ["--model_args", f"pretrained={tmp_path}/hf,dtype=float32", "--tasks", "sigma_text,sigma_choice"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "found.json")], cwd=TASKS, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(tmp_path.glob("found*.json")).read_bytes())["results"]
    for task in ("sigma_text", "sigma_choice"):
        ours = evaluate(trained, task)
        for name in ours.keys() - {"rows", "by"}:
            print(f"{task} {name}: ours {ours[name]:.8f}, lm_eval {theirs[task][f'{name},none']:.8f}")
            digits = ".6g" if name == "word_perplexity" else ".4f"  # of this model 7e14: no float32 sum has its decimals
            assert f"{ours[name]:{digits}}" == f"{theirs[task][f'{name},none']:{digits}}"
