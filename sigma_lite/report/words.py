"""Numbers as a reader says them."""

from __future__ import annotations

import math

NBSP = "\u00a0"  # no line break between a number and its unit


def count(number: float) -> str:
    """1234567 -> "1.23 M"."""
    number = float(f"{number:.3g}")  # first, or 999_999 would read "1e+03 k"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{NBSP}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{NBSP}h {minutes}{NBSP}min"
    return f"{minutes}{NBSP}min {rest}{NBSP}s" if minutes else f"{seconds:.1f}{NBSP}s"


def percent(deviation: float) -> str:
    """0.314 -> "+31 %" with a true minus sign; only an expert without any token gets "−100 %"."""
    whole = max(100 * deviation, -99) if deviation > -1 else -100
    return f"{whole:+,.0f}{NBSP}%".replace("-", "−")


def k_text(k: list[int]) -> str:
    """[8, 6, 1, 1, 1] -> "8, 6, 1 × 3"; [1, 1] -> "1"."""
    runs: list[list[int]] = []
    for each in k:
        if runs and runs[-1][0] == each:
            runs[-1][1] += 1
        else:
            runs.append([each, 1])
    if len(runs) == 1:
        return str(k[0])
    return ", ".join(f"{value} × {n}" if n > 2 else ", ".join([str(value)] * n) for value, n in runs)
