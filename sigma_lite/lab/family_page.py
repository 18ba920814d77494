"""The family's part of a page, and of a terminal: the table that decides, the scatter, the noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from sigma_lite.figures.family import Point, balance_against_loss
from sigma_lite.lab.family import BASE
from sigma_lite.lab.standing import Floor, Row, floor, verdict
from sigma_lite.report import markup
from sigma_lite.report.document import Plot
from sigma_lite.report.markup import Sorted

ROWS_SAY = (
    "Held-out text, means over seeds. Differences are of bits per byte from {base} at the same seed, with their 95 %"
    " interval. Deviations are of the busiest expert from an even share. Token share: how much of the choice the token's id"
    " explains; in rows of grouped and of null experts recorded before December 2026 it is that of the first group or slot."
    " Steps were timed beside other work. A head sorts by its column. Protocol {protocol}."
)
ASSUMED_SAYS = (
    "What the arm's code says of itself, and beside it what was measured: the share of tokens whose experts change when only"
    " a later token is another."
)


def family(found: Sequence[Row], results: Mapping, others: Iterable[Mapping] = ()) -> tuple[str | Plot, ...]:
    """Table, scatter and noise of the family's rows, for a page."""
    noise = floor(found, results, others)
    said = markup.paragraph(ROWS_SAY.format(base=BASE, protocol=results["protocol"]), "subtitle")
    table = "<h3>Where each arm stands</h3>" + said + markup.table(COLUMNS, _cells(COLUMNS, found, noise), sortable=True)
    table += "".join(map(markup.paragraph, noise_in_words(found, noise)))
    assumed = "<h3>What each arm assumes</h3>" + markup.paragraph(ASSUMED_SAYS, "subtitle")
    assumed += markup.table(ASSUMED, _cells(ASSUMED, found, noise), sortable=True)
    fig = balance_against_loss([_point(row) for row in found], 100 * noise.seeds, BASE)
    plot = Plot(f"{results['experiment']}-balance-against-loss", fig, (fig.layout.meta or {}).get("caption", ""))
    return table, plot, assumed


def noise_in_words(found: Sequence[Row], noise: Floor) -> list[str]:
    """Which differences are nothing."""
    seeds = (
        f"Noise of seeds: with these seeds, chance alone makes differences of up to {100 * noise.seeds:.2f} % of bits per"
        f" byte somewhere among {len(found) - 1} comparisons (pooled over all arms; exceeded in 5 % of tables whose arms are"
        f" independent. These share the runs of {BASE}, so more often, and a verdict asks for an arm's own interval too)."
        if math.isfinite(noise.seeds)
        else "Noise of seeds: not known, because no arm has two seeds."
    )
    away = [f"{100 * d:+.2f} %" for d in noise.elsewhere if abs(d) >= 5e-5]
    elsewhere = (
        f"Another machine or older code made {BASE} with the same seed {len(noise.elsewhere)} times; {len(away)} of these"
        f" ended elsewhere{': ' * bool(away)}{', '.join(away)}."
        if noise.elsewhere
        else f"No other machine and no older code made {BASE} with the same seed."
    )
    clear = sum(row.difference.is_clear for row in found if row.arm != BASE)
    chance = (
        f"Of {len(found) - 1} intervals of 95 %, {clear} leave out 0, where chance makes {0.05 * (len(found) - 1):.1f}. All"
        f" share the runs of {BASE}: they can be wrong together. The laboratory tuned no arm's learning rate; other settings"
        " of some arms may have been tried on this text before."
    )
    return [text.replace("-", "−") for text in (seeds, elsewhere, chance)]


Column = Callable[[Row, Floor], object]
COLUMNS: dict[str, Column] = {
    "arm": lambda row, noise: row.arm,
    "difference": lambda row, noise: Sorted(_percent(row.difference.mean, 2), row.difference.mean),
    "95 % interval": lambda row, noise: Sorted(_between(row), row.difference.low),
    "verdict": lambda row, noise: verdict(row, noise),
    "bits per byte": lambda row, noise: Sorted(f"{row.bits:.4f}", row.bits),
    "layer 0, training": lambda row, noise: Sorted(_percent(row.trained, 0), row.trained),
    "layer 0, held-out": lambda row, noise: Sorted(_percent(_mean(row.heldout), 0), _mean(row.heldout)),
    "all layers, held-out": lambda row, noise: Sorted(_percent(row.layers, 0), row.layers),
    "dead experts": lambda row, noise: Sorted(f"{row.dead:.1f}", row.dead),
    "token share": lambda row, noise: Sorted(_share(row.token_share), row.token_share),
    "step": lambda row, noise: Sorted(f"{1000 * row.step_seconds:.0f} ms", row.step_seconds),
}
ASSUMED: dict[str, Column] = {
    "arm": lambda row, noise: row.arm,
    "K": lambda row, noise: row.assumes.get("k", ""),
    "causal": lambda row, noise: row.assumes.get("causal", ""),
    "leak in training": lambda row, noise: _leak(row, "training"),
    "leak in evaluation": lambda row, noise: _leak(row, "evaluation"),
    "extra state": lambda row, noise: row.assumes.get("state", ""),
    "extra parameters": lambda row, noise: row.assumes.get("parameters", ""),
}


def _cells(columns: Mapping[str, Column], found: Sequence[Row], noise: Floor) -> list[list[object]]:
    return [[cell(row, noise) for cell in columns.values()] for row in found]


def _leak(row: Row, when: str) -> Sorted:
    share = row.leak.get(when, math.nan)
    return Sorted(_share(share), share)


def _point(row: Row) -> Point:
    return Point(row.arm, row.heldout, *(100 * x for x in row.difference[:3]))


def _between(row: Row) -> str:
    low, high = row.difference.low, row.difference.high
    if row.arm == BASE or not math.isfinite(low):
        return ""
    return f"{_percent(low, 2)}\u00a0to\u00a0{_percent(high, 2)}"


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:+,.{digits}f}\u00a0%".replace("-", "−") if math.isfinite(value) else ""


def _share(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%" if math.isfinite(value) else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
