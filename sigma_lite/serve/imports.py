"""A folder of Qwen3-MoE or Qwen3 weights as a run: `generate`, `eval`, `export` and further training take it from there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sigma_lite.checkpoint import checkpoint_path, write_checkpoint
from sigma_lite.config import ModelConfig, RowsConfig, require
from sigma_lite.data import tokenizer
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.serve import layout
from sigma_lite.serve.export import new_folder
from sigma_lite.serve.quantised import KIND, SCALE, dequantise
from sigma_lite.storage import StorageError, model_folder, sha256_of

RECIPE, RECORD = (
    "recipe.yaml",
    "record.json",
)  # beside a model that was stored with its training: benchmarks/store_reference.py


def import_model(folder: str | Path, out: str | Path) -> ModelConfig:
    """Write the model in FOLDER as the run OUT: a checkpoint of step 0, the tokenizer. It appears whole or not at all.

    A dense Qwen3 becomes a model of one expert whose gate is always 1. Weights keep their precision. Only JSON and
    safetensors are read, so no code runs.

    Raises: ConfigError naming the key or tensor that this model has no place for; StorageError for files that are missing or
        damaged, or where OUT holds something.
    """
    folder = model_folder(folder)
    net, checkpoint = as_checkpoint(folder)
    with new_folder(out) as partial:
        if (Path(folder) / tokenizer.FILE).is_file():
            tokenizer.keep_tokenizer(partial, folder)
        write_checkpoint(checkpoint_path(partial, 0), checkpoint)
    return net


def as_checkpoint(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model in FOLDER, and what a checkpoint of step 0 holds. Raises as `import_model`."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    code = config.get("auto_map")
    require(not code, f"auto_map={code!r}: the folder brings code of its own, which is never run here")
    net = layout.net_of({**config, "model_type": (config.get("model_type") or "").removeprefix(KIND)})
    state = _weights(folder, net)
    rows = RowsConfig(length=config.get("max_position_embeddings") or RowsConfig.length)
    run = RunConfig(net=net, rows=rows)
    settings = {name: dataclasses.asdict(getattr(run, name)) for name in ("net", "sparsity", "balance", "optim", "rows")}
    settings["imported"] = {"eos": _end(folder, config)}
    if (recipe := folder / RECIPE).is_file():
        settings["corpus"] = dataclasses.asdict(load_run([recipe]).corpus)
        facts = read_json(folder / RECORD)
        settings["packages"] = facts["data"].get("packages")
        settings["imported"]["step"] = facts["step"]
    checkpoint: dict[str, Any] = {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    checkpoint |= {"global_step": 0, "settings": json.dumps(settings)}
    if (words := folder / tokenizer.FILE).is_file():
        tokenizer.load(words)
        checkpoint["TokenDataModule"] = {"tokenizer sha256": sha256_of(words)}
    return net, checkpoint


def _weights(folder: Path, net: ModelConfig) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        pickles = " (pickles such as pytorch_model.bin can run code and are not read)"
        raise StorageError(f"{folder} lacks {missing[0]}: give a folder with safetensors{pickles}")
    with contextlib.ExitStack() as opened:
        try:
            handles = [opened.enter_context(safe_open(folder / file, "pt")) for file in files]
            place = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118  a file, not a dict

            def read(name: str) -> Tensor:
                tensor, scale = place[name].get_tensor(name), place.get(name + SCALE)
                return dequantise(tensor, scale.get_tensor(name + SCALE)) if tensor.dtype == torch.int8 else tensor

            return layout.to_ours({name for name in place if not name.endswith(SCALE)}, read, net)
        except SafetensorError as error:
            raise StorageError(f"the weights in {folder} are cut or altered: {error}") from error


def _end(folder: Path, config: dict) -> int | None:
    """The id with which generation ends, the first where there are several."""
    more = read_json(path) if (path := folder / "generation_config.json").is_file() else {}
    end = more.get("eos_token_id", config.get("eos_token_id"))
    return end[0] if isinstance(end, list) and end else end


def read_json(path: Path) -> dict:
    """StorageError that names a file which is missing or no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot read {path}: {why}; give the folder of a model, which holds config.json") from error
    if not isinstance(content, dict):
        raise StorageError(f"{path} is no JSON object")
    return content
