"""The report's section on a stage after pretraining: its rewards, and what lies between it and an earlier run."""

from __future__ import annotations

from sigma_lite.figures import after
from sigma_lite.figures.series import Entries, of_kind
from sigma_lite.report import markup
from sigma_lite.report.document import Plot, Section

COSTS = {  # of a `drift` entry: what it is, for the table
    "bits_per_byte_text": "bits per byte of held-out text (what it forgot)",
    "nats_per_token_text": "nats a token of held-out text",
    "nats_per_token_problems": "nats a token of answers to held-out problems",
}
TOLD = {
    "label_bits_text": "bits that an expert tells of a token's kind",
    "label_bits_problems": "... of its role in a problem",
}


def after_section(entries: Entries) -> list[Section]:
    """One section, or none for a run of pretraining that nothing was compared with."""
    drifts = [entry for entry in of_kind(entries, "eval") if entry["task"] == "drift"]
    rewarded = any(entry.get("rewards") for entry in of_kind(entries, "step"))
    if not drifts and not rewarded:
        return []
    parts: list = []
    if rewarded:
        words = (
            "A group is all answers to one problem. Where all earned the same, there is nothing to prefer: it is left out."
        )
        parts.append(Plot("rewards", after.rewards(entries), words))
    if drifts:
        latest = drifts[-1]
        moved = (
            "Pale: the earlier run's routers in the later model. What stays there is due to what routers read, not to them."
        )
        idle = "An expert that no token of a task reaches learns nothing from it."
        pair = Plot("drift", after.drift(latest), moved), Plot("unused", after.unused(latest), idle)
        parts += [pair, _table(latest)]
    return [Section("after", "After pretraining", "", tuple(parts))]


def _table(entry: dict) -> str:
    rows = [(what, *_both(entry[name], "{:.4f}")) for name, what in COSTS.items() if name in entry]
    rows += [(f"{what}, by layer", *_both(entry[name], "{:.2f}")) for name, what in TOLD.items() if name in entry]
    return markup.table((f"against {entry['against']}", "before", "now"), rows)


def _both(pair: dict, form: str) -> list[str]:
    values = [value if isinstance(value, list) else [value] for value in (pair["before"], pair["now"])]
    return [" ".join(map(form.format, own)) for own in values]
