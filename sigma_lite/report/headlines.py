"""The numbers of a run that one looks for first: the tiles at the head of the page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sigma_lite.figures.learning import BASELINES
from sigma_lite.figures.series import Entries, column, dead, extremes, known, last, of_kind, per_expert, settings, windows
from sigma_lite.report.words import count, duration, k_text, percent


@dataclass(frozen=True)
class Headline:
    name: str
    value: str
    detail: str = ""


def n_experts(entries: Entries) -> int:
    """Experts per layer: 1 for a dense run, 0 when the record does not say."""
    loads = windows(entries)
    return per_expert(loads[-1], "f").shape[1] if loads else int((settings(entries).get("net") or {}).get("n_experts") or 0)


def headlines(entries: Entries) -> list[Headline]:
    """The numbers one looks for first; those that the record does not hold are left out."""
    tiles = [_held_out(entries), *_sizes(entries), *_balance(entries), *_speed(entries)]
    return [tile for tile in tiles if tile]


def _held_out(entries: Entries) -> Headline | None:
    bits, data = last(entries, "validation").get("bits_per_byte"), last(entries, "run").get("data") or {}
    if not known(bits):
        return None
    others = [f"{name} {data[key]:.3f}" for key, name in BASELINES.items() if known(data.get(key))]
    sources = last(entries, "validation").get("sources") or {}
    others = [f"{name} {each['bits_per_byte']:.3f}" for name, each in sources.items()] + others
    return Headline("held-out bits per byte", f"{bits:.3f}", " · ".join(others))


def _sizes(entries: Entries) -> list[Headline]:
    tiles, steps = [], [entry for entry in of_kind(entries, "step") if entry.get("k")]
    experts, ledger = n_experts(entries), last(entries, "run").get("ledger") or {}
    if steps and experts > 1:
        first, final = steps[0]["k"], steps[-1]["k"]
        began = "" if first == final else f"began with {k_text(first)}"
        tiles.append(Headline("experts per token", f"{k_text(final)} of {experts}", began))
    active = column(of_kind(entries, "step"), "active_params")
    now = active[-1] if len(active) and np.isfinite(active[-1]) else ledger.get("active_target")
    total = ledger.get("non_embedding")
    if now and total:
        detail = f"{total / now:.3g} : 1, embeddings left out" if experts > 1 else "embeddings left out"
        tiles.append(Headline("active / all parameters", f"{count(now)} / {count(total)}", detail))
    return tiles


def _balance(entries: Entries) -> list[Headline]:
    loads = windows(entries)
    if not loads or n_experts(entries) < 2:
        return []
    f_LE = per_expert(loads[-1], "f")
    lost, (most, least) = dead(f_LE), extremes(f_LE[0])
    tiles = []
    if np.isfinite(lost).all():
        detail = f"of {f_LE.size:,}, in the last window"
        tiles.append(Headline("dead experts", f"{lost.sum():.0f}", detail))
    if np.isfinite(most):
        tiles.append(
            Headline("load deviation, layer 0", f"{percent(most)} / {percent(least)}", "most / least loaded expert")
        )
    return tiles


def _speed(entries: Entries) -> list[Headline]:
    final, speeds = last(entries, "step"), column(of_kind(entries, "step"), "tokens_per_s")
    tiles = []
    if known(final.get("tokens")):
        tiles.append(
            Headline("training tokens", count(final["tokens"]), f"{final['step']:,} step{'s' * (final['step'] != 1)}")
        )
    if known(final.get("seconds")):
        tiles.append(Headline("wall time", duration(final["seconds"]), str(last(entries, "run").get("device") or "")))
    if np.isfinite(speeds).any():
        tiles.append(Headline("tokens per second", f"{np.nanmedian(speeds):,.0f}", "median over steps"))
    return tiles
