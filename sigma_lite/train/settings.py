"""When a checkpoint is of the same run. What settings may be at all is in runfile.py and lightning_keys.py."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sigma_lite.checkpoint import read_settings
from sigma_lite.config import CONVERSATIONS, OPTIMIZERS, SCHEDULES, class_named, plain_path, require
from sigma_lite.identity import differences, doubts, own_in
from sigma_lite.runfile import SECTIONS, RunConfig, source_corpora

ANOTHER_RUN = "choose another trainer.default_root_dir, or delete that folder to start again"


def without_effect(run: RunConfig, own: bool = False) -> list[str]:
    """A sentence for each setting that is given, is allowed, and changes nothing in this run.

    Args:
        own: whether a balancer that exists only in memory stands in the place of the one that `run` names.
    """
    sentences, steps = [], run.trainer.get("max_steps")
    head, switch = list(run.sparsity.head), run.sparsity.switch_step
    if type(steps) is int and steps > 0:
        if head and switch > steps:
            sentences.append(
                f"sparsity.switch_step={switch} lies beyond max_steps={steps}: experts per token stay {head} ..."
            )
        if run.optim.warmup_steps >= steps:
            sentences.append(f"optim.warmup_steps={run.optim.warmup_steps} of max_steps={steps}: the rate only rises")
    for stage in run.mixture.stages if type(steps) is int else ():
        if stage["at_step"] >= steps > 0:
            sentences.append(f"data.mixture.stages: at_step={stage['at_step']} is not before max_steps={steps}")
    if type(steps) is int and run.rows.ramp and 0 < steps <= run.rows.ramp[-1][0]:
        sentences.append(f"rows.ramp: step {run.rows.ramp[-1][0]} is not before max_steps={steps}, so it does not end")
    if (epochs := run.trainer.get("max_epochs")) not in (None, -1):
        sentences.append(f"trainer.max_epochs={epochs} has no effect: to Lightning the whole run is one epoch")
    if head and {*head} == {run.net.top_k}:
        sentences.append(f"sparsity.head={head} has no effect: net.top_k={run.net.top_k} is the same before the switch")
    for part, used, why, *names in _needs(run, own or run.custom_balance is not None):
        settings = getattr(run, part)
        given = [name for name in names if not used and getattr(settings, name) != getattr(type(settings)(), name)]
        sentences += [f"{part}.{name}={getattr(settings, name)} has no effect: {why}" for name in given]
    return sentences


def _needs(run: RunConfig, own: bool) -> list[tuple]:
    """(section, whether these settings are read, why not, their names ...)."""
    balance, mixture = run.balance, run.mixture
    optimizer, schedule = (class_named(getattr(run.optim, name), name, names)[0] for name, names in CLASSES.items())
    corpora = source_corpora(run.corpus, mixture).values() or [run.corpus]
    rates, instead = ("bias_rate", "bias_decay", "bias_centre"), "custom_balance stands in the place of what balance names"
    return [
        ("sparsity", run.sparsity.head, "there is no sparsity.head", "switch_step"),
        ("balance", not own, instead, "loss", "bias", "temperature", *rates),
        ("balance", own or balance.loss == "top1", "it needs loss=top1", "temperature"),
        ("balance", own or balance.bias != "none", "it needs a bias", *rates),
        ("balance", own or balance.loss != "none", "loss=none has nothing to weigh", "weight"),
        ("balance", own or balance.weight or balance.loss == "none", "balance.weight is 0", "loss"),
        ("optim", schedule not in (SCHEDULES["cosine"], SCHEDULES["linear"]), "it is of schedule wsd", "decay_fraction"),
        ("optim", optimizer in ADAMW or not optimizer.startswith("torch."), f"{optimizer} is no AdamW", "betas", "eps"),
        ("reward", run.reward.answers, "it needs reward.answers", "max_new_tokens", "normalise", "null", "seed"),
        ("rows", any(c.source in CONVERSATIONS for c in corpora), "only conversations are packed", "packed"),
        ("mixture", mixture.sources and not mixture.weights, "it is of several sources without weights", "temperature"),
    ]


CLASSES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
ADAMW = {"torch.optim.AdamW", "torch.optim.adamw.AdamW"}
PER_MICRO, MICROS, STEPS = "rows.per_micro", "trainer.accumulate_grad_batches", "trainer.max_steps"
ROUNDING = "net.attention"  # how attention is computed changes sums by rounding only, and another device needs another way
ANOTHER_MODEL = ("net.", "parts.", "optim.optimizer", "custom_optimizer")
"""Settings in which even a branch must not differ: weights and moments would be of something else."""
OF_NO_WEIGHT = {
    "top_k",
    "router_score",
    "renormalise",
    "norm_eps",
    "init_std",
    "router_init_std",
    "expert_gain",
}
"""Of the model's, those in which it may: the weights fit as they are. RoPE's too, which make rows longer."""


def of_another_model(name: str) -> bool:
    """Whether a setting decides which weights there are, or what moments are of."""
    free = name.removeprefix("net.") in OF_NO_WEIGHT or name.startswith("net.rope_")
    return name.startswith(ANOTHER_MODEL) and not free


def require_same_settings(checkpoint: Path, settings: dict[str, Any], but: Collection[str] = ()) -> None:
    """ConfigError naming the first setting in which a checkpoint differs from this config, and the word that allows it.

    Places of files may differ. How a step's rows are cut into micro-batches may differ too, because another device needs
    another cut, where that changes sums by rounding only: see `_cuts_that_matter`.

    Args:
        but: settings that may differ as well.
    """
    saved, now = completed(read_settings(checkpoint)), json.loads(json.dumps(settings))
    differs = differences(saved, now)
    require(not differs, f"{checkpoint.parents[1]} holds a run with {differs}: {_fix(checkpoint, differs)}")
    for unsure in doubts(saved, now):
        warnings.warn(f"{checkpoint.parents[1]}: {unsure}", stacklevel=2)
    saved, now = flat(saved), flat(now)
    if saved.get("corpus.path") is not None:
        saved["corpus.path"] = plain_path(saved["corpus.path"], "corpus.path")  # ~ was once written down as it stood
    if MICROS in now and MICROS not in saved:  # older checkpoints: counted on as many ranks as now
        saved[MICROS] = now[MICROS] * now[PER_MICRO] / saved[PER_MICRO]
    matter = _cuts_that_matter(settings)
    for name in sorted((saved.keys() | now.keys()) - {ROUNDING, PER_MICRO, MICROS, *but}):
        require(is_place(name) or saved.get(name) == now.get(name), _differs(checkpoint, name, saved, now))
    for name, why in matter.items():
        require(saved.get(name) == now.get(name), f"{_differs(checkpoint, name, saved, now)} ({why})")


def is_place(name: str) -> bool:
    """Whether a setting only says in which folder tokens lie."""
    return name == "corpus.dir" or (name.startswith("mixture.sources.") and name.endswith(".dir"))


def _differs(checkpoint: Path, name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, run = saved.get(name), checkpoint.parents[1]
    if name != MICROS:
        longer = name == STEPS and was < now[name]
        return f"{run} holds a run with {name}={was}, this config says {now.get(name)}: {_fix(checkpoint, name, longer)}"
    rows = now[PER_MICRO] * now[MICROS] / was  # on as many ranks as now
    keep = f"rows.per_micro={rows:.0f} keeps them" if rows == int(rows) and rows >= 1 else ANOTHER_RUN
    return f"{run} holds a run of {was:g} micro-batches a step, this config makes {now[MICROS]}: {keep}"


def _fix(checkpoint: Path, name: str, longer: bool = False) -> str:
    """What to do about a setting that differs; the last part is the word that allows it."""
    run = checkpoint.parents[1]
    if longer:
        return f"add --extend to go on to the new end, or {ANOTHER_RUN}"
    if of_another_model(name):
        return f"{ANOTHER_RUN}; in another folder --init_from={run} takes its weights for a run of another kind"
    return f"{ANOTHER_RUN}; in another folder --branch_from={run} goes on from it with other settings"


def _cuts_that_matter(settings: Mapping[str, Any]) -> dict[str, str]:
    """{setting: why} of those that say which rows are forwarded together, where the balance loss depends on them.

    micro and top1 are of one micro-batch of one rank. The global loss multiplies each micro-batch's probabilities by the
    shares counted so far in the step: with one micro-batch by the whole step's on any number of ranks, with several by
    shares that grow, so their number matters (measured on tests/tiny.py: after 8 steps weights differ by 0.021 to 0.026
    between 1 and 2, 4 or 8, and by 2e-7 without the loss). Of a reader's own loss nobody knows. A loss of each row, none,
    or one that weighs nothing does not; nor does what is learned, for balance/pooled.py weighs micro-batches by tokens.
    """
    loss, own = settings["balance"]["loss"], settings["custom_balance"] is not None
    if any(name.startswith("parts.") for name in settings):
        return dict.fromkeys((PER_MICRO, MICROS), "parts of your own may depend on which rows are forwarded together")
    if settings["balance"]["weight"] == 0 or (loss in ("none", "sequence") and not own):
        return {}
    each = {
        PER_MICRO: "your own balance loss may depend on the rows of a micro-batch"
        if own
        else f"the {loss} loss is of each micro-batch"
    }
    several = {MICROS: "the global balance loss counts loads as micro-batches come, so the weights would be others"}
    if own:
        return each | several
    return several if loss == "global" else each


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the settings that did not exist yet when the checkpoint was written: their defaults mean the old behaviour."""
    classes = {name: cls for part in SECTIONS.values() for name, cls in part.items()}
    defaults = {name: json.loads(json.dumps(dataclasses.asdict(cls()))) for name, cls in classes.items()}
    return {name: {**defaults[name], **part} if name in defaults else part for name, part in saved.items()}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"net": {"d_model": 128}} -> {"net.d_model": 128}, without the identities of a reader's objects and the parent."""
    skipped = {*own_in(settings), "parent"}
    return _flat({name: value for name, value in settings.items() if name not in skipped})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        group = isinstance(value, Mapping) and "class_path" not in value
        flat |= _flat(value, f"{prefix}{key}.") if group else {prefix + key: value}
    return flat
