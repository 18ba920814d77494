"""Sampling: the cache changes nothing, a seed fixes everything, and the sampled share follows the model."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.checkpoint import newest_checkpoint
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.data import tokenizer
from sigma_lite.model import Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.serve.generate import draw, sample
from sigma_lite.serve.hf import to_qwen3_moe
from sigma_lite.serve.trained import Trained, plain_prompt
from sigma_lite.storage import StorageError

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Transformer(NET).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_is_argmax_without_a_cache(model):
    prompt = torch.tensor([0, 5, 9, 200])
    found = list(sample(model, prompt, max_new_tokens=20, temperature=0))
    ids = prompt
    for token in found:
        with torch.no_grad():
            assert token == int(model(ids[None]).logits[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([token])])
    assert len(found) == 20


def test_a_seed_fixes_the_text(model):
    def text(seed):
        return list(sample(model, torch.tensor([0]), max_new_tokens=30, temperature=1.0, generator=seeded(seed)))

    assert text(1) == text(1) != text(2)


def test_stops_without_the_stop_token(model):
    free = list(sample(model, torch.tensor([0]), max_new_tokens=30, temperature=1.0, generator=seeded(1)))
    stop = free[10]
    held = list(sample(model, torch.tensor([0]), max_new_tokens=30, temperature=1.0, stop_id=stop, generator=seeded(1)))
    assert held == list(itertools.takewhile(lambda t: t != stop, free))


def test_draw_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = seeded(0)

    def shares(**options):
        drawn = torch.tensor([draw(logits, generator=generator, **options) for _ in range(2000)])
        return torch.bincount(drawn, minlength=4) / 2000

    torch.testing.assert_close(shares(temperature=1.0, top_p=1.0), logits.exp(), atol=0.05, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5, top_p=1.0), (2 * logits).softmax(0), atol=0.05, rtol=0)
    # 0.5 + 0.3 just reaches 0.7: the token that crosses still counts
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.05, rtol=0)
    assert shares(temperature=1.0, top_p=0.5)[0] == 1
    assert shares(temperature=1e-40, top_p=1.0)[0] == 1  # towards greedy, without overflow


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": -1}])
def test_wrong_settings_are_refused_at_once(model, wrong):
    with pytest.raises(ConfigError):
        sample(model, torch.tensor([0]), **{"max_new_tokens": 3, **wrong})


def test_an_empty_prompt_of_tokens(model):
    with pytest.raises(ConfigError, match="prompt is empty"):
        sample(model, torch.tensor([], dtype=torch.int64), max_new_tokens=3)


def test_the_command_is_deterministic(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)

    def text(*options):
        cli.main(["generate", "run", "--max-new-tokens", "30", *options])
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0", "--seed", "2")
    assert text("--prompt", "").strip("\n") != ""  # an empty prompt is the start of a document


def test_a_run_is_loaded_with_the_experts_of_its_step(finished, monkeypatch):
    monkeypatch.chdir(finished)
    trained = Trained("run")
    assert trained.step == 12 and trained.model.k_per_layer == (1, 1)
    pieces = list(trained.continue_text("def ", 20, seed=1))
    assert "".join(pieces).encode()  # whole characters only


# -------------------------------------------------------------------------------------------------- a run on its own


@pytest.fixture
def alone(finished, tmp_path, monkeypatch):
    """The folder of the run and its config, without text and tokens."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "tiny.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_writes_without_the_tokens_it_was_trained_on(alone, finished, capsys, monkeypatch):
    def text() -> str:
        cli.main(["generate", "run", "--max-new-tokens", "20"])
        return capsys.readouterr().out

    lonely = text()
    monkeypatch.chdir(finished)
    assert text() == lonely


