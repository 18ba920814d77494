"""Export and import: the same model in both formats, and what a format cannot say is refused by its name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint, write_checkpoint
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.serve import layout
from sigma_lite.serve.export import export
from sigma_lite.serve.imports import import_model
from sigma_lite.serve.trained import Trained, end_of_text, model_weights
from sigma_lite.storage import StorageError

transformers = pytest.importorskip("transformers")

NET = ModelConfig(
    vocab_size=300,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    n_experts=6,
    d_expert=16,
    router_init_std=0.4,
    rope_theta=5000.0,
)
SHAPES = {
    "top-1": {},
    "top-3, renormalised, untied": {"top_k": 3, "renormalise": True, "tie_embeddings": False},
    "top-2": {"top_k": 2, "norm_eps": 1e-5},
    "dense": {"n_experts": 1, "d_expert": 40, "expert_gain": 2.0},
    "longer rows": {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_length": 16},
}


def uneven(model: torch.nn.Module) -> torch.nn.Module:
    """Gains of exactly 1 would hide a gain in the wrong place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.2)
    return model


def saved_run(folder: Path, words: Path, **changes: object) -> Transformer:
    """A run folder with a random model."""
    net = dataclasses.replace(NET, **changes)
    model = uneven(Transformer(net)).eval()
    if net.n_experts == 1:
        model.blocks[0].moe.router.weight.data.zero_()
        model.blocks[1].moe.router.weight.data.zero_()
    settings = {"net": dataclasses.asdict(net), "sparsity": {}, "rows": {"length": 64}}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(checkpoint_path(folder, 7), {"state_dict": state, "global_step": 7, "settings": json.dumps(settings)})
    shutil.copy(words, folder / "tokenizer.json")
    return model


@pytest.fixture
def words(corpus_and_data) -> Path:
    return corpus_and_data / "prepared/tokenizer.json"


def relative_error(ours: Transformer, theirs: torch.nn.Module) -> float:
    ids = torch.randint(0, ours.config.vocab_size, (2, 33))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs.eval()(ids).logits
    assert b.std() > 0.01, "logits that hardly differ would prove nothing"
    return float((a - b).norm() / b.norm())


def load(folder: Path) -> torch.nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not [names for names in (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]) if names]
    return model


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_what_was_exported(shape, tmp_path, words):
    ours = saved_run(tmp_path / "run", words, **SHAPES[shape])
    export(tmp_path / "run", tmp_path / "out")
    theirs = load(tmp_path / "out")
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if shape == "dense" else "Qwen3MoeForCausalLM")
    assert relative_error(ours, theirs) <= 1e-5


def test_a_trained_run_is_exported_by_command_and_reads_as_it_does_here(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    out = tmp_path / "out"
    cli.main(["export", "run", str(out)])
    assert str(out) in capsys.readouterr().out
    trained, theirs, words = Trained("run"), load(out), transformers.AutoTokenizer.from_pretrained(out)
    assert relative_error(trained.model, theirs) <= 1e-5
    text = "def rule(x):\n    return x + 1\n"
    assert words(text)["input_ids"] == trained.tokenizer.encode(text).ids
    assert words.decode(words(text)["input_ids"]) == text
    assert (words.eos_token_id, words.bos_token_id, words.model_max_length) == (0, 0, 32)
    assert (out / "tokenizer.json").read_bytes() == Path("run/tokenizer.json").read_bytes()
    card = (out / "README.md").read_text("utf-8")
    assert "to step 12 on rows of 32 tokens. Held-out text costs" in card and "Not for llama.cpp" in card
    assert not list(tmp_path.glob("*.partial"))


def test_generate_of_transformers_stops_at_the_end_of_a_document(tmp_path, words):
    ours = saved_run(tmp_path / "run", words)
    path = newest_checkpoint(tmp_path / "run")
    checkpoint = read_checkpoint(path)
    checkpoint["state_dict"]["model.norm.weight"].zero_()  # all logits are equal: the first, <|endoftext|>, is the best
    write_checkpoint(path, checkpoint)
    theirs = load(export(tmp_path / "run", tmp_path / "out"))
    assert theirs.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False).tolist() == [[5, 6, 0]]
    settings = (theirs.config.eos_token_id, theirs.generation_config.eos_token_id, theirs.generation_config.bos_token_id)
    assert settings == (0, 0, 0) and theirs.config.max_position_embeddings == 64
    assert theirs.config.pad_token_id is None and ours.config.n_experts == theirs.config.num_experts


def test_both_generations_of_keys_are_written(tmp_path, words):
    saved_run(tmp_path / "run", words)
    config = json.loads((export(tmp_path / "run", tmp_path / "out") / "config.json").read_bytes())
    assert config["num_experts"] == config["num_local_experts"] == 6
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000
    assert config["norm_topk_prob"] is False and config["torch_dtype"] == config["dtype"] == "float32"


