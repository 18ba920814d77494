"""What a run leaves on disk and needs of a node's own memory: checkpoints, their copies, and the prepared text."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from sigma_lite.runfile import RunConfig, source_corpora
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import Layout, precision_of

PART = 2 << 30  # bytes of a file: what a rank copies at one time, see scale/sharded_checkpoint.py
EVERY, KEEP = 100, 2  # train/callbacks/save.py's
NOTICE = 60  # seconds by which SLURM may be late with a signal, by its manual


def checkpoints(run: RunConfig, layout: Layout, cluster: Cluster, step_seconds: float) -> dict[str, Any]:
    """Sizes in bytes and times in seconds of what `save` asks for.

    `host_bytes` is memory of one node besides the devices': with `in_background` a copy of all that its devices hold of the
    checkpoint, without it a piece, and in both cases room to put a file together. `stop_seconds` is how long before its end
    a job must be told: twice the step under way, the checkpoint being written and its own, and how late a signal may come.
    """
    size = checkpoint_bytes(run)
    save, last = run.save, run.trainer.get("max_steps")
    every, milestones = save.get("every", EVERY), tuple(save.get("milestones", ()))
    on_disk = save.get("keep", KEEP) + 1 + len(milestones)
    seconds = size / (cluster.disk_gbps * 1e9)
    steps = {*range(every, last + 1, every), *(m for m in milestones if m <= last)} if isinstance(last, int) else ()
    writers, own = (layout.devices, -(-size // layout.devices)) if layout.sharded else (1, size)
    file = min(PART, own) if layout.sharded else own
    copied = own if save.get("in_background") else file
    return {
        "checkpoint_bytes": size,
        "every": every,
        "write_seconds": seconds,
        "written": len(steps),
        "writing_seconds": len(steps) * seconds,
        "in_background": bool(save.get("in_background")),
        "on_disk": on_disk,
        "disk_bytes": on_disk * size,
        "host_bytes": -(-writers // cluster.nodes) * (copied + file),
        "stop_seconds": math.ceil(2 * (step_seconds + 2 * seconds) + NOTICE),
    }


def checkpoint_bytes(run: RunConfig) -> int:
    """Weights and AdamW's two moments; the rest is kilobytes."""
    return 3 * run.net.ledger().total * precision_of(run).weight


def data(run: RunConfig) -> dict[str, Any]:
    """Tokens that the run reads, and bytes of its text as tokens: what was prepared, or else one pass over what it reads.

    Of a mixture also `sources`, the same of each, as soon as all of them are prepared.
    """
    last, each = run.trainer.get("max_steps"), token_bytes(run.net.vocab_size)
    read = run.rows.before(last) * run.rows.length if isinstance(last, int) and last > 0 else None
    facts = {"dir": run.corpus.dir, "tokens_read": read, "bytes_per_token": each, "prepared_tokens": None, "passes": None}
    if run.mixture.sources:
        return facts | _sources(run, last, read, each)
    manifest = _manifest(Path(run.corpus.dir))
    if manifest is None:
        return facts | {"disk_bytes": None if read is None else read * each}
    tokens = manifest["train_tokens"]
    size = _disk_bytes(manifest)
    passes = None if read is None or not tokens else read / tokens
    return facts | {"prepared_tokens": tokens, "disk_bytes": size, "passes": passes}


def _sources(run: RunConfig, last: int | None, read: int | None, each: int) -> dict[str, Any]:
    folders = {name: source.dir for name, source in source_corpora(run.corpus, run.mixture).items()}
    manifests = {name: _manifest(Path(folder)) for name, folder in folders.items()}
    if None in manifests.values():
        return {"disk_bytes": None if read is None else read * each}
    tokens = {name: manifest["train_tokens"] for name, manifest in manifests.items()}
    taken = dict.fromkeys(folders, 0.0)  # tokens of each source
    stages = [*run.mixture.shares(tokens), (last, ())] if read else []
    for (first, shares), (end, _) in itertools.pairwise(stages):
        rows = max(0, run.rows.before(min(end, last)) - run.rows.before(min(first, last)))
        for name, share in zip(folders, shares, strict=True):
            taken[name] += share * rows * run.rows.length
    found = {name: {"dir": folders[name], "prepared_tokens": tokens[name]} for name in folders}
    for name in found if read else ():
        found[name] |= {"tokens_read": round(taken[name]), "passes": taken[name] / max(tokens[name], 1)}
    return {
        "prepared_tokens": sum(tokens.values()),
        "disk_bytes": sum(map(_disk_bytes, manifests.values())),
        "sources": found,
    }


def _disk_bytes(manifest: dict[str, Any]) -> int:
    return sum(file["bytes"] for shard in manifest["shards"] for file in shard["files"].values())


def token_bytes(vocab_size: int) -> int:
    """A token's id, as data/stream.py stores it, and a byte that says what it is."""
    return (2 if vocab_size <= 2**16 else 4) + 1


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What `prepare` wrote about finished data; None where it has not finished."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        return manifest if {"train_tokens", "shards"} <= manifest.keys() else None
    except (OSError, ValueError):
        return None
