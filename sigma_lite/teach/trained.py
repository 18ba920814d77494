"""A trained model for chapters that look into one: the reference model where it is stored, else a small one made here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sigma_lite.balance.balancer import GlobalLBL
from sigma_lite.checkpoint import checkpoint_path, newest_whole, write_checkpoint
from sigma_lite.config import BalanceConfig, SparsityConfig
from sigma_lite.data.shards import Prepared
from sigma_lite.data.tokenizer import keep_tokenizer
from sigma_lite.model import Transformer
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import REFERENCE, StorageError
from sigma_lite.teach import practice
from sigma_lite.teach.session import fast, folder

STEPS = 400  # of the small one


def trained(fresh: bool = False) -> Trained:
    """A model that reads Python, with its tokenizer; prints which one it is.

    The small one is trained in the first chapter that asks for it, in about a minute, and kept in data/chapters.

    Args:
        fresh: the small one, whatever is stored: a chapter that trains it further must not depend on what a reader has.
    """
    found = None if fresh else _reference()
    if found:
        print(f"the reference model, step {found.step:,}: {_shape(found)}")
        return found
    data = practice.corpus()
    run = Path(folder(f"chapters/trained-{data.vocab_size}"))
    if newest_whole(run) is None:
        _train(run, data)
    found = Trained(run)
    print(f"a small model, trained here for {found.step} steps: {_shape(found)}")
    return found


def _reference() -> Trained | None:
    """The model that comes with the package; None where the package came without it."""
    try:
        return Trained(REFERENCE)
    except StorageError:
        return None


def _train(run: Path, data: Prepared) -> None:
    model, steps = practice.small_model(), 3 if fast() else STEPS
    practice.train(model, data, steps, GlobalLBL())
    keep(model, run, data, steps)


def keep(model: Transformer, run: Path, data: Prepared, steps: int) -> None:
    """Write a model that a chapter has trained as a run, which every command takes."""
    parts = {"net": model.config, "sparsity": SparsityConfig(), "balance": BalanceConfig(), "optim": practice.OPTIM}
    settings = {name: dataclasses.asdict(part) for name, part in parts.items()}
    settings |= {"rows": dataclasses.asdict(practice.PER_STEP), "corpus": {"dir": str(data.dir)}}
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    content = {"state_dict": state, "global_step": steps, "settings": json.dumps(settings)}
    keep_tokenizer(run, data.dir)
    write_checkpoint(checkpoint_path(run, steps), content)


def _shape(found: Trained) -> str:
    net = found.model.config
    return f"{net.n_layers} layers of {net.n_experts} experts, {net.top_k} active"