def test_shards_and_sixteen_bits(tmp_path, words):
    ours = saved_run(tmp_path / "run", words)
    cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--shard", "20KB", "--dtype", "bfloat16"])
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_bytes())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "out" / file).stat().st_size < 30_000 for file in files)
    theirs = load(tmp_path / "out")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    rounded = uneven(Transformer(NET)).eval()
    rounded.load_state_dict({name: w.bfloat16().float() for name, w in ours.state_dict().items()})
    assert relative_error(rounded, theirs.float()) <= 1e-5
    with pytest.raises(ConfigError, match="dtype 'bfloat': did you mean 'bfloat16'"):
        export(tmp_path / "run", tmp_path / "other", dtype="bfloat")


@pytest.mark.parametrize(
    ("change", "words_of_refusal"),
    [
        ({"router_score": "sigmoid"}, "cannot say router_score='sigmoid'; it can only be 'softmax'"),
        ({"attention_from_layer": 1}, "cannot say attention_from_layer=1; it can only be 0"),
    ],
)
def test_settings_without_a_place_are_refused_by_name(change, words_of_refusal, tmp_path, words):
    saved_run(tmp_path / "run", words, **change)
    with pytest.raises(ConfigError, match=words_of_refusal):
        export(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_k_by_layer_bias_and_parts_are_refused_by_name(tmp_path, words, capsys):
    model = Transformer(NET)
    model.set_k((3, 1))
    with pytest.raises(ConfigError, match=r"\[1, 3\] experts per token \(layer by layer \[3, 1\]\)"):
        layout.refuse_unsayable(model)
    model = Transformer(NET)
    model.blocks[1].moe.router.bias[2] = 0.1
    with pytest.raises(ConfigError, match=r"routing bias .* that layers \[1\] have"):
        layout.refuse_unsayable(model)
    saved_run(tmp_path / "run", words)
    path = newest_checkpoint(tmp_path / "run")
    checkpoint = read_checkpoint(path)
    own = {"parts.router": {"class": "mine.Second", "settings": {"skip": 2}, "code": "x"}}
    checkpoint["settings"] = json.dumps(json.loads(checkpoint["settings"]) | own)
    write_checkpoint(path, checkpoint)
    assert tiny.refused(cli.main, "export", tmp_path / "run", tmp_path / "out") == 2
    assert "no place for parts of your own, and" in (said := capsys.readouterr().err) and "mine.Second(skip=2)" in said


def test_every_setting_of_a_model_is_said_or_refused():
    """A setting that is new in ModelConfig is refused at any other value than its default, until the layout says it."""
    own = {field.name for field in dataclasses.fields(ModelConfig)}
    assert own >= layout.SAID
    assert own - layout.SAID == {"router_score", "attention_from_layer"}, "say it in layout.py, or add it here"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, words):
    saved_run(tmp_path / "run", words)
    (tmp_path / "out").mkdir()
    export(tmp_path / "run", tmp_path / "out")  # empty: fine
    before = tiny.snapshot(tmp_path / "out")
    for write, source in ((export, "run"), (import_model, "out")):
        with pytest.raises(StorageError, match="out holds something already: choose a new folder"):
            write(tmp_path / source, tmp_path / "out")
    assert tiny.snapshot(tmp_path / "out") == before


# -------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("shape", SHAPES)
def test_an_import_of_an_export_is_the_same_run(shape, tmp_path, words):
    ours = saved_run(tmp_path / "run", words, **SHAPES[shape])
    export(tmp_path / "run", tmp_path / "out")
    cli.main(["import", str(tmp_path / "out"), str(tmp_path / "again")])
    again = Trained(tmp_path / "again")
    assert again.model.config == ours.config and again.length == 64 and again.end_of_text == 0
    state = model_weights(read_checkpoint(newest_checkpoint(tmp_path / "again")))
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert (tmp_path / "again/tokenizer.json").read_bytes() == words.read_bytes()
    export(tmp_path / "again", tmp_path / "twice")
    first, second = (tiny.snapshot(tmp_path / name) for name in ("out", "twice"))
    assert {name for name in first if first[name] != second[name]} <= {"README.md"}, "the step is another"


@pytest.mark.parametrize("shape", ["top-1", "dense"])
def test_int8_comes_back_rounded_and_nobody_else_takes_it_for_weights(shape, tmp_path, words):
    ours = saved_run(tmp_path / "run", words, **SHAPES[shape])
    folder = export(tmp_path / "run", tmp_path / "out", dtype="int8")
    import_model(folder, tmp_path / "again")
    again = Trained(tmp_path / "again").model
    for layer, block in enumerate(ours.blocks):
        got, was = again.blocks[layer].moe.experts.w13, block.moe.experts.w13
        step_EM = was.abs().amax(-1) / 127
        assert ((got - was).abs() <= 0.51 * step_EM[..., None]).all() and not torch.equal(got, was)
    with pytest.raises(ValueError, match="sigma_lite_int8_qwen3"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


MOE = {"num_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": []}
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
}


