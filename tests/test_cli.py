"""The command line where it is used as it should be. What people get wrong is in test_bad_input.py."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import tiny

from sigma_lite import cli
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.runfile import load_run, overrides

ROOT = Path(__file__).parents[1]


def test_plan_counts_the_model(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    cli.main(["plan", "-c", str(path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    net = load_run([path]).net
    assert facts["total_params"] == net.ledger().total
    assert facts["embedding_params"] == 300 * 32
    assert facts["active_params_target"] == net.ledger().active
    assert facts["active_params_initial"] == net.ledger((2, 1)).active
    cli.main(["plan", "-c", str(path)])
    assert f"{facts['total_params']:,}" in capsys.readouterr().out


def test_later_files_and_options_win(tmp_path, capsys):
    one = tiny.write_config(tmp_path)
    two = tmp_path / "two.yaml"
    two.write_text("model: {net: {n_experts: 16}}")

    def experts(*args):
        cli.main(["plan", "-c", str(one), *args, "--json"])
        return json.loads(capsys.readouterr().out)["router_params"] // (2 * 32)

    assert experts() == 8
    assert experts("-c", str(two)) == 16
    assert experts("-c", str(two), "--model.net.n_experts=32") == 32
    assert experts("--model.net.n_experts", "32", "--config", str(two)) == 32


def test_overrides_are_read_as_yaml():
    assert overrides(
        ["fit", "-c", "a.yaml", "--model.optim.lr=1e-3", "--model.sparsity.head", "[4,2]", "--model.net.top_k=2"]
    ) == {"model": {"optim": {"lr": 1e-3}, "sparsity": {"head": [4, 2]}, "net": {"top_k": 2}}}
    assert overrides(["--seed_everything", "3", "--help", "--print_config"]) == {"seed_everything": 3}
    callbacks = ["--trainer.callbacks+=A", "--trainer.callbacks+=B", "--trainer.callbacks.patience=2"]
    assert overrides(callbacks) == {"trainer": {"callbacks": ["A", {"class_path": "B", "patience": 2}]}}
    with pytest.raises(ConfigError, match="needs a value"):
        overrides(["--model.net.top_k"])


def test_workers_are_a_setting(tmp_path):
    load_run([tiny.write_config(tmp_path, data__num_workers=2)])


@pytest.mark.parametrize("path", sorted((ROOT / "scaled_configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_ladder_is_valid(path):
    assert isinstance(load_run([path]).net, ModelConfig)


def test_print_config_shows_what_runs(place, capsys):
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--model.net.n_experts=16", "--print_config") == 0
    printed = capsys.readouterr().out
    assert "n_experts: 16" in printed and "every: 2" in printed


def test_a_terminal_without_the_character_shows_another(finished, monkeypatch):
    monkeypatch.chdir(finished)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    cli.main(["generate", "run", "--prompt", "a\u00e9b", "--max-new-tokens", "0"])
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"a?b\n"


def test_help(capsys):
    assert tiny.refused(cli.main, "--help") == 0
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in printed
    assert tiny.refused(cli.main, "fit", "--help") == 0
    assert "--save.every" in capsys.readouterr().out


def test_home_and_variables_in_every_path(place, monkeypatch, capsys):
    """Of the config, of the corpus and its tokens, of the run, and of commands on a run."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("SCRATCH", str(place / "scratch"))
    changes = {"data__corpus__path": "~/text", "data__corpus__dir": "~/tokens", "save__every": 2}
    tiny.write_config(place, **changes, trainer__default_root_dir="$SCRATCH/run", trainer__max_steps=2, model__sparsity=None)
    cli.main(["fit", "--config=~/tiny.yaml", "--model.optim.warmup_steps=1"])
    cli.main(["generate", "~/scratch/run", "--data", "$SCRATCH/run", "--max-new-tokens", "2"])
    cli.main(["validate", "-c", "~/tiny.yaml", "--ckpt_path=~/scratch/run/checkpoints/step=000002.safetensors"])
    assert {p.name for p in (place / "scratch/run").iterdir()} >= {"tokenizer.json", "checkpoints", "record.jsonl"}
    assert (place / "tokens/manifest.json").is_file()
    assert not [p for p in place.rglob("*") if p.name.startswith(("~", "$"))]
