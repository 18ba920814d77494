"""A plan for people: what `sigma-lite plan` prints without --json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sigma_lite.scale.cluster import ASSUMED, built_in

COUNTS = (  # rows that every plan has, in the order of reading
    "total_params",
    "non_embedding_params",
    "embedding_params",
    "attention_params",
    "router_params",
    "norm_params",
    "expert_params",
    "active_params_initial",
    "active_params_target",
    "k_initial",
    "k_target",
    "sparsity",
    "forward_flops_per_token_initial",
    "forward_flops_per_token_target",
    "head_flops_per_token",
    "attention_flops_per_token",
    "training_flops_per_token_initial",
    "training_flops_per_token_target",
)


def as_table(facts: dict[str, Any]) -> str:
    """Model, machine, memory, traffic, time, disk; a line each, and the assumptions at the end."""
    parts = [_counts(facts), _machine(facts), _memory(facts), _traffic(facts), _time(facts), _disk(facts), _elsewhere(facts)]
    parts.append(_advice(facts))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _counts(facts: dict[str, Any]) -> list[str]:
    return [_line(name.replace("_", " "), _value(facts[name])) for name in COUNTS]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value[:12])) + (f" ... ({len(value)} layers)" if len(value) > 12 else "")
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _machine(facts: dict[str, Any]) -> list[str]:
    cluster, layout = facts["cluster"], facts["layout"]
    how = " (by default; --cluster NAME or FILE: " + ", ".join(built_in()) + ")" if cluster["by_default"] else ""
    by = "" if layout["from"] == "config" else " (NOT the config's: see the note)"
    return [
        _line("cluster", f"{cluster['name']}, {cluster['nodes']} x {cluster['devices_per_node']} devices{how}"),
        _line("layout", _layout(layout) + by),
        _line("precision", facts["precision"]),
        _line("attention in packed rows", facts["attention"]),
        _line("imbalance", _imbalance(layout)),
        *(_line("NOTE", note) for note in facts["notes"]),
    ]


def _imbalance(layout: dict[str, Any]) -> str:
    ranks, given = layout["expert_parallel"], layout["imbalance"]
    if ranks == 1:
        return "none: every device has all experts"
    most = f", of {ranks} devices {ranks:g} at most" if given > ranks else ""
    return f"the fullest device of an exchange gets {given:g} times its share{most} (--imbalance)"


def _layout(layout: dict[str, Any]) -> str:
    mesh = f"data {layout['data_parallel']} x expert {layout['expert_parallel']}" if layout["sharded"] else "one device"
    extra = ", recompute" if layout["recompute"] else ""
    return f"{mesh}, {layout['per_micro']} rows x {layout['accumulation']} micro-batches a device{extra}"


def _memory(facts: dict[str, Any]) -> list[str]:
    first, last = facts["initial"], facts["target"]
    lines = [_line("memory of a device", f"{'before the switch':>18s} {'after it':>18s}")]
    for name, size in first["memory"].items():
        lines.append(_line(f"  {name.replace('_', ' ')}", f"{size_of(size):>18s} {size_of(last['memory'][name]):>18s}"))
    lines.append(_line("  at the fullest moment", f"{size_of(first['peak_bytes']):>18s} {size_of(last['peak_bytes']):>18s}"))
    verdict = "it fits" if facts["fits"] else "IT DOES NOT FIT"
    lines.append(_line("  usable", f"{size_of(facts['usable_bytes']):>18s}   {verdict}"))
    for what in ("activation", "dispatch"):
        per_layer = [size_of(n) for n in first[f"{what}_bytes_per_layer"]]
        lines.append(_line(f"  {what} of layers 0, 1 ...", ", ".join(per_layer[:9]) + " ..." * (len(per_layer) > 9)))
    return lines


def _traffic(facts: dict[str, Any]) -> list[str]:
    lines = [_line("fullest link in a step, initial K", f"{'inside the node':>18s} {'to other nodes':>18s}")]
    for name, sent in facts["initial"]["wire_bytes_per_step"].items():
        sizes = f"{size_of(sent['intra_node']):>18s} {size_of(sent['inter_node']):>18s}"
        lines.append(_line(f"  {name.replace('_', ' ')}", sizes))
    return lines


def _time(facts: dict[str, Any]) -> list[str]:
    lines = [
        "predicted, never measured on a GPU by us; fast: vendor-grade kernels and overlap, slow: ordinary ones;",
        "steps only: no validation, no waiting for checkpoints, restarts or the queue",
    ]
    for stage in ("initial", "target"):
        speed = facts[stage]
        lines.append(_line(f"step, {stage} K", f"{_range(speed['step_seconds'], 's')}, bound by {speed['bound_by'][1]}"))
        lines.append(_line(f"MFU, {stage} K", " to ".join(f"{m:.1%}" for m in reversed(speed["mfu"]))))
        lines.append(_line(f"tokens/s, {stage} K", " to ".join(f"{t:,.0f}" for t in reversed(speed["tokens_per_second"]))))
    if whole := facts["run"]:
        lines.append(_line("whole run", f"{whole['steps']:,} steps, {whole['tokens'] / 1e6:,.0f} M tokens"))
        lines.append(_line("time", duration(whole["hours"])))
        if price := facts["cluster"]["price_per_hour"]:
            lines.append(_line("price", f"{_range(whole['cost'], whole['currency'])} at {price:g} a device and hour"))
    return lines


def _disk(facts: dict[str, Any]) -> list[str]:
    saves, text = facts["checkpoints"], facts["data"]
    while_training = "while training goes on" if saves["in_background"] else "while training waits"
    written = f", {saves['written']} times in the run" if saves["written"] else ""
    lines = [
        _line("checkpoint", f"{size_of(saves['checkpoint_bytes'])}, every {saves['every']} steps{written}"),
        _line("  written in", f"{saves['write_seconds']:.2g} s {while_training}"),
        _line("  disk", f"{size_of(saves['disk_bytes'])} for {saves['on_disk']}: those that are kept and one being written"),
        _line("  host memory of a node", f"{size_of(saves['host_bytes'])} while one is written"),
        _line(
            "  warn a job before its end", f"{saves['stop_seconds']:,} s: a step and two checkpoints, twice, and a minute"
        ),
    ]
    if text["prepared_tokens"] is not None:
        passes = f", {text['passes']:.2g} passes over it" if text["passes"] is not None else ""
        lines.append(_line("data on disk", f"{size_of(text['disk_bytes'])} in {text['dir']}{passes}"))
        for name, source in text.get("sources", {}).items():
            passes = f", {source['passes']:.2g} passes over it" if "passes" in source else ""
            lines.append(_line(f"  {name}", f"{source['prepared_tokens'] / 1e6:,.3g} M tokens{passes}"))
    elif text["disk_bytes"] is not None:
        each = f"{text['bytes_per_token']} bytes for each of the {text['tokens_read'] / 1e6:,.0f} M tokens that are read"
        lines.append(_line("data on disk", f"{size_of(text['disk_bytes'])} at most, not prepared yet: {each}"))
    return lines


def _elsewhere(facts: dict[str, Any]) -> list[str]:
    found = facts["experts_elsewhere"]
    verdicts = {True: ", they fit", False: ", THEY DO NOT FIT", None: ""}
    needs = [
        f"{name} {size_of(found[f'{name}_bytes'])}{verdicts[found['fits'][name]]}" for name in ("devices", "hosts", "disks")
    ]
    share = f"a micro-batch touches {found['active_share']:.0%} of the experts; not what this package does in training"
    return [_line("if experts were kept elsewhere", "; ".join(needs)), _line("  (SE-MoE's bounds, all together)", share)]


def duration(hours: Sequence[float]) -> str:
    """[fast, slow] in the unit in which the longer one is easily read."""
    for unit, in_hours in (("days", 24), ("hours", 1)):
        if max(hours) >= 2 * in_hours:
            return _range([h / in_hours for h in hours], unit)
    return _range([h * 60 for h in hours], "minutes")


def _advice(facts: dict[str, Any]) -> list[str]:
    best, sources = facts["suggested"], facts["cluster"]["sources"]
    if best:
        advice = f"{_layout(best)}: {_range(best['step_seconds'], 's')} a step"
    else:
        enough = facts["fits_from_nodes"]
        advice = f"nothing fits here; {enough} such nodes would do" if enough else "nothing fits here: take a larger device"
    cluster = facts["cluster"]
    guessed = [
        n for n, source in sources.items() if source == ASSUMED and cluster[n] and "nodes" not in n and "devices" not in n
    ]
    return [_line("suggested", advice), _line("assumed, not sourced", ", ".join(guessed) or "nothing")]


def _line(name: str, text: str) -> str:
    return f"{name:34s} {text}".rstrip()


def _range(pair: Sequence[float], unit: str) -> str:
    fast, slow = (f"{value:.2g}" if value < 100 else f"{value:,.0f}" for value in pair)
    return f"{fast} to {slow} {unit}"


def size_of(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1024
    return f"{count:,.2f} GiB"
