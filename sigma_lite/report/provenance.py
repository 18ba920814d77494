"""What is needed to repeat a run: commands, versions, machine, settings, parameter ledger, events."""

from __future__ import annotations

import yaml

from sigma_lite.figures.series import Entries, last, of_kind
from sigma_lite.report import markup
from sigma_lite.report.words import count

LEDGER = {
    "total": "all parameters",
    "embedding": "embedding (and output head, when it is not tied)",
    "non_embedding": "everything else",
    "active_initial": "active for one token at the start, non-embedding",
    "active_target": "active for one token at target sparsity, non-embedding",
}
NOTHING = '<p class="absent">No start recorded yet: this record has no run entry.</p>'


def commands(entries: Entries) -> str:
    """The command of every start; a run that was resumed has several."""
    starts = of_kind(entries, "run")
    if not starts:
        return NOTHING
    pieces, shown = [], None
    for number, start in enumerate(starts, start=1):
        if len(starts) > 1:
            pieces.append(f"<h3>Start {number} of {len(starts)}, at step {start['step']:,}</h3>")
        pieces.append(markup.preformatted(str(start.get("command") or "unknown"), "command"))
        started, *machine = _machine(start)
        repeated = [("machine, commit, versions", "as in the start before")]
        pieces.append(markup.table((), [started, *(machine if machine != shown else repeated)]))
        shown = machine
    return "".join(pieces)


def _machine(start: dict) -> list[tuple[str, object]]:
    versions = start.get("versions") or {}
    rows = [("started", start.get("time")), ("device", start.get("device")), ("commit", start.get("commit"))]
    cpu, experts = start.get("cpu") or {}, start.get("experts") or {}
    rows.append(("vector instructions", cpu.get("instructions")))
    rows.append(("experts", f"backend {experts['backend']!r}: {experts['why']}" if experts else None))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(name, "not recorded" if value in (None, "") else value) for name, value in rows]


def sizes(entries: Entries) -> str:
    """Parameter ledger and data of the latest start."""
    start = last(entries, "run")
    ledger, data = start.get("ledger") or {}, start.get("data") or {}
    pieces = []
    if ledger:
        names = [name for name in LEDGER if name in ledger] + [name for name in ledger if name not in LEDGER]
        rows = [(LEDGER.get(name, name), ledger[name], count(ledger[name])) for name in names]
        pieces.append("<h3>Parameter ledger</h3>" + markup.table(("", "parameters", ""), rows))
    if data:
        rows = [(name.replace("_", " "), "not recorded" if value is None else value) for name, value in data.items()]
        pieces.append("<h3>Data</h3>" + markup.table((), rows))
    return "".join(pieces)


def configuration(entries: Entries) -> str:
    """The whole config as yaml, folded; each earlier start only where it differed."""
    starts = [start for start in of_kind(entries, "run") if start.get("config")]
    if not starts:
        return '<p class="absent">No config recorded yet.</p>'
    pieces = ["<h3>Settings</h3>", markup.fold("The whole config", markup.preformatted(_yaml(starts[-1]["config"])))]
    for number, start in enumerate(starts[:-1], start=1):
        if start["config"] != starts[-1]["config"]:
            pieces.append(
                markup.fold(f"Config of start {number}, which differed", markup.preformatted(_yaml(start["config"])))
            )
    return "".join(pieces)


def _yaml(config: dict) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def diary(entries: Entries) -> str:
    """Every event, in order of steps."""
    events = sorted(of_kind(entries, "event"), key=lambda event: event["step"])
    if not events:
        return '<p class="absent">No event recorded: nothing was skipped and nothing was switched.</p>'
    rows = [(event["step"], event.get("what", ""), event.get("why", "")) for event in events]
    return "<h3>Events</h3>" + markup.table(("step", "what", "why"), rows)
