"""The model that comes with the package: stored small, found by its name, and what is said where it is not there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from sigma_lite import cli, storage
from sigma_lite.config import ConfigError
from sigma_lite.convert.stored import dequantise, quantise
from sigma_lite.data.existing import existing
from sigma_lite.serve.trained import Trained, load
from sigma_lite.storage import StorageError, model_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from store_reference import store


@pytest.fixture(scope="module")
def stored(finished, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = Path(yaml.safe_load(Path("tiny.yaml").read_text("utf-8"))["trainer"]["default_root_dir"])
        return folder, store(run, Path("tiny.yaml"), Path("inside/reference")) | {"run": run}


@pytest.fixture
def shipped(stored, monkeypatch) -> Path:
    """As if the package had come with it."""
    monkeypatch.chdir(stored[0])
    monkeypatch.setattr(storage, "__file__", str(stored[0] / "inside/storage.py"))
    return stored[0] / "inside/reference"


def test_without_a_stored_model_the_name_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "__file__", str(tmp_path / "storage.py"))
    for command in (["generate"], ["chat"], ["eval", "sigma_code"], ["explore"]):
        name, *more = command
        assert tiny.refused(cli.main, name, "reference", *more) == 2
        said = capsys.readouterr().err
        assert "this sigma_lite came without its model 'reference'" in said and "store_reference.py" in said
    with pytest.raises(StorageError, match="fit -c scaled_configs/reference.yaml` trains one"):
        load("reference")
    assert not list(tmp_path.iterdir())


def test_the_stored_weights_are_the_rounded_ones(stored, shipped):
    run, ours = Trained(stored[1]["run"]), load("reference")
    assert ours.model.config == run.model.config and ours.length == run.length and ours.end_of_text == run.end_of_text
    assert ours.model.k_per_layer == run.model.k_per_layer and ours.step == run.step > 0
    state, was = ours.model.state_dict(), run.model.state_dict()
    for name, tensor in was.items():
        if ".experts." in name:
            assert torch.equal(state[name], dequantise(*quantise(tensor, bits=8))), name
        elif name.endswith("router.weight"):
            assert torch.equal(state[name], tensor), name
        else:
            assert torch.equal(state[name], tensor.bfloat16().float()), name


def test_every_command_takes_the_name(stored, shipped, capsys):
    before = tiny.snapshot(shipped)
    cli.main(["generate", "reference", "--prompt", "The ", "--max-new-tokens", "5", "--temperature", "0"])
    text = capsys.readouterr().out
    cli.main(["generate", str(shipped), "--prompt", "The ", "--max-new-tokens", "5", "--temperature", "0"])
    assert text == capsys.readouterr().out and text.strip()
    cli.main(["eval", "reference", "heldout", "sigma_code", "--no-execute"])
    assert "bits_per_byte" in capsys.readouterr().out
    cli.main(["export", "reference", "out"])
    cli.main(["import", "reference", "copy"])
    assert torch.equal(Trained("copy").model.blocks[0].moe.experts.w2, load("reference").model.blocks[0].moe.experts.w2)
    assert existing("reference") == (shipped / "tokenizer.json").read_bytes()
    assert tiny.snapshot(shipped) == before, "the package's own folder stays as it is"


def test_the_record_says_what_it_was_trained_on_and_what_it_scores(stored):
    folder, facts = stored
    kept = json.loads((folder / "inside/reference/record.json").read_bytes())
    run = [json.loads(line) for line in (folder / facts["run"] / "record.jsonl").read_text("utf-8").splitlines()]
    last = [entry for entry in run if entry["kind"] == "validation"][-1]
    assert kept["validations"][-1]["step"] == kept["step"] == last["step"]
    assert kept["heldout_before_rounding"] == pytest.approx(last["bits_per_byte"], rel=1e-4)
    assert kept["heldout"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=0.01)
    assert {"kind", "domain"} <= kept["heldout"]["by"].keys()
    assert kept["data"]["train_tokens"] > 0 and kept["starts"] == 1
    assert str(folder) not in json.dumps(kept), "no path of this machine"
    assert facts["bytes"] < 16e6


def test_int8_files_are_for_this_package_alone(shipped):
    config = json.loads((shipped / "config.json").read_bytes())
    assert config["model_type"] == "sigma_lite_int8_qwen3_moe"
    card = (shipped / "README.md").read_text("utf-8")
    assert "library_name: sigma_lite" in card and "transformers\nrefuses the `model_type`" in card and "GGUF" not in card
    from safetensors import safe_open

    with safe_open(shipped / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  a file, not a dict
    assert {kind for name, kind in kinds.items() if name.endswith("_proj")} == {"I8"}
    assert {kind for name, kind in kinds.items() if name.endswith(("_scale", "gate.weight"))} == {"F32"}


def test_an_unfinished_run_or_another_config_is_refused(stored, monkeypatch):
    monkeypatch.chdir(stored[0])
    tiny.write_config(Path(), "longer.yaml", trainer__max_steps=24)
    with pytest.raises(ConfigError, match="stands at step .*: let it end first"):
        store(stored[1]["run"], Path("longer.yaml"), Path("other"))
    assert not Path("other").exists()


def test_a_folder_of_that_name_is_meant_first(shipped, tmp_path, monkeypatch):
    assert model_folder("reference") == shipped
    monkeypatch.chdir(tmp_path)
    Path("reference").mkdir()
    assert model_folder("reference") == Path("reference")


def test_the_model_that_comes_with_the_package_is_as_good_as_is_said():
    folder = Path(storage.__file__).parent / storage.REFERENCE
    facts = json.loads((folder / "record.json").read_bytes())
    scored, by = facts["heldout"], facts["heldout"]["by"]
    assert scored["bits_per_byte"] < 0.85 * facts["data"]["xz_given_training_bits_per_byte"], "what was asked of it"
    assert scored["bits_per_byte"] < 1.005 * facts["heldout_before_rounding"], "int8 experts"
    for kind, parts in by.items():
        bits = sum(part.get("bits_per_byte", 0) * part["bytes"] for part in parts.values())
        assert bits / sum(part["bytes"] for part in parts.values()) == pytest.approx(scored["bits_per_byte"], abs=0.01), kind
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16e6
    assert f"{scored['bits_per_byte']:.3f} bits per byte" in (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_the_model_that_comes_with_the_package_writes():
    written = load("reference").continue_text("import os", 12, seed=1)
    assert "".join(written).strip()
