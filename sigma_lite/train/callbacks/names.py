"""What loggers are told, and under which names: the entries of the diary, as whoever watches a run looks for them.

The step is the optimizer step that was just finished, as in the diary; a resumed run goes on with it. Only the first rank
speaks. `trainer.log_every_n_steps` (50 unless it is set) says how often `train/` and `perf/` come, and K; `perf/` averages
over everything since it came before. The last step always comes.

    train/loss                          sum of the weighted terms of this step
    train/{term}                        each term before its weight: lm (nats per token), balance (1: balanced), z
    train/lbl                           load-balancing loss, measured whatever is trained; mean over layers
    train/lr                            learning rate of this step
    train/grad_norm                     L2 norm of the whole gradient before clipping
    train/tokens                        tokens trained on so far, over all ranks
    reward/{what}                       of a stage of rewards, means over the answers of a step: reward (share right), length
                                        (tokens), ended, entropy (nats a token); dead, the share of groups that are left out;
                                        experts_differ and logp_differ between writing and training, see train/reward.py
    data/{source}/rows                  rows of this step from each source; one that is no mixture is named corpus
    data/{source}/passes                how often the source has been read by the end of this step
    perf/tokens_per_second              of training steps alone, over all ranks
    perf/tokens_per_second_overall      with all that steps wait for: the next four
    perf/step_seconds                   of a training step alone; the next four are means over steps too
    perf/data_seconds                   waiting for rows
    perf/saving_seconds                 waiting for checkpoints
    perf/validation_seconds             held-out text
    perf/recording_seconds              other callbacks, the diary and loggers among them
    perf/mfu                            share of the devices' peak that the model's FLOPs take; where the peak is known
    perf/peak_memory_gib                of the fullest rank; on a CPU by how much the process has grown, on Linux only
    moe/layer_{layer}/k                 experts per token
    moe/layer_{layer}/max_deviation     E f - 1 of the busiest expert in a window of balance.window_tokens; 0: even
    moe/layer_{layer}/min_deviation     of the idlest; -1: it got no token
    moe/layer_{layer}/lbl               load-balancing loss of the window; 1: balanced
    moe/layer_{layer}/dead_experts      without a token in the window
    moe/layer_{layer}/router_entropy    mean over tokens, in nats; 0: sure, log E: undecided
    moe/layer_{layer}/logit_max         largest absolute router logit in the window
    moe/layer_{layer}/queries/max_deviation of the busiest head, where attention chooses heads; so min_deviation and lbl
    moe/dead_experts                    of all layers
    moe/expert_grad_norm/min            L2 norms of single experts' gradients before clipping, over all layers, in one of
    moe/expert_grad_norm/median         every `telemetry.every` steps
    moe/expert_grad_norm/max
    moe/expert_grad_norm/max_over_median
    moe/expert_rank_{rank}/rows         rows that the experts of this expert-parallel rank got in that step, all layers
    moe/fullest_rank                    of the fullest rank of each layer, relative to an even share; 1: even
    val/bits_per_byte                   held-out text
    val/nats_per_token
    val/{source}/bits_per_byte          held-out text of each source of a mixture
    val/{source}/nats_per_token
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

Metrics = dict[str, float]


def publish(trainer: pl.Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Tell every logger. NaN and infinity go too: they are what one wants to see. Call it on all ranks."""
    if trainer.is_global_zero and metrics:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=step)
            logger.save()


def due(trainer: pl.Trainer, step: int) -> bool:
    """Whether loggers are told of this step; the same on all ranks."""
    every = trainer.log_every_n_steps
    return step == trainer.max_steps or (every > 0 and step % every == 0)


def of_step(entry: Mapping[str, Any], perf: Mapping[str, float]) -> Metrics:
    """Of a `step` entry, and of means since the last one that loggers were told of."""
    plain = {name: entry[name] for name in ("loss", "lbl", "lr", "grad_norm", "tokens")}
    train = {f"train/{name}": value for name, value in {**entry["terms"], **plain}.items()}
    train |= {f"reward/{name}": value for name, value in entry.get("rewards", {}).items()}
    peak = entry["perf"].get("peak_memory")
    memory = {} if peak is None else {"perf/peak_memory_gib": peak / 2**30}
    data = {f"data/{source}/{what}": n for what in ("rows", "passes") for source, n in entry.get(what, {}).items()}
    return {**train, **data, **{f"perf/{name}": value for name, value in perf.items()}, **memory, **_layers(k=entry["k"])}


def of_load(entry: Mapping[str, Any]) -> Metrics:
    """Of a `load` entry."""
    f_LE = entry["f"]
    dead_L = [sum(f == 0 for f in f_E) for f_E in f_LE]
    by_layer = {name: entry[name] for name in ("lbl", "router_entropy", "logit_max")}
    high_L, low_L = ([len(f_E) * end(f_E) - 1 for f_E in f_LE] for end in (max, min))
    layers = _layers(max_deviation=high_L, min_deviation=low_L, dead_experts=dead_L, **by_layer)
    return {**layers, **_others(entry.get("others", {})), "moe/dead_experts": sum(dead_L)}


def _others(loads: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """Of {"layer 0 queries": {f, P, lbl}}."""
    metrics: Metrics = {}
    for name, load in loads.items():
        _, layer, what = name.split()
        high, low = (len(load["f"]) * end(load["f"]) - 1 for end in (max, min))
        found = {"max_deviation": high, "min_deviation": low, "lbl": load["lbl"]}
        metrics |= {f"moe/layer_{int(layer):02d}/{what}/{key}": value for key, value in found.items()}
    return metrics


def of_experts(entry: Mapping[str, Any]) -> Metrics:
    """Of an `experts` entry."""
    metrics: Metrics = {}
    norms = [norm for norm_E in entry.get("grad_norm", ()) for norm in norm_E]
    if norms:
        middle = statistics.median(norms)
        found = {"min": min(norms), "median": middle, "max": max(norms)}
        found["max_over_median"] = max(norms) / middle if middle else math.inf
        metrics = {f"moe/expert_grad_norm/{name}": value for name, value in found.items()}
    if "rows" in entry:
        metrics |= {f"moe/expert_rank_{rank:02d}/rows": rows for rank, rows in enumerate(entry["rows"])}
        metrics["moe/fullest_rank"] = entry["fullest_rank"]
    return metrics


def of_validation(entry: Mapping[str, Any]) -> Metrics:
    """Of a `validation` entry."""
    held_out = {"val": entry} | {f"val/{source}": found for source, found in entry.get("sources", {}).items()}
    return {f"{of}/{name}": found[name] for of, found in held_out.items() for name in ("bits_per_byte", "nats_per_token")}


OF: dict[str, Callable[[Mapping[str, Any]], Metrics]] = {
    "load": of_load,
    "experts": of_experts,
    "validation": of_validation,
}


def _layers(**lists: list[float]) -> Metrics:
    return {f"moe/layer_{layer:02d}/{name}": value for name, values in lists.items() for layer, value in enumerate(values)}
