"""Figures, excerpts and exercises of chapter 12: what is drawn is what the formulas say, what is shown is in the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.kernels.compile_offline import Compiled
from sigma_lite.kernels.triton_check import INSTALLED
from sigma_lite.teach import interpreter, plots_kernels
from sigma_lite.teach.excerpt import excerpt


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


@pytest.mark.parametrize("routing", plots_kernels.ROUTINGS)
def test_every_routing_sends_all_tokens(routing):
    counts_E = plots_kernels.loads(routing, 96, 85)
    assert counts_E.sum() == 96 * 85 and (counts_E >= 0).all()
    assert (counts_E.max() == 85) == (routing == "balanced")


def test_zipf_is_zipf():
    counts_E = plots_kernels.loads("zipf", 8, 100_000)
    assert counts_E[0] / counts_E[7] == pytest.approx(8, rel=0.05)
    with pytest.raises(ConfigError, match="choose balanced, multinomial, zipf"):
        plots_kernels.loads("zip", 8, 1)


@pytest.mark.parametrize("rows, useful", [(16, 1.0), (64, 0.5 * 32 / 32), (128, 0.25)])
def test_useful_rows_of_equal_experts(rows, useful):
    assert plots_kernels.useful_rows(np.full(7, 32), rows) == useful


def test_an_idle_expert_has_no_tile():
    assert plots_kernels.useful_rows(np.array([0, 16]), 16) == 1.0
    assert "1 tiles of 16" in plots_kernels.tile_painter(16, "balanced", 16, n_experts=1).layout.title.text


def test_painted_rows_are_whole_tiles():
    figure = plots_kernels.tile_painter(32, "zipf", 85)
    token, empty = (np.array(trace(figure, name).y) for name in ("rows with a token", "rows multiplied for nothing"))
    assert token.sum() == 96 * 85 and ((token + empty) % 32 == 0).all() and (empty < 32).all()
    assert (
        f"{(token + empty).sum() // 32} tiles of 32 rows: {token.sum() / (token + empty).sum():.0%}"
        in figure.layout.title.text
    )


def test_the_recorded_benchmark_is_drawn_as_it_is():
    path = next((Path(__file__).parents[2] / "results" / "bench").glob("experts-*.json"))
    results = json.loads(path.read_text("utf-8"))["results"]
    figure = plots_kernels.recorded_experts(path)
    for name in ("transformers eager", "transformers grouped_mm"):
        drawn = trace(figure, name)
        assert list(drawn.y) == list(results) and list(drawn.x) == [case[name]["times_ours"] for case in results.values()]


def test_weights_and_flops_are_even_at_184_tokens_an_expert():
    """By hand: 6 T K D F / peak = 6 E D F / bandwidth, so T K / E = peak / bandwidth. Attention and head are left out."""
    net = ModelConfig.preset("sigma_moe_tiny")
    experts_only = net.ledger().active_experts / net.ledger().active
    tokens = 96 * plots_kernels.PEAK / plots_kernels.BANDWIDTH
    step = plots_kernels.walls(tokens, k=1)
    assert experts_only * step["FLOPs"] == pytest.approx(step["expert weights"])


def test_walls_against_the_numbers_worked_out_by_hand():
    one, eight = plots_kernels.walls(31_293), plots_kernels.walls(31_293, gpus=8, link=50e9)
    assert one["FLOPs"] == pytest.approx(one["AdamW"], rel=1e-3)
    assert one["expert parallelism"] == 0
    for name in ("FLOPs", "expert weights", "AdamW"):
        assert eight[name] == pytest.approx(one[name] / 8)
    sent = eight["expert parallelism"] * 50e9 / (31_293 / 8) / 56  # bytes a token and layer
    assert sent == 4 * 1536 * 2 * 7 / 8
    assert plots_kernels.walls(1, k=8, gpus=8)["expert parallelism"] == pytest.approx(
        8 * plots_kernels.walls(1, gpus=8)["expert parallelism"]
    )


def test_the_title_names_the_crossings_of_the_curves():
    figure = plots_kernels.walls_figure(1, 8, "NVLink 350 GB/s")
    assert "from 6,510 tokens on, more than AdamW from 31,293" in figure.layout.title.text
    flops, adam = (np.array(trace(figure, name).y) for name in ("FLOPs", "AdamW"))
    tokens = np.array(trace(figure, "FLOPs").x)
    assert tokens[flops < adam].max() < 31_293 < tokens[flops > adam].min()
    assert all(word in figure.layout.annotations[0].text for word in ("790 TFLOP/s", "4.3 TB/s", "NVLink", "not measured"))


def test_growth_is_told_in_the_title():
    figure = plots_kernels.growth({"naive": {8: 10.0, 192: 450.0}, "loop": {8: 10.0, 192: 65.0}})
    assert figure.layout.title.text == "8 to 192 experts: naive 45.0x, loop 6.5x"
    assert list(trace(figure, "naive").y) == [10.0, 450.0]


PTX = """
\tld.global.b32 \t%r1, [%rd1];
\tcp.async.cg.shared.global [ %r25 + 0 ], [ %rd29 + 0 ], 0x10, %r26;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r839,%r840,%r841,%r842,%r843,%r844}, %rd1, %rd2;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r0}, %rd1, %rd2;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;
"""


def test_the_compiler_table_has_counts_and_the_lines_that_matter():
    made = Compiled(PTX, "", 254, 3, 2048, {"wgmma": 3, "mma.sync": 0})
    facts, lines = plots_kernels.compiled_figure("sm_90", made).data
    assert dict(zip(*facts.cells.values, strict=True)) == {
        "wgmma": "3",
        "registers a thread": "254",
        "spilled registers": "3",
        "shared memory (KB)": "2",
    }
    (shown,) = lines.cells.values
    assert (
        len(shown) == 3 and shown[1].startswith("<b>wgmma.mma_async</b>.sync.aligned.m64n128k16") and shown[1].endswith("…")
    )
    assert all(len(line) <= 62 for line in plots_kernels.ptx_lines(PTX))


@pytest.mark.parametrize("file", ["kernels/cuda/primitives.cuh", "kernels/cuda/tile.cuh"])
def test_excerpts_are_whole_definitions_with_true_line_numbers(file):
    whole = (Path(plots_kernels.__file__).parents[1] / file).read_text("utf-8").splitlines()
    names = {"primitives": ("copy_async", "load_matrices", "multiply_add"), "tile": ("swizzle", "copy_tile", "tile_product")}
    for name in names[Path(file).stem]:
        part = excerpt(file, name)
        lines = part.text.splitlines()
        assert [line.strip() for line in whole[part.first - 1 : part.first - 1 + len(lines)]] == [s.strip() for s in lines]
        assert f"{name}(" in part.text and part.text.count("{") == part.text.count("}")
        assert lines[0].startswith("//") or name == "copy_tile"


def test_an_excerpt_can_be_folded_and_a_wrong_name_gets_the_nearest():
    folded = excerpt("teach/exercises/kernels_12.py", "gather_rows", fold="a solution")
    assert folded.text.startswith("@triton.jit\ndef gather_rows(") and "def matmul_tile" not in folded.text
    assert "tl.load" not in repr(folded) and ">a solution</summary>" in folded._repr_html_()
    with pytest.raises(ConfigError, match="did you mean 'swizzle'"):
        excerpt("kernels/cuda/tile.cuh", "swizle")


def test_without_triton_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(interpreter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed, .*`pip install triton`"):
        interpreter.start()


KERNELS = Path(__file__).with_name("kernels_of_readers.py")
SAID = {
    "scale_rows, empty": "nothing there yet: the function returns no result",
    "grouped_matmul, empty": "nothing there yet: the function returns no result",
    "scale_rows": "",
    "gather_rows": "",
    "matmul_tile": "",
    "grouped_matmul": "",
    "scale_rows, a block apart": "rows lie D numbers apart",
    "scale_rows, no mask": "3 numbers behind the end of the output were written: which mask is missing?",
    "scale_rows, misspelt": "InterpreterError: NameError",
    "gather_rows, scatter": "that is a scatter",
    "matmul_tile, not transposed": "w is [F, D], like the weight of nn.Linear",
    "grouped_matmul, into the next expert": "a tile runs past its expert's last row",
}


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """Verdicts on kernels in a process of their own, where the interpreter runs them."""
    environment = {name: value for name, value in os.environ.items() if name != interpreter.INTERPRET}
    done = subprocess.run([sys.executable, KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed: make test installs it where it exists")
@pytest.mark.parametrize("kernel", SAID)
def test_verdict_on_a_kernel(said, kernel):
    assert said[kernel] == "" if not SAID[kernel] else SAID[kernel] in said[kernel]