def test_report_and_export_need_the_run_only(alone):
    pytest.importorskip("transformers")
    (alone / "run/report.html").unlink()
    cli.main(["report", "run"])
    assert (alone / "run/report.html").stat().st_size > 1e5
    trained = Trained("run")
    theirs = to_qwen3_moe(trained.model)
    ids = torch.tensor([trained.tokenizer.encode("def rule").ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, trained.model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_measuring_needs_the_held_out_tokens_only(alone, finished, command, capsys):
    shutil.copytree(finished / "prepared", "prepared")
    for file in Path("prepared").glob("train-*"):
        file.unlink()
    before = tiny.snapshot(Path("prepared"))
    cli.main([command, "-c", "tiny.yaml"])
    assert tiny.snapshot(Path("prepared")) == before
    if command == "predict":
        assert Path("run/predictions.safetensors").stat().st_size > 1000


def test_another_tokenizer_of_the_same_size_is_refused(alone, finished):
    path = Path("run/tokenizer.json")
    assert path.read_bytes() == (finished / "prepared/tokenizer.json").read_bytes()
    bpe = tokenizer.train(["other words make another vocabulary " * 3, "still as large as it was before it changed"], 300)
    path.write_text(bpe.to_str())
    with pytest.raises(StorageError, match=r"run/tokenizer\.json is not the tokenizer .*give that folder as --data"):
        Trained("run")
    assert Trained("run", finished / "prepared").tokenizer.get_vocab_size() == 300
    path.write_text(tokenizer.train(["a b"], 261).to_str())
    with pytest.raises(StorageError, match="has 261 tokens, the model 300"):
        Trained("run")
    path.unlink()
    with pytest.raises(StorageError, match=r"no tokenizer\.json in run nor in prepared: copy it there"):
        Trained("run")
    with pytest.raises(StorageError, match=r"no tokenizer\.json in elsewhere: copy"):
        Trained("run", "elsewhere")


def test_a_run_that_is_refused_keeps_its_tokenizer(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    kept = Path("run/tokenizer.json").read_bytes()
    for path in list(Path("text").iterdir())[::2]:
        path.unlink()
    newest_checkpoint("run").unlink()
    tiny.write_config(tmp_path, "other.yaml", data__corpus__dir="other")
    assert tiny.refused(cli.main, "fit", "-c", "other.yaml") == 2
    assert Path("run/tokenizer.json").read_bytes() == kept != Path("other/tokenizer.json").read_bytes()


# ------------------------------------------------------------------------------------------------------ odd prompts


@pytest.mark.parametrize("prompt", [b"caf\xe9", b"\xff\xfe", b"ok \xc3"])
def test_a_prompt_that_is_not_utf8_is_refused(finished, monkeypatch, capsys, prompt):
    monkeypatch.chdir(finished)
    assert tiny.refused(cli.main, "generate", "run", "--prompt", os.fsdecode(prompt)) == 2
    assert "the prompt is not UTF-8 (byte 0x" in capsys.readouterr().err


def test_a_prompt_of_another_terminal_is_read_where_it_can_be():
    assert plain_prompt("café".encode().decode("ascii", "surrogateescape")) == "café"
    assert plain_prompt("café 🙂") == "café 🙂"
    with pytest.raises(ConfigError, match=r"not UTF-8 \('\\ud83d' at place 2\)"):
        plain_prompt("a \ud83d")


def test_numbers_that_are_not_finite_are_refused(finished, monkeypatch):
    monkeypatch.chdir(finished)
    trained = Trained("run")
    for value, temperature in itertools.product((float("nan"), float("inf")), (0, 0.8)):
        with torch.no_grad():
            trained.model.norm.weight.fill_(value)
        with pytest.raises(ConfigError, match="logits are not finite: its training diverged"):
            list(trained.continue_text("a", 3, temperature=temperature))
    with pytest.raises(ConfigError, match="seed=18446744073709551616: must fit in 64 bits"):
        trained.continue_text("a", 3, seed=2**64)


def test_a_folder_of_any_name_can_be_reported_and_used(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"run [caf\xe9]")
    shutil.copytree(finished / "run", odd)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (odd, f"~/{odd}"):
        cli.main(["report", name])
        cli.main(["generate", name, "--max-new-tokens", "2"])
    assert "run [caf\\xe9]" in Path(odd, "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "é", dirs_exist_ok=True)
    shutil.move(tmp_path / "é/text", tmp_path / "é/texte é")
    tiny.write_config(tmp_path / "é", data__corpus__path="texte é", data__corpus__dir="prêt")
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    run = [sys.executable, "-m", "sigma_lite"]
    for command in (["prepare", "-c", "tiny.yaml"], ["generate", "run", "--max-new-tokens", "2", "--prompt", "café"]):
        done = subprocess.run([*run, *command], cwd=tmp_path / "é", env={**os.environ, **plain}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"caf?") and (tmp_path / "é/prêt/manifest.json").is_file()  # printed as the terminal can
