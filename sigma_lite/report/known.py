"""The report's section on what `sigma-lite eval` found: scores, and what experts know."""

from __future__ import annotations

from sigma_lite.figures import known
from sigma_lite.figures.series import Entries, of_kind
from sigma_lite.report import markup
from sigma_lite.report.document import Plot, Section


def known_section(entries: Entries) -> list[Section]:
    """One section, or none where nothing was evaluated; of each task the latest result counts."""
    latest = {entry["task"]: entry for entry in of_kind(entries, "eval") if entry["task"] != "drift"}  # of report/after.py
    if not latest:
        return []
    of = {task: latest.get(task, {}) for task in ("heldout", "specialisation", "ablation")}
    bars = "A kind is what a token is: Python documents are labelled by Python's own tokenizer, other text by its bytes."
    lift = "A token's label is that of the token that the router sees. " + _counted(of["specialisation"])
    bits = "100 % would mean that the number of the expert tells the label. Dotted: what labels dealt to other rows give."
    drop = "An expert that no token chose is worth 0. " + _counted(of["ablation"]) + _agreement(of["ablation"])
    plots = (
        Plot("costs", known.costs(of["heldout"]), bars),
        Plot("specialised", known.specialised(of["specialisation"]), lift),
        (
            Plot("information", known.information(of["specialisation"]), bits),
            Plot("worth", known.worth(of["ablation"]), drop),
        ),
    )
    return [Section("known", "What experts know", "", (_scores(latest), *plots))]


def _scores(latest: dict[str, dict]) -> str:
    rows = []
    for task, entry in latest.items():
        scores = [f"{name.replace('_', ' ')} {value:,.4f}" for name, value in entry.items() if isinstance(value, float)]
        rows += [(task, ", ".join(scores), entry["step"], entry["rows"])] if scores else []
    return markup.table(("task", "scores", "step", "rows"), rows) if rows else ""


def _counted(entry: dict) -> str:
    return f"Counted over {entry['source']}." if entry.get("source") else ""


def _agreement(entry: dict) -> str:
    """Do those labels suffer that the missing expert served?"""
    said = []
    for mark in known.MARKS:
        if found := entry.get(f"agreement_{mark}"):
            said.append(f"{mark}s " + ", ".join("–" if value is None else f"{value:+.2f}" for value in found))
    told = "Correlation of an expert's share of a label with the loss that the label gains without it, layer by layer: "
    return f" {told}{'; '.join(said)}." if said else ""
