"""A run, operated on, as another run's folder: a checkpoint of step 0, its diary, and a config that trains it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from sigma_lite import record
from sigma_lite.checkpoint import checkpoint_path, digest_of, newest_whole, read_settings, write_checkpoint
from sigma_lite.config import SparsityConfig, require
from sigma_lite.convert.calibrate import expert_bytes, heldout, heldout_rows, training_rows
from sigma_lite.convert.rebuild import named_parts
from sigma_lite.convert.surgery import Surgery, settings
from sigma_lite.data.of_run import RunData, data_of
from sigma_lite.data.tokenizer import FILE, keep_tokenizer
from sigma_lite.identity import identify
from sigma_lite.model import Parts, Transformer
from sigma_lite.runfile import SECTIONS
from sigma_lite.scale.parameters import shape_of
from sigma_lite.serve.export import new_folder
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import atomic_write, sha256_of

CONFIG = "run.yaml"


def convert(
    run: str | Path,
    out: str | Path,
    surgeries: Sequence[Surgery],
    *,
    rows: int = 64,
    seed: int = 0,
    data: str | Path | None = None,
    parts: Parts | None = None,
    facts: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Operate on RUN's newest checkpoint and write the result as the run OUT, which appears whole or not at all.

    OUT holds a checkpoint of step 0, the tokenizer, a diary with the held-out score before and after, and run.yaml: the
    config by which `sigma-lite fit -c OUT/run.yaml` goes on training it, in a folder of its own.

    Args:
        surgeries: one after the other.
        rows: of the training text, that each surgery may look at.
        seed: torch's, for what a surgery draws.
        data: the prepared data; default: the run's.
        parts: those of the run, if it has parts of a reader's own.
        facts: more for the diary's `run` entry, such as command and commit.

    Returns: bits per byte and bytes of all experts, `before` and `after`.
    Raises: ConfigError for a run without data, before its switch of sparsity, or what a surgery refuses; StorageError
        where OUT holds something.
    """
    require(rows >= 1, f"rows={rows}: must be at least 1")
    with new_folder(out) as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        trained, parent = Trained(run, parts=parts), newest_whole(run)
        model, saved = trained.model, read_settings(parent)
        ks = set(model.k_per_layer)
        require(
            ks == {model.config.top_k},
            f"{parent} uses {sorted(ks)} experts per token: operate on a step from sparsity.switch_step on",
        )
        found = _data(run, saved, data)
        measured_on, calibration = heldout_rows(found), training_rows(found, rows)
        scores = [_scored(model, measured_on)]
        for surgery in surgeries:
            model = surgery(model, calibration).eval()
        scores.append(_scored(model, measured_on))
        origin = {"run": str(run), "checkpoint": parent.name, "step": trained.step, "sha256": digest_of(parent)}
        origin |= {"rows": rows, "seed": seed, "surgeries": [settings(surgery) for surgery in surgeries]}
        _write(folder, out, trained, model, saved, origin, found, scores, facts)
    return {when: {key: score[key] for key in ("bits_per_byte", "bytes")} for when, score in zip(TIMES, scores, strict=True)}


TIMES = ("before", "after")


def _data(run: str | Path, saved: Mapping[str, Any], data: str | Path | None) -> RunData:
    place = data or saved.get("corpus", {}).get("dir")
    require(place is not None, f"{run} was not trained here, so its text is not known: give --data, a prepared folder")
    found = data_of(saved, place)
    kept, folder = Path(run, FILE), found.prepared.dir
    same = not kept.is_file() or sha256_of(kept) == sha256_of(folder / FILE)
    require(same, f"{folder} was prepared with another tokenizer than {run}: its tokens mean something else")
    return found


def _scored(model: Transformer, rows: Sequence) -> dict[str, Any]:
    return {**heldout(model, rows), "bytes": expert_bytes(model)}


def _write(
    folder: Path,
    out: str | Path,
    trained: Trained,
    model: Transformer,
    saved: Mapping[str, Any],
    origin: Mapping[str, Any],
    data: RunData,
    scores: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Fill the new run's folder."""
    now = {"net": dataclasses.asdict(model.config), "sparsity": dataclasses.asdict(SparsityConfig())}
    now |= {name: saved[name] for name in ("balance", "optim", "reward", "corpus", "rows", "imported") if name in saved}
    if trained.model.config.n_experts == 1 < model.config.n_experts:
        now["balance"] = {**now["balance"], **BALANCED}  # of a dense run it is off
    now["corpus"] = {**now.get("corpus", {}), "dir": str(data.prepared.dir)}
    now |= {"mixture": saved["mixture"]} if data.mixture.sources else {}
    identities = {f"parts.{name}": identify(part) for name, part in model.parts.custom.items()}
    checkpoint = {"state_dict": {f"model.{name}": t for name, t in model.state_dict().items()}, "global_step": 0}
    checkpoint["settings"] = json.dumps({**now, **identities, "converted": origin})
    keep_tokenizer(folder, data.prepared.dir)
    checkpoint["TokenDataModule"] = {"tokenizer sha256": sha256_of(folder / FILE)}
    write_checkpoint(checkpoint_path(folder, 0), checkpoint)
    with atomic_write(folder / CONFIG) as file:
        file.write(_config(now, named_parts(model.parts), out, saved).encode())
    entry = {
        **facts,
        "config": {**now, **identities, "converted": origin},
        "ledger": ledger(model),
        "data": data.prepared.facts(),
    }
    what = ", ".join(f"{s['class']}({_words(s['settings'])})" for s in origin["surgeries"])
    change = "; ".join(
        f"{name} {scores[0][key]:{how}} -> {scores[1][key]:{how}}"
        for name, key, how in (("held-out bits per byte", "bits_per_byte", ".4f"), ("bytes of experts", "bytes", ","))
    )
    why = f"from step {origin['step']} of {origin['run']} by {what}; {change}"
    lines = [("run", entry), ("event", {"what": "converted", "why": why}), ("validation", scores[1])]
    for kind, values in lines:
        record.append(folder / "record.jsonl", kind, 0, **values)


BALANCED = {"loss": "global", "z_weight": 1e-3}


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _config(now: Mapping[str, Any], parts: Mapping[str, Any], out: str | Path, saved: Mapping[str, Any]) -> str:
    """The yaml that trains OUT further: the settings of its parent's run, in a folder beside it."""
    groups: dict[str, Any] = {
        section: {name: _plain(now[name]) for name in classes if name in now} for section, classes in SECTIONS.items()
    }
    groups["data"]["corpus"].pop("vocab_size", None)  # always the model's
    groups["model"] |= {"parts": _plain(parts)} if parts else {}
    trainer = {k: v for k, v in saved.get("trainer", {}).items() if k in ("max_steps", "gradient_clip_val", "precision")}
    trainer["default_root_dir"], save = f"{out}-trained", {}
    if (end := trainer.get("max_steps", 0)) > 0:
        save = {"save": {"every": next(n for n in range(max(1, end // 10), end + 1) if end % n == 0)}}
    head = f"# Trains {out} further: sigma-lite fit -c {Path(out) / CONFIG}\n"
    return head + yaml.safe_dump({**groups, **save, "trainer": trainer, "init_from": str(out)}, sort_keys=False)


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what yaml has."""
    return json.loads(json.dumps(value))


def ledger(model: Transformer) -> dict[str, int]:
    """Counts of parameters for a `run` entry."""
    counts = shape_of(model).ledger()
    return {
        "total": counts.total,
        "non_embedding": counts.non_embedding,
        "embedding": counts.embedding,
        "active_initial": counts.active,
        "active_target": counts.active,
    }