def written_by_transformers(folder: Path, dense: bool = False, stacked: bool = False, **settings: object) -> torch.nn.Module:
    kind = "Qwen3" if dense else "Qwen3Moe"
    config = getattr(transformers, f"{kind}Config")(**COMMON, **({} if dense else MOE) | settings)
    torch.manual_seed(4)
    model = uneven(getattr(transformers, f"{kind}ForCausalLM")(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20 if name.endswith("gate.weight") else 4)  # far from uniform choices and logits
    model.save_pretrained(folder, **({"save_original_format": False} if stacked else {}))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stacked": True},
        {"num_experts_per_tok": 4, "norm_topk_prob": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 77.0}},
        {"dense": True, "intermediate_size": 48},
    ],
    ids=str,
)
def test_what_transformers_writes_gives_the_same_logits_here(settings, tmp_path, words):
    theirs = written_by_transformers(tmp_path / "hf", **settings)
    names = {name for file in (tmp_path / "hf").glob("*.safetensors") for name in _names(file)}
    assert any("experts.gate_up_proj" in name for name in names) == settings.get("stacked", False)
    shutil.copy(words, tmp_path / "hf/tokenizer.json")
    net = import_model(tmp_path / "hf", tmp_path / "run")
    assert net.renormalise == settings.get("norm_topk_prob", False)
    trained = Trained(tmp_path / "run")
    assert relative_error(trained.model, theirs) <= 1e-5
    assert trained.length == 128
    assert "".join(trained.continue_text("def ", 3, temperature=0))


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe'.*did you mean 'qwen3_moe'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "rope_theta": 1e4}}, "'beta_fast': 16"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type='dynamic'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "brings code of its own, which is never run"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"norm_topk_prob": True}, "renormalise=True with top_k=1"),
        ({"num_experts": 7, "num_local_experts": 7}, r"mlp.gate.weight is \[6, 32\], config.json says \[7, 32\]"),
        ({"moe_intermediate_size": 20}, r"gate_proj.weight is \[16, 32\], config.json says \[20, 32\]"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 1}, r"27 tensors are not part of such a model, the first is model.layers.1"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
    ids=str,
)
def test_another_model_is_refused_by_name(change, said, tmp_path, words):
    saved_run(tmp_path / "run", words)
    folder = export(tmp_path / "run", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=said):
        import_model(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_files_that_are_missing_or_cut_are_named(tmp_path, words, capsys):
    saved_run(tmp_path / "run", words)
    folder = export(tmp_path / "run", tmp_path / "hf")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(StorageError, match="are cut or altered"):
        import_model(folder, tmp_path / "new")
    weights.rename(folder / "pytorch_model.bin")
    assert tiny.refused(cli.main, "import", folder, tmp_path / "new") == 2
    assert "pickles such as pytorch_model.bin can run code and are not read" in capsys.readouterr().err
    with pytest.raises(StorageError, match="config.json"):
        import_model(tmp_path, tmp_path / "new")


def test_the_end_of_text_is_found_by_name_or_said_by_the_import(tmp_path, words):
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(words))
    assert end_of_text(bpe, otherwise=9) == 0
    other = Tokenizer.from_str(bpe.to_str().replace("<|endoftext|>", "<stop>"))
    assert end_of_text(other, "<stop>", otherwise=9) == 0
    assert end_of_text(other, otherwise=9) == 9
    with pytest.raises(ConfigError, match="set data.corpus.end_of_text"):
        end_of_text(other)


def test_an_imported_run_is_not_mistaken_for_one_to_go_on_with(place, words, capsys):
    saved_run(place / "random", words)
    export("random", "hf")
    import_model("hf", "run")
    before = tiny.snapshot(place / "run")
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 2
    assert "run holds a run with" in capsys.readouterr().err
    assert tiny.snapshot(place / "run").items() >= before.items()


# ----------------------------------------------------------------------------------------------- another transformers

OTHER = os.environ.get("TRANSFORMERS_4_PYTHON", "")  # a Python with transformers 4.57
THERE = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
words = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save({"logits": model(ids).logits, "ids": words("def f(x): return x")["input_ids"]}, sys.argv[3])
model.save_pretrained(sys.argv[4])
print(transformers.__version__, model.config.num_experts if "Moe" in type(model).__name__ else "dense")
"""


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="set TRANSFORMERS_4_PYTHON to a Python that has transformers 4.57")
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_4_reads_and_writes_it_too(shape, tmp_path, words):
    ours = saved_run(tmp_path / "run", words, **SHAPES[shape])
    export(tmp_path / "run", tmp_path / "out")
    ids = torch.randint(0, 300, (2, 33))
    torch.save(ids, tmp_path / "ids.pt")
    names = [str(tmp_path / name) for name in ("out", "ids.pt", "answer.pt", "theirs")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([OTHER, "-c", THERE, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = torch.load(tmp_path / "answer.pt")
    with torch.no_grad():
        logits = ours(ids).logits
    error = float((logits - answer["logits"]).norm() / logits.norm())
    print(f"transformers {done.stdout.strip()}: {shape}: relative error {error:.1e}")
    assert error <= 1e-5
    import_model(tmp_path / "theirs", tmp_path / "again")
    state = model_weights(read_checkpoint(newest_checkpoint(tmp_path / "again")))
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
