"""A run as a folder that Hugging Face's tools load: config, safetensors in shards, generation config, tokenizer, card.

Readers: transformers 4.57 and 5.x (`AutoModelForCausalLM.from_pretrained(folder)`), lm-evaluation-harness, vLLM by its
layout (its loader reads the names and keys written here; it was not run). The folder brings no code: `trust_remote_code`
stays False.

Not llama.cpp: its graph of Qwen3-MoE always renormalises the gates of the chosen experts. With one expert per token that
makes the gate 1 instead of the router's probability, so a GGUF file of such a model would compute something else. Dense
models and those with `renormalise` are not concerned.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from sigma_lite import record
from sigma_lite.checkpoint import newest_checkpoint, read_settings
from sigma_lite.config import nearest, require
from sigma_lite.data.tokenizer import FILE
from sigma_lite.identity import in_words
from sigma_lite.serve import layout, quantised
from sigma_lite.serve.card import card
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError, cannot_write, model_folder, move_into_place, write_json

DTYPES = ("float32", "bfloat16", "int8")
SHARD = "5GB"


def export(
    run: str | Path, out: str | Path, *, dtype: str = "float32", data: str | Path | None = None, shard: str = SHARD
) -> Path:
    """Write RUN's newest whole checkpoint to the folder OUT, which appears complete or not at all.

    Args:
        dtype: of the weights. "bfloat16" halves the files; the router then reads rounded weights, and some 1 % of the tokens
            choose another expert. "int8" keeps experts as integers with a scale for each row, routers in float32 and the
            rest in bfloat16: a quarter of the bytes, which only this package reads.
        data: a folder with another tokenizer.json, as in `Trained`.
        shard: most bytes of one file, such as "5GB".

    Raises: ConfigError naming what the format cannot say (layers that differ in K, a routing bias, parts of one's own, ...);
        StorageError where there is no checkpoint, or OUT holds something.
    """
    require(dtype in DTYPES, f"dtype {dtype!r}: {nearest(dtype, DTYPES)}")
    run = model_folder(run)
    require(bool(re.fullmatch(r"[1-9]\d*(KB|MB|GB)", shard)), f"shard {shard!r}: write a size such as 5GB or 500MB")
    newest = newest_checkpoint(run)
    own = {name: value for name, value in (read_settings(newest) if newest else {}).items() if name.startswith("parts.")}
    named = ", ".join(f"{name}={in_words(value)}" for name, value in own.items())
    require(not own, f"Qwen3-MoE has no place for parts of your own, and {run} has {named}")
    trained = Trained(run, data)
    layout.refuse_unsayable(trained.model)
    with new_folder(out) as folder:
        net, K = trained.model.config, trained.model.k_per_layer[0]
        int8 = dtype == "int8"
        config = layout.hf_config(net, trained.length, trained.end_of_text, K, "bfloat16" if int8 else dtype)
        config |= {"model_type": quantised.KIND + config["model_type"]} if int8 else {}
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
        (folder / FILE).write_text(trained.tokenizer.to_str(pretty=True), "utf-8")
        write_json(folder / "tokenizer_config.json", _tokenizer_config(trained))
        weights = layout.to_theirs(trained.model.state_dict(), net, stacked=int8)
        if int8:
            write_shards(folder, quantised.small(weights), None, shard)
        else:
            write_shards(folder, weights, getattr(torch, dtype), shard)
        (folder / "README.md").write_text(card(trained, config, _heldout(run, trained.step)), "utf-8")
    return Path(out)


@contextlib.contextmanager
def new_folder(place: str | Path) -> Iterator[Path]:
    """A folder that is filled beside its place, and moved there when the block ends well.

    Raises StorageError at once where the place holds something already.
    """
    place = Path(place)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise StorageError(f"{place} holds something already: choose a new folder, or empty it")
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        move_into_place(partial, place)
    except OSError as error:
        raise cannot_write(place, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, most: str) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and their index. Converts and copies one file at a time.

    Args:
        dtype: None: each tensor keeps its own.
    """
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * (dtype or tensor.dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )
    for file, names in plan.filename_to_tensors.items():
        own = {name: tensors[name].to(dtype or tensors[name].dtype).contiguous() for name in names}
        save_file(own, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _tokenizer_config(trained: Trained) -> dict[str, object]:
    end = trained.tokenizer.id_to_token(trained.end_of_text)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": trained.length,
        "clean_up_tokenization_spaces": False,
    }


def _heldout(run: str | Path, step: int) -> float | None:
    """Held-out bits per byte of this checkpoint, where the diary has them."""
    diary = Path(run) / "record.jsonl"
    found = [e["bits_per_byte"] for e in record.read(diary, "validation") if e["step"] == step] if diary.is_file() else []
    return found[-1] if found else None
