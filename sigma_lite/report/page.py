"""A record as one HTML file: what stands at its head, and what was drawn from how much."""

from __future__ import annotations

from pathlib import Path

from sigma_lite import __version__, record
from sigma_lite.figures import series
from sigma_lite.report import markup
from sigma_lite.report.document import document
from sigma_lite.report.findings import Finding, findings
from sigma_lite.report.headlines import Headline, headlines
from sigma_lite.report.sections import sections_of
from sigma_lite.storage import atomic_write, readable

MARKS = {True: ("yes", "holds"), False: ("no", "fails"), None: ("fact", "fact")}


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run's folder (default: RUN/report.html) and return its path.

    The page is one file that opens without a network; the same record (and evals.jsonl, if there is one) gives the same
    bytes. Size: 5 MB of plotly.js and the data, which is packed in 32 bits and thinned for long runs (the page says where).
    Raises StorageError when the folder holds no record or the page cannot be written.
    """
    path = record.run_files(run)
    name = Path(run).resolve().name
    out = Path(out) if out else Path(run) / "report.html"
    page = render(record.read(path) + record.read(path.with_name(record.EVALS)), name)
    with atomic_write(out) as file:
        file.write(readable(page).encode())  # the name of the folder and the command may hold any bytes
    return out


def render(entries: list[dict], name: str) -> str:
    """The page as text."""
    tiles, found = "".join(map(_tile, headlines(entries))), "".join(map(_finding, findings(entries)))
    return document(
        kind="run report",
        title=name,
        lead=" · ".join(str(part) for part in _lead(entries) if part),
        head=f'<dl class="tiles">{tiles}</dl>\n<ul class="findings">{found}</ul>',
        sections=sections_of(entries),
        footer=_footer(entries),
    )


def _lead(entries: list[dict]) -> list:
    run, net = series.last(entries, "run"), series.settings(entries).get("net") or {}
    shape = f"{net['n_layers']} layers × {net['n_experts']} experts" if {"n_layers", "n_experts"} <= set(net) else ""
    if net.get("n_experts") == 1:
        shape = f"dense, {net.get('n_layers', '?')} layers"
    commit = f"commit {run['commit']}" if run.get("commit") else ""
    return [shape, run.get("device"), run.get("time"), commit] if run else ["no start recorded yet"]


def _tile(tile: Headline) -> str:
    detail = f'<dd class="detail">{markup.escape(tile.detail)}</dd>' if tile.detail else ""
    return f"<div><dt>{markup.escape(tile.name)}</dt><dd>{markup.escape(tile.value)}</dd>{detail}</div>"


def _finding(finding: Finding) -> str:
    kind, word = MARKS[finding.holds]
    return f'<li class="{kind}"><b>{word}</b>{markup.escape(finding.text)}</li>'


def _footer(entries: list[dict]) -> str:
    loads, steps = len(series.windows(entries)), len(series.of_kind(entries, "step"))
    text = (
        f"Drawn from {steps:,} recorded steps and {loads:,} load windows. Numbers are held in 32 bits, the heat map in"
        " whole percent."
    )
    if steps > 2000:
        text += " Of each stretch of steps the lowest and the highest value are drawn, so that spikes stay."
    if loads > 60:
        text += " The heat map holds 60 evenly spaced windows" + (", curves over windows 400." if loads > 400 else ".")
    return markup.paragraph(text + f" Made by sigma_lite {__version__}; this file loads nothing from anywhere.")
