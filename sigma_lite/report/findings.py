"""What a run shows, one sentence a claim. Every word that judges follows from a number of the record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sigma_lite.figures.learning import BASELINES
from sigma_lite.figures.series import (
    Entries,
    column,
    dead,
    deep_layer,
    extremes,
    known,
    last,
    of_kind,
    per_expert,
    per_layer,
    settings,
    switch_steps,
    windows,
)
from sigma_lite.report.headlines import n_experts
from sigma_lite.report.words import count, percent


@dataclass(frozen=True)
class Finding:
    """One claim. `holds`: yes, no, or None where it only describes."""

    holds: bool | None
    text: str


def findings(entries: Entries) -> list[Finding]:
    """One sentence a claim, in the order of the page."""
    found = [_progress(entries), *_against(entries)]
    if n_experts(entries) > 1 and windows(entries):
        found += [_blind_spot(entries), _deep(entries), _all_alive(entries), _switch(entries)]
    found.append(_sound(entries))
    return [finding for finding in found if finding]


def _progress(entries: Entries) -> Finding | None:
    done, planned = last(entries, "step").get("step"), (settings(entries).get("trainer") or {}).get("max_steps")
    if done is None or not planned or planned < 0:
        return None
    if done >= planned:
        return Finding(True, f"The run is complete: step {done:,} of {planned:,}.")
    return Finding(None, f"The run stands at step {done:,} of {planned:,}; everything below is true up to there.")


def _against(entries: Entries) -> list[Finding]:
    bits, data = last(entries, "validation").get("bits_per_byte"), last(entries, "run").get("data") or {}
    found = []
    for key, name in BASELINES.items():
        other = data.get(key)
        if known(bits) and known(other):
            less = 100 * (1 - bits / other)
            margin = f"{abs(less):.0f} % {'less' if less >= 0 else 'more'}"
            text = f"Held-out text costs {bits:.3f} bits per byte, {name} needs {other:.3f}: {margin}."
            found.append(Finding(less > 0, text))
    return found


def _blind_spot(entries: Entries) -> Finding | None:
    load = windows(entries)[-1]
    lbl, most = per_layer([load], "lbl"), extremes(per_expert(load, "f")[0])[0]
    if not lbl.size or not np.isfinite([lbl[0, 0], most]).all():
        return None
    facts = f"The balance loss of layer 0 is {lbl[0, 0]:.2f} (1 = balanced)"
    if lbl[0, 0] < 1.1 and most >= 1:
        return Finding(None, f"{facts} while its busiest expert gets {1 + most:.1f}× its share: the loss does not see it.")
    return Finding(None, f"{facts} and its busiest expert gets {1 + most:.1f}× its share.")


def _deep(entries: Entries) -> Finding | None:
    load = windows(entries)[-1]
    f_LE, P_LE = per_expert(load, "f"), per_expert(load, "P")
    layer = deep_layer(len(f_LE))
    if layer == 0 or not P_LE.size or not np.isfinite([f_LE[layer], P_LE[layer]]).all():
        return None
    loads, probabilities = (
        f"{len(part) * part.min():.2f}–{len(part) * part.max():.2f}" for part in (f_LE[layer], P_LE[layer])
    )
    text = f"In layer {layer}, shares f lie within {loads}× uniform and probabilities P within {probabilities}×."
    return Finding(None, text)


def _all_alive(entries: Entries) -> Finding | None:
    lost = dead(per_expert(windows(entries)[-1], "f"))
    if not np.isfinite(lost).all():
        return None
    if not lost.any():
        return Finding(True, "No expert is dead in the last window.")
    where = ", ".join(f"layer {layer}: {n:.0f}" for layer, n in enumerate(lost) if n)
    return Finding(False, f"{lost.sum():.0f} experts are dead in the last window ({where}).")


def _switch(entries: Entries) -> Finding | None:
    at, active = switch_steps(entries), of_kind(entries, "step")
    loads = [load for load in windows(entries) if at and load["step"] < at[0]]
    before = [entry.get("active_params") for entry in active if at and entry["step"] < at[0]]
    after = [entry.get("active_params") for entry in active if at and entry["step"] >= at[0]]
    if not loads or not before or not after or not before[-1] or not after[-1]:
        return None
    then, now = (extremes(per_expert(load, "f")[0])[0] for load in (loads[-1], windows(entries)[-1]))
    text = f"The switch at step {at[0]:,} took active parameters from {count(before[-1])} to {count(after[-1])}"
    text += f" ({percent(after[-1] / before[-1] - 1)}); layer 0's busiest expert stood at {percent(then)} before it"
    return Finding(None, f"{text} and stands at {percent(now)} in the last window.")


def _sound(entries: Entries) -> Finding | None:
    losses = column(of_kind(entries, "step"), "loss")
    if not len(losses):
        return None
    skipped = sum("skip" in str(event.get("what")) for event in of_kind(entries, "event"))
    broken = int((~np.isfinite(losses)).sum())
    finite = "the loss is finite at every recorded step" if not broken else f"the loss is not finite at {_steps(broken)}"
    return Finding(not broken if broken or not skipped else None, f"{_steps(skipped)} skipped; {finite}.".capitalize())


def _steps(n: int) -> str:
    return f"{n or 'no'} step{'' if n == 1 else 's'}"
