"""Figures of the chapter on tensor cores: what a tile takes of a multiprocessor, and what a compiler made of a kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import plotly.graph_objects as go

from sigma_lite.figures.style import fade
from sigma_lite.kernels.compile_offline import SHARED, Compiled
from sigma_lite.teach.style import BLUE, CLEAR, FAINT, GREEN, GREY, ORANGE

REGISTERS = 255  # of 32 bits, that one thread may have (CUDA C programming guide, "compute capabilities")
DEPTH = 64  # columns of an operand in one slice
RESERVED = 1024  # bytes of shared memory that each block costs besides its own
TENSOR_CORE = re.compile(r"\b(wgmma\.\w+|mma\.sync|ldmatrix|tcgen05\.(?:mma|ld|commit)|cp\.async\.c[ag])\b")
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", flags=re.M)
GROUPS = {  # opcodes of SASS by what they are for; whatever else there is finds addresses, masks or waits
    "multiply on a tensor core": ("HMMA", "HGMMA", "UTCHMMA"),
    "move numbers": ("LDGSTS", "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDTM", "STTM"),
    "SwiGLU and rounding": ("FMUL", "FADD", "FFMA", "MUFU", "FSETP", "FSEL", "F2FP"),
}
OTHER = "addresses, masks, waiting"


def flop_per_byte(rows: int, columns: int) -> float:
    """Of a tile of a 16-bit matmul: each step of k reads rows + columns numbers and does rows * columns multiply-adds."""
    return rows * columns / (rows + columns)


def tile_costs(rows: int, columns: int, slices: int, warps: int) -> dict[str, float]:
    """Shared memory in bytes for the slices of both 16-bit operands, and registers a thread for the fp32 sums alone."""
    return {"shared memory": slices * (rows + columns) * DEPTH * 2, "registers for sums": rows * columns / (32 * warps)}


def tile_budget(rows: int, columns: int, slices: int, warps: int, arch: str = "sm_80") -> go.Figure:
    """`tile_costs` as shares of what a block and a thread may have. Title: blocks whose slices a multiprocessor can hold."""
    costs, limits = tile_costs(rows, columns, slices, warps), (SHARED[arch], REGISTERS)
    shares = [cost / limit for cost, limit in zip(costs.values(), limits, strict=True)]
    colors = [fade(BLUE if share <= 1 else ORANGE, 0.6) for share in shares]
    figure = go.Figure()
    figure.add_bar(x=shares, y=list(costs), name="share of the limit", orientation="h", marker_color=colors)
    figure.add_vline(1, line={"color": GREY, "dash": "dot"})
    memory, sums = costs["shared memory"] / 1024, costs["registers for sums"]
    limit = f"{memory:.0f} of {SHARED[arch] / 1024:.0f} KB, and {sums:.0f} of {REGISTERS} registers a thread"
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    figure.add_annotation(text=limit, showarrow=False, **place)
    figure.update_xaxes(title=f"share of the limit on {arch}", tickformat=".0%", range=[0, 2])
    fit = (SHARED[arch] + RESERVED) // (int(costs["shared memory"]) + RESERVED)
    fits = f"room for {fit} block{'s' * (fit > 1)}" if shares[0] <= 1 else "no room in shared memory"
    fits = fits if shares[1] <= 1 else "more sums than registers"
    title = f"{rows} x {columns}: {flop_per_byte(rows, columns):.0f} FLOP per byte, {fits}"
    return figure.update_layout(title=title, height=310)


def instruction_groups(sass: str) -> dict[str, int]:
    """How many instructions of a program are there for what. They are counted where they stand, not how often they run."""
    opcodes, counts = Counter(OPCODE.findall(sass)), {}
    for group, names in GROUPS.items():
        counts[group] = sum(opcodes.pop(name, 0) for name in names)
    return counts | {OTHER: opcodes.total()}


def instructions_figure(made: Mapping[str, Compiled]) -> go.Figure:
    """`instruction_groups` of the same kernel on several GPUs, as stacked bars."""
    counts = {arch: instruction_groups(result.sass) for arch, result in made.items()}
    figure = go.Figure()
    for group, color in zip((*GROUPS, OTHER), (ORANGE, BLUE, GREEN, GREY), strict=True):
        shown = [counts[arch][group] for arch in made]
        figure.add_bar(x=shown, y=list(made), name=group, orientation="h", marker_color=fade(color, 0.6))
    figure.update_xaxes(title="instructions in the program")
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(barmode="stack", height=320)


def compiled_figure(arch: str, made: Compiled) -> go.Figure:
    """What the compiler made for one GPU: counts and resources, and below them the lines of PTX that matter."""
    counts = {name: n for name, n in made.instructions.items() if n}
    facts = {**counts, "registers a thread": made.registers, "spilled registers": made.spills}
    facts["shared memory (KB)"] = made.shared_bytes / 1024
    figure = go.Figure()
    look = {"fill": {"color": CLEAR}, "line": {"color": FAINT}, "align": "left"}
    values = [f"{value:g}" for value in facts.values()]
    figure.add_table(
        header={**look, "values": ["in PTX, occurrences", ""]},
        cells={**look, "values": [list(facts), values], "height": 26},
        columnwidth=[3, 1],
        domain={"y": [0.4, 1]},
    )
    mono = {**look, "font": {"family": "ui-monospace, monospace", "size": 10}}
    lines = [TENSOR_CORE.sub(r"<b>\1</b>", line) for line in ptx_lines(made.ptx)]
    figure.add_table(
        header={**look, "values": ["PTX around a tensor-core instruction"]},
        cells={**mono, "values": [lines], "height": 22},
        domain={"y": [0, 0.36]},
    )
    return figure.update_layout(title=f"{arch}: compiled, not run", height=580, margin={"l": 10, "r": 10, "t": 50, "b": 10})


def ptx_lines(ptx: str, width: int = 40) -> list[str]:
    """The first lines of PTX with a tensor-core instruction, a load for one or a copy, each kind at most twice.

    `width`: characters; 40 fit on a phone, with the shape of a `wgmma` among them.
    """
    found: dict[str, list[str]] = {}
    for line in ptx.splitlines():
        if match := TENSOR_CORE.search(line):
            text = " ".join(line.split())
            same = found.setdefault(match[1], [])
            if len(same) < 2:
                same.append(text if len(text) <= width else text[: width - 1] + "…")
    return [line for same in found.values() for line in same]
