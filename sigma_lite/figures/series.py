"""Entries of a record as arrays, and the few quantities that figures and report derive from them.

Shapes: W windows, L layers, E experts. A missing or null value is NaN, and a curve has a gap there.
"""

from __future__ import annotations

import numpy as np

Entries = list[dict]


def of_kind(entries: Entries, kind: str) -> Entries:
    return [entry for entry in entries if entry["kind"] == kind]


def last(entries: Entries, kind: str) -> dict:
    """The latest entry of a kind, {} when there is none."""
    return next((entry for entry in reversed(entries) if entry["kind"] == kind), {})


def known(value: object) -> bool:
    """True for a number that was measured: not missing, not null, not NaN."""
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def column(entries: Entries, *path: str) -> np.ndarray:
    """One number of every entry, [N] float64: `column(steps, "terms", "lm")`."""
    values = []
    for value in entries:
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(value)
    return np.array(values, dtype=float)


def per_layer(entries: Entries, key: str) -> np.ndarray:
    """A list over layers of every entry, [W, L] float64; [0, 0] when no entry has it."""
    rows = [entry.get(key) or [] for entry in entries]
    n_layers = max(map(len, rows), default=0)
    whole = [row if len(row) == n_layers else [None] * n_layers for row in rows]
    return np.array(whole, dtype=float).reshape(len(rows) if n_layers else 0, n_layers)


def per_expert(entry: dict, key: str) -> np.ndarray:
    """Share f or probability P of one window, [L, E] float64; [0, 0] when it was not recorded."""
    rows = entry.get(key) or []
    width = max((len(row) for row in rows if row), default=0)
    return np.array([row or [None] * width for row in rows], dtype=float).reshape(len(rows) if width else 0, width)


def windows(entries: Entries, most: int | None = None) -> Entries:
    """The load entries that hold a share f; with `most`, that many evenly spaced ones, first and last included.

    A window that a change of K cut to less than half of the usual tokens is left out: fewer tokens scatter more.
    """
    found = [entry for entry in of_kind(entries, "load") if per_expert(entry, "f").size]
    usual = np.median([entry.get("tokens") or 0 for entry in found]) if found else 0
    found = [entry for entry in found if (entry.get("tokens") or 0) >= usual / 2]
    if most is None or len(found) <= most:
        return found
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, most).round().astype(int))]


def deviation(f_E: np.ndarray) -> np.ndarray:
    """Load deviation E * f - 1 over the last axis: 0 balanced, -1 dead, E - 1 when one expert gets everything.

    Figure 2a of Sigma-MoE-Tiny (2512.16248) draws its largest and smallest value over training.
    """
    f_E = np.asarray(f_E, dtype=float)
    return f_E.shape[-1] * f_E - 1


def extremes(f_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Load deviation of the most and of the least loaded expert over the last axis; NaN where any share is missing."""
    deviations = deviation(f_E)
    return deviations.max(-1), deviations.min(-1)


def dead(f_E: np.ndarray) -> np.ndarray:
    """Experts without a single token, counted over the last axis: 0..E; NaN where any share is missing."""
    f_E = np.asarray(f_E, dtype=float)
    return np.where(np.isnan(f_E).any(-1), np.nan, (f_E == 0).sum(-1))


def entropy(f_E: np.ndarray) -> np.ndarray:
    """Entropy of a distribution over the last axis, in nats: log E when uniform, 0 when one expert gets everything."""
    f_E = np.asarray(f_E, dtype=float)
    return -(f_E * np.log(np.where(f_E > 0, f_E, 1.0))).sum(-1) + 0.0


def ema(steps: np.ndarray, values: np.ndarray, halflife: float) -> np.ndarray:
    """Exponential moving average whose weights halve every `halflife` steps; the first values are not biased to 0.

    NaN is left out: the average waits for the next finite value.
    """
    weighted = weight = 0.0
    averages, before = [], None
    for step, value in zip(steps, values, strict=True):
        decay = 0.5 ** ((step - before) / halflife) if before is not None else 1.0
        before, fresh = step, bool(np.isfinite(value))
        weighted = weighted * decay + (value if fresh else 0.0)
        weight = weight * decay + fresh
        averages.append(weighted / weight if weight else np.nan)
    return np.array(averages)


def thin(values: np.ndarray, most: int = 2000) -> np.ndarray:
    """Indices of about `most` values that draw the same curve: the lowest and highest of each stretch, and both ends.

    A spike of one step survives, which picking every n-th value would lose.
    """
    if len(values) <= most:
        return np.arange(len(values))
    keep = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), most // 2):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            keep |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        if len(finite) < len(stretch):
            keep.add(int(stretch[~np.isfinite(values[stretch])][0]))
    return np.array(sorted(keep))


def tokens_at(entries: Entries, steps: np.ndarray) -> np.ndarray:
    """Training tokens seen by each step, from the step entries around it; the config's rows where there are none."""
    records = of_kind(entries, "step")
    steps = np.asarray(steps, dtype=float)
    at, tokens = column(records, "step"), column(records, "tokens")
    at, tokens = at[np.isfinite(tokens)], tokens[np.isfinite(tokens)]
    if not len(at):
        rows = settings(entries).get("rows") or {}
        return steps * rows.get("per_step", np.nan) * rows.get("length", np.nan)
    beyond = np.maximum(steps - at[-1], 0) * tokens[-1] / max(at[-1], 1)
    return np.interp(steps, np.concatenate([[0], at]), np.concatenate([[0], tokens])) + beyond


def settings(entries: Entries) -> dict:
    """The config of the latest start, {} when no start was recorded."""
    return last(entries, "run").get("config") or {}


def switch_steps(entries: Entries) -> list[int]:
    """Steps at which experts per token changed: recorded events, else the config's switch if the run has reached it."""
    recorded = [e["step"] for e in of_kind(entries, "event") if "sparsity" in str(e.get("what"))]
    schedule = settings(entries).get("sparsity") or {}
    planned = schedule.get("switch_step") if schedule.get("head") else None
    reached = max((e["step"] for e in entries), default=0)
    return sorted(set(recorded)) or ([planned] if planned and planned <= reached else [])


def deep_layer(n_layers: int) -> int:
    """The layer that stands for the deep ones: 52 of 56, as in figure 2c of Sigma-MoE-Tiny, or the same depth."""
    return round(52 / 55 * (n_layers - 1))
