"""Figures of the chapter on CUDA, and the counting behind them: sectors, turns at the banks, copies that run ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import plotly.graph_objects as go

from sigma_lite.figures.style import fade
from sigma_lite.teach.style import BLUE, GREEN, ORANGE

SECTOR = 32  # bytes: the least that memory and caches hand out (CUDA C++ best practices guide)
BANKS, WORD = 32, 4  # of shared memory; bytes of a word
CHUNK, SLICE = 8, 64  # numbers that ldmatrix reads of a row, and columns of a slice; two bytes each
PRODUCTS = 2048  # multiply-adds a cycle of one multiprocessor at best: 989 TFLOP/s / 132 / 1.83 GHz / 2, H100 and H200
SLICES = 1536 // SLICE  # D of Sigma-MoE-Tiny
PALE_GREEN, PALE_ORANGE = "#a6dacb", "#eeb48b"  # opaque, so that black can be read on them on a dark page too
RIGHT = 1e-2  # of the error of a broken kernel; rounding to bf16 makes 2e-3


def sectors(addresses: Iterable[int]) -> int:
    """Sectors that one load of a warp moves, from the address of each lane's first byte; no lane reaches across two."""
    return len({int(address) // SECTOR for address in addresses})


def turns(words: Iterable[int]) -> int:
    """Turns of shared memory for one access: a bank serves one word at a time, but all lanes that want the same word."""
    wanted = [0] * BANKS
    for word in {int(word) for word in words}:
        wanted[word % BANKS] += 1
    return max(wanted)


def chunk_words(numbers: int, chunk: int, xor: bool) -> list[int]:
    """The 32 words that one ldmatrix reads: eight rows of `numbers` two-byte numbers, of each the 16 bytes of `chunk`."""
    places = [chunk ^ row if xor else chunk for row in range(8)]
    starts = [(2 * numbers * row + 2 * CHUNK * place) // WORD for row, place in enumerate(places)]
    return [start + i for start in starts for i in range(4)]


def bank_grid(numbers: int, place: str, chunk: int) -> go.Figure:
    """Which bank each of eight rows is read from. `place`: "p" or "p XOR row"; XOR would leave a row that is not whole."""
    xor, whole = place != "p", numbers % SLICE == 0
    words = chunk_words(numbers, chunk, xor and whole)
    rows, wanted = [], [{word for word in words if word % BANKS == bank} for bank in range(BANKS)]
    for row in range(8):
        mine = {word % BANKS for word in words[4 * row : 4 * row + 4]}
        rows.append([len(wanted[bank]) if bank in mine else None for bank in range(BANKS)])
    scale = [[0, fade(GREEN, 0.6)], [1 / 7, fade(ORANGE, 0.35)], [1, fade(ORANGE, 0.9)]]
    figure = go.Figure(go.Heatmap(z=rows, zmin=1, zmax=8, colorscale=scale, showscale=False, xgap=1, ygap=2))
    figure.update_traces(hovertemplate="row %{y}, bank %{x}: %{z} words<extra></extra>")
    figure.update_xaxes(title="bank", range=[-0.5, BANKS - 0.5], dtick=4, showgrid=False, zeroline=False)
    figure.update_yaxes(title="row", range=[7.5, -0.5], dtick=1, showgrid=False, zeroline=False)
    spare = numbers % SLICE / (numbers - numbers % SLICE)
    note = "" if whole or not xor else "; XOR needs rows of 64 or 128, so it is left out"
    count = turns(words)
    title = f"{count} turn{'s' * (count > 1)} for one ldmatrix, {spare:.1%} more shared memory{note}"
    return figure.update_layout(title=title, height=330)


class Slice(NamedTuple):
    """When the copy of a slice is issued and lands, and when its multiplication begins and ends, in cycles."""

    issued: float
    landed: float
    begins: float
    ends: float


def timeline(slices: int, stages: int, latency: float, multiply: float) -> list[Slice]:
    """A block that holds `stages` slices, 2 or more. While one is multiplied the others are free for copies.

    The copy of slice s is issued when slice s - (stages - 1) begins. A copy takes `latency`, however many are under way.
    """
    done: list[Slice] = []
    for s in range(slices):
        issued = done[s - (stages - 1)].begins if s >= stages - 1 else 0.0
        begins = max(issued + latency, done[-1].ends if done else 0.0)
        done.append(Slice(issued, issued + latency, begins, begins + multiply))
    return done


def multiply_cycles(rows: int, columns: int = 128) -> float:
    """Least cycles for one slice of a tile."""
    return rows * columns * SLICE / PRODUCTS


def pipeline(stages: int, rows: int, latency: int) -> go.Figure:
    """`timeline` of a tile's slices as bars; the title says how much of the time a multiplication runs."""
    multiply = multiply_cycles(rows)
    done = timeline(SLICES, stages, latency, multiply)
    figure, number = go.Figure(), list(range(SLICES))
    bars = {"copy on its way": ([s.issued for s in done], [s.landed - s.issued for s in done], BLUE, 0.35)}
    bars["multiplied"] = ([s.begins for s in done], [s.ends - s.begins for s in done], ORANGE, 0.8)
    for name, (base, length, color, opacity) in bars.items():
        figure.add_bar(y=number, x=length, base=base, name=name, orientation="h", marker_color=fade(color, opacity))
    figure.update_xaxes(title="cycles", rangemode="tozero")
    figure.update_yaxes(title="slice", autorange="reversed", dtick=4)
    busy = SLICES * multiply / done[-1].ends
    title = f"{rows} rows, {multiply:.0f} cycles a slice: multiplying {busy:.0%} of {done[-1].ends:,.0f} cycles"
    return figure.update_layout(title=title, barmode="overlay", bargap=0.1, height=420)


def broken_kernels(trials: Mapping[str, Mapping[str, float]], runs: Iterable[str], title: str) -> go.Figure:
    """Error of each kernel in each run, as a table of colours; `trials` as cuda_lab.trials returns them."""
    runs, names = list(runs), [name for name in trials if name != "nothing"]
    errors = [[trials[name][run] for run in runs] for name in names]
    wrong = [[float(not error <= RIGHT) for error in row] for row in errors]
    text = [["NaN" if math.isnan(error) else f"{error:.1g}" for error in row] for row in errors]
    scale, shown = [[0, PALE_GREEN], [1, PALE_ORANGE]], [run.replace(", ", "<br>") for run in runs]
    figure = go.Figure(go.Heatmap(z=wrong, x=shown, y=names, text=text, texttemplate="%{text}", zmin=0, zmax=1))
    figure.update_traces(xgap=2, ygap=2, colorscale=scale, showscale=False, textfont_color="black")
    figure.update_traces(hovertemplate="without %{y}, %{x}: %{text}<extra></extra>")
    figure.update_xaxes(side="bottom", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_layout(title=title, height=380)
