"""A trained model in fewer bytes or less work: held-out bits per byte against both, for each way to compress.

The model is a finished run of usual experts, such as the reference model or runs/toy; of a dense one, blocks are skipped and
weights rounded. Nothing is trained after an operation but where a name says steps. Writes
results/bench/compression-NAME.json and, beside it, a page that opens without a network.

    python benchmarks/compression.py --model NAME_OR_RUN [--rows 32] [--heldout 128] [--steps 60] [--data DIR] [--out FILE]
    python benchmarks/compression.py --draw FILE [--splits results/bench/dense2moe-NAME.json]

24 rows, 32 held-out ones and 24 steps took 16 core-minutes for 4 layers of 32 experts, width 128 (on one thread, in company,
before blocks were skipped); most of it is held-out passes, of which there are some 30.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from chosen import RESULTS, add_model, opened, said

from sigma_lite.config import ConfigError
from sigma_lite.convert.calibrate import expert_bytes
from sigma_lite.convert.stored import LowRank
from sigma_lite.convert.surgery import Surgery, settings
from sigma_lite.data.rows import Batch
from sigma_lite.figures.surgery import experts_per_token, loss_against_bytes, split_order
from sigma_lite.model import Routing, Transformer
from sigma_lite.papers.blocks import DropBlocks, MixtureOfBlocks
from sigma_lite.papers.compression import Factorise, Merge, Nucleus, Prune, Quantise, Skip, ToDense
from sigma_lite.report import markup
from sigma_lite.report.document import Plot, Section, document
from sigma_lite.storage import atomic_write, write_json
from sigma_lite.train.provenance import device_name, git_commit


def ways(model: Transformer, steps: int) -> Iterator[tuple[str, str, Sequence[Surgery]]]:
    """(kind, name, surgeries in order)."""
    F, K = model.config.d_expert, model.config.top_k
    for keep in (0.75, 0.5, 0.25):
        yield "prune, each layer", f"{keep:.0%} of each layer's experts", [Prune(keep)]
        yield "prune, all layers", f"{keep:.0%} of all experts", [Prune(keep, scope="global")]
        yield "merge", f"{keep:.0%} of the networks", [Merge(keep)]
        yield "merge, not aligned", f"{keep:.0%} of the networks", [Merge(keep, align=False)]
    for share in (2, 4):
        yield "low rank", f"rank {F // share}", [Factorise(F // share)]
    yield "quantise", "bfloat16", [Quantise(16)]
    yield "quantise", "INT8, a scale a row", [Quantise(8)]
    yield "quantise", "INT4, a scale a row", [Quantise(4)]
    yield "quantise", "INT4, groups of 32", [Quantise(4, group=32)]
    yield "prune and INT8", "75% of each layer's experts, INT8", [Prune(0.75), Quantise(8)]
    if K > 1:
        yield "skip", "second choice dropped below the median ratio", [Skip()]
        for p in (0.3, 0.5):
            yield "top-p", f"p = {p}", [Nucleus(p)]
    for experts in (K, 4 * K):
        yield "dense student", f"{experts} experts wide, {steps} steps", [ToDense(experts, steps)]
    L = model.config.n_layers
    for kept in sorted({L // 2, 3 * L // 4, L - 1}):
        yield "blocks dropped", f"{kept} of {L} blocks, {steps} steps", [DropBlocks(kept, steps)]
    for size in (n for n in (2, 4) if L % n == 0):
        for kept in range(size // 2, size):
            name = f"{kept} of {size} in each group, {steps} steps"
            yield "blocks skipped by tokens", name, [MixtureOfBlocks(size, kept, steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser, required=False)
    parser.add_argument("--rows", type=int, default=32, help="to calibrate on, and to distil from")
    parser.add_argument("--heldout", type=int, default=128, help="rows, spread over the held-out text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--draw", type=Path, help="a file of this benchmark: draw its page again")
    parser.add_argument("--splits", type=Path, help="a file of benchmarks/dense2moe.py, for the same page")
    options = parser.parse_args()
    if not (options.draw or options.model):
        parser.error("give --model NAME_OR_RUN, or --draw FILE")
    out = options.draw or options.out or RESULTS / "bench" / f"compression-{options.model.name}.json"
    if not options.draw:
        write_json(out, measured(options))
    page = draw(json.loads(out.read_bytes()), json.loads(options.splits.read_bytes()) if options.splits else None)
    with atomic_write(out.with_suffix(".html")) as file:
        file.write(page.encode())
    print(out.with_suffix(".html"))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    model, rows_of, measure = opened(options.model, options.data, options.rows, options.heldout)
    rows = rows_of(0)
    found = [{"kind": "whole", "name": "as trained", **cost(model, rows), "bits_per_byte": measure(model)}]
    print(found[-1], flush=True)
    for kind, name, surgeries in ways(model, options.steps):
        try:
            small = model
            for surgery in surgeries:
                small = surgery(small, rows).eval()
        except ConfigError as error:
            print(f"left out: {kind}, {name}: {error}", flush=True)
            continue
        entry = {"kind": kind, "name": name, **cost(small, rows), "bits_per_byte": measure(small)}
        found.append({**entry, "surgeries": [settings(surgery) for surgery in surgeries]})
        print(entry, flush=True)
    whole, int8 = found[0]["bits_per_byte"], next(row for row in found if row["name"].startswith("INT8"))["bits_per_byte"]
    return {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/compression.py --model {said(options.model)} --rows {options.rows}"
        f" --heldout {options.heldout} --steps {options.steps}",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "unit": f"bits per byte of {options.heldout} held-out rows",
        "net": dataclasses.asdict(model.config),
        "int8_above_whole": round(int8 / whole - 1, 6),
        "rows": found,
        "seconds": round(time.perf_counter() - begun),
    }


@torch.no_grad()
def cost(model: Transformer, rows: Sequence[Batch]) -> dict[str, Any]:
    """bytes: of all experts as kept; read: of those that a token uses, over all layers; experts: of a token; flops: of a
    token's matrix products, forward, without attention's scores."""
    _, routings = model.backbone(rows[0].ids_BS, documents_BS=rows[0].documents_BS)
    used = [float((r.ids >= 0).sum()) / len(r.ids) for r in routings]
    each = []
    for block in model.blocks:
        experts = block.moe.experts
        kept = [*experts.parameters(), *experts.buffers()]
        networks = max(len(tensor) for tensor in kept if tensor.dim() > 1)
        each.append(sum(t.numel() * t.element_size() for t in kept if t.dim() > 1) / networks)
    read = round(sum(count * size for count, size in zip(used, each, strict=True)))
    work = {"experts": round(sum(used) / len(used), 4), "flops": round(2 * multiplied(model, routings, used))}
    return {"bytes": expert_bytes(model), "read": read, **work}


def multiplied(model: Transformer, routings: Sequence[Routing], used: Sequence[float]) -> float:
    """Weights that a token is multiplied with: head, routers, the experts that it uses, attention. A token that skips a
    block still makes its keys and values."""
    c, own = model.config, list(model.stack.parameters()) if model.stack else []
    total = float(c.vocab_size * c.d_model + sum(p.numel() for p in own))
    keys, rest = (2 * c.d_model * heads * c.head_dim for heads in (c.n_kv_heads, c.n_heads))
    for block, routing, count in zip(model.blocks, routings, used, strict=True):
        experts, runs = block.moe.experts, float((routing.ids >= 0).any(1).float().mean())
        thin = isinstance(experts, LowRank)
        network = sum(w[0].numel() for w in (experts.parameters() if thin else experts.weights()))
        total += count * network + runs * block.moe.router.weight.numel()
        total += keys + runs * rest if block.attention else 0
    return total


def draw(facts: dict[str, Any], splits: dict[str, Any] | None) -> str:
    """One page: loss against bytes kept and read, the table, and the dense split where it was measured."""
    costs = [cost for cost in ("bytes", "read", "flops") if cost in facts["rows"][0]]  # older files have no flops
    plots = [(f"kept-{cost}", loss_against_bytes(facts, cost)) for cost in costs]
    head = ("kind", "what", "bits per byte", "MB kept", "kB read per token", "experts per token", "MFLOP per token")
    table = markup.table(head, [_row(row) for row in sorted(facts["rows"], key=lambda row: row["bits_per_byte"])])
    sections = [Section("compression", "Experts in fewer bytes", "", (*map(_plot, plots), table, _how(facts)))]
    if splits:
        plots = [("split-order", split_order(splits)), ("experts-per-token", experts_per_token(splits))]
        sections.append(Section("split", "A dense model, split into experts", "", (*map(_plot, plots), _how(splits))))
    net, device = facts["net"], f"{facts['device']} · commit {facts['commit']}"
    lead = f"{net['n_layers']} layers × {net['n_experts']} experts, {net['top_k']} per token · {device}"
    return document(
        kind="surgery", title="Loss against bytes", lead=lead, head="", sections=sections,
        footer=markup.paragraph("Every number is measured on a trained model. This file loads nothing from anywhere."),
    )  # fmt: skip


def _row(row: dict[str, Any]) -> tuple:
    work = f"{row['flops'] / 1e6:.3f}" if "flops" in row else "not recorded"
    size = f"{row['bytes'] / 1e6:.2f}", f"{row['read'] / 1e3:.1f}", row["experts"], work
    return row["kind"], row["name"], f"{row['bits_per_byte']:.4f}", *size


def _plot(named: tuple[str, Any]) -> Plot:
    name, fig = named
    return Plot(name, fig, (fig.layout.meta or {}).get("caption", ""))


def _how(facts: dict[str, Any]) -> str:
    return markup.fold("How to repeat it", markup.preformatted(facts["command"], "command"))


if __name__ == "__main__":
    main()
