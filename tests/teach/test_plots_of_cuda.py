"""What chapter 18 counts and draws, by hand; and C++ in the last fold of a step."""

from __future__ import annotations

import math

import pytest
import torch

from sigma_lite.kernels.cuda import binding
from sigma_lite.teach import exercises, plots_cuda
from sigma_lite.teach.excerpt import excerpt
from sigma_lite.teach.source import Steps


def test_sectors_and_turns_by_hand():
    assert plots_cuda.sectors(range(0, 512, 16)) == 16 and plots_cuda.sectors(range(0, 32 * 3072, 3072)) == 32
    assert plots_cuda.sectors([0] * 32) == 1 and plots_cuda.sectors([31, 32]) == 2
    assert plots_cuda.turns(range(32)) == 1 and plots_cuda.turns([5] * 32) == 1
    assert plots_cuda.turns(range(0, 64, 2)) == 2 and plots_cuda.turns(range(0, 1024, 32)) == 32


@pytest.mark.parametrize(
    "numbers, place, turns, spare",
    [
        (64, "p", 8, "0.0%"),
        (64, "p XOR row", 1, "0.0%"),
        (72, "p", 1, "12.5%"),
        (80, "p", 2, "25.0%"),
        (96, "p", 4, "50.0%"),
        (136, "p", 1, "6.2%"),
    ],
)
def test_the_grid_of_banks(numbers, place, turns, spare):
    """80 numbers are 40 words: rows begin in banks 0, 8, 16, 24, 0, ... so two share each."""
    figure = plots_cuda.bank_grid(numbers, place, 3)
    assert (
        figure.layout.title.text.startswith(f"{turns} turn") and f", {spare} more shared memory" in figure.layout.title.text
    )
    cells = [value for row in figure.data[0].z for value in row if value is not None]
    assert len(cells) == 32 and max(cells) == turns
    assert "XOR needs rows of 64 or 128" in plots_cuda.bank_grid(72, "p XOR row", 0).layout.title.text


def test_the_layout_is_the_one_of_the_kernel():
    """chunk_words with XOR, against tile.cuh's formula: row * COLUMNS + ((chunk ^ (row & 7)) << 3)."""
    for chunk in range(8):
        at = [(row * 64 + ((chunk ^ (row & 7)) << 3)) * 2 // 4 for row in range(8)]
        assert plots_cuda.chunk_words(64, chunk, xor=True)[::4] == at


def test_a_timeline_by_hand():
    """Three slices in room, latency 10, 4 cycles each: slice 2 is issued when slice 0 begins, at 10, and lands at 20."""
    assert plots_cuda.timeline(4, 3, 10, 4) == [(0, 10, 10, 14), (0, 10, 14, 18), (10, 20, 20, 24), (14, 24, 24, 28)]
    hidden = plots_cuda.timeline(24, 3, 600, 512)
    assert hidden[-1].ends == 600 + 24 * 512, "only the first copy is waited for"
    figure = plots_cuda.pipeline(3, 128, 600)
    assert figure.layout.title.text == "128 rows, 512 cycles a slice: multiplying 95% of 12,888 cycles"
    copies, products = figure.data
    assert len(copies.y) == len(products.y) == 24 and list(products.x) == [512] * 24


def test_the_table_of_broken_kernels_is_right_where_the_error_is_small():
    trials = {"nothing": {"a": 2e-3, "b": 2e-3}, "wait": {"a": 2e-3, "b": math.nan}, "row mask": {"a": 0.5, "b": 1e-2}}
    heat = plots_cuda.broken_kernels(trials, ["a", "b"], "title").data[0]
    assert [list(row) for row in heat.z] == [[0, 1], [1, 0]] and list(heat.y) == ["wait", "row mask"]
    assert [list(row) for row in heat.text] == [["0.002", "NaN"], ["0.5", "0.01"]]


def test_structs_and_kernels_with_launch_bounds_are_found():
    struct = excerpt("kernels/cuda/tile.cuh", "GateUpRows").text
    assert struct.startswith("// The rows of W13") and struct.endswith("};")
    assert "W::BLOCKS_N; j += 4" in excerpt("kernels/cuda/grouped_swiglu.cu", "up").text


@pytest.mark.parametrize("name", [e.name for e in exercises.ALL.values() if "#" in e.source])
def test_the_last_fold_may_be_cpp(name):
    asked = exercises.find(name)
    html = Steps(asked)._repr_html_()
    assert f"the package's: sigma_lite/{asked.source.split('#')[0]}" in html


def test_the_steps_are_what_the_kernel_does(monkeypatch):
    """The reader's epilogue, on a tile put together by source_rows, gives the kernel's h."""
    h_of = exercises.find("bf16_epilogue").solution
    rows_of = exercises.find("gate_beside_up").solution
    torch.manual_seed(0)
    T, D, F = 20, 64, 24
    x_TD, w13, w2 = torch.randn(T, D).bfloat16(), torch.randn(1, 2 * F, D).bfloat16() / 8, torch.eye(F).repeat(3, 1)[:D]
    row_R = rows_of(torch.arange(64), F)
    b_RD = torch.where(row_R[:, None] >= 0, w13[0].float()[row_R], 0.0)
    h_TF = h_of(x_TD.float() @ b_RD.T)[:, :F]
    monkeypatch.setenv(binding.EMULATE, "1")
    from sigma_lite.kernels import grouped_swiglu

    ids, gates = torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1)
    y_TD = grouped_swiglu(x_TD, ids, gates, w13, w2[None].bfloat16(), backend="cuda")  # w2 copies h
    torch.testing.assert_close(y_TD[:, :F], h_TF, rtol=1e-2, atol=1e-3)
