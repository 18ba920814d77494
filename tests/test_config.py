"""The settings: the ledger of the full model, and errors that name the rule, the value and the fix."""

import dataclasses

import pytest

from sigma_lite.config import PRESETS, ConfigError, ModelConfig, RowsConfig
from sigma_lite.runfile import load_run

SIGMA_HEAD = (8, 8, 6, 6, 4, 4, 2, 2)


def test_ledger_reproduces_the_published_counts():
    full = ModelConfig.preset("sigma_moe_tiny")
    before = (*SIGMA_HEAD, *(1,) * 48)
    assert full.ledger().active == 536_924_160  # "0.5B"
    assert full.ledger(before).active == 536_924_160 + 32 * 3 * 1536 * 768  # "0.65B": 32 more experts in the head
    assert round(full.ledger(before).active / 1e9, 3) == 0.650
    assert round(full.ledger().non_embedding / 1e9, 3) == 19.364
    assert 19.5e9 < full.ledger().total < 20.5e9


@pytest.mark.parametrize("preset", ["toy"])
@pytest.mark.parametrize("tie", [True, False])
def test_ledger_counts_the_parameters_that_exist(preset, tie):
    from sigma_lite.model import Transformer

    config = dataclasses.replace(PRESETS[preset], tie_embeddings=tie)
    assert config.ledger().total == sum(p.numel() for p in Transformer(config).parameters())


def test_full_model_can_be_built_without_memory_and_matches_its_ledger():
    import torch

    from sigma_lite.model import Transformer

    config = ModelConfig.preset("sigma_moe_tiny")
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.ledger().total


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 97}, "top_k=97 exceeds n_experts=96"),
        ({"n_heads": 6, "n_kv_heads": 4}, "try n_kv_heads=3"),
        ({"head_dim": 31}, "try 32"),
        ({"d_model": 0}, "d_model=0: must be at least 1"),
    ],
)
def test_a_shape_that_cannot_work_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**settings)


def test_rows_must_divide():
    with pytest.raises(ConfigError, match="try per_step=36"):
        RowsConfig(per_step=32, per_micro=12)
    assert RowsConfig(per_step=32, per_micro=8).accumulation(2) == 2


def test_k_list_is_checked():
    with pytest.raises(ConfigError, match="3 entries for n_layers=4"):
        ModelConfig().check_k([1, 1, 1])
    with pytest.raises(ConfigError, match=r"k_per_layer\[2\]=0"):
        ModelConfig().check_k([1, 1, 0, 1])


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("model: {net: {n_expert: 8}}", "model.net.n_expert; did you mean 'n_experts'"),
        ("modle: {}", "unknown key 'modle'; did you mean 'model'"),
        ("model: {nett: {}}", "did you mean 'net'"),
        ("model: {net: {n_layers: four}}", "expected int"),
        ("model: {net: {n_layers: true}}", "expected int"),
        ("model: {sparsity: {head: [8, 97]}}", r"sparsity.head\[1\]=97 exceeds n_experts=96"),
        ("model: {sparsity: {head: [1, 1, 1, 1, 1]}}", "5 entries for n_layers=4"),
        ("model: {balance: {loss: globl}}", "did you mean 'global'"),
        ("data: {corpus: {source: file}}", "did you mean 'files'"),
        ("data: {corpus: {source: files}}", "needs path"),
        ("data: {rows: {length: 0}}", "length=0"),
        ("model: [1, 2", "is not valid yaml"),
        ("- 1", "must hold keys"),
        ("model: 3", "must be a group of keys"),
    ],
)
def test_a_bad_yaml_is_refused_with_the_nearest_fix(tmp_path, yaml, words):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigError, match=words):
        load_run([path])


def test_yaml_files_overlay_and_numbers_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: {net: {n_layers: 6}, optim: {lr: 1e-3}, sparsity: {head: [4, 2], switch_step: 3}}\n"
    )
    (tmp_path / "b.yaml").write_text("model: {net: {n_layers: 2, vocab_size: 512}}\ntrainer: {max_steps: 5}")
    run = load_run([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert (run.net.n_layers, run.optim.lr, run.sparsity.head) == (2, 1e-3, (4, 2))
    assert run.corpus.vocab_size == 512, "the tokenizer gets the model's vocabulary"
    assert run.trainer == {"max_steps": 5}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_run([tmp_path / "nowhere.yaml"])
