"""Figures, excerpts and exercises of chapter 17: what is drawn is what the compiler said, what is shown is in the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sigma_lite.config import ConfigError
from sigma_lite.kernels.compile_offline import SHARED, Compiled
from sigma_lite.kernels.triton_check import INSTALLED
from sigma_lite.teach import interpreter, plots_gpu
from sigma_lite.teach.excerpt import excerpt


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_what_a_tile_takes_by_hand():
    """128 x 64, three slices, four warps: 3 * 192 * 64 numbers of two bytes; 8192 sums among 128 threads."""
    assert plots_gpu.tile_costs(128, 64, 3, 4) == {"shared memory": 73728, "registers for sums": 64.0}
    assert plots_gpu.flop_per_byte(128, 128) == 64 and plots_gpu.flop_per_byte(1, 1) == 0.5


@pytest.mark.parametrize(
    "tile, says",
    [
        ((128, 64, 3, 4), "43 FLOP per byte, room for 2 blocks"),
        ((128, 128, 5, 8), "64 FLOP per byte, room for 1 block"),
        ((256, 128, 4, 8), "no room in shared memory"),
        ((256, 128, 3, 4), "more sums than registers"),
        ((256, 128, 3, 8), "85 FLOP per byte, room for 1 block"),
    ],
)
def test_the_budget_says_what_fits(tile, says):
    figure = plots_gpu.tile_budget(*tile, arch="sm_80")
    assert figure.layout.title.text.endswith(says)
    assert f"{tile[2] * (tile[0] + tile[1]) / 8:.0f} of 163 KB" in figure.layout.annotations[0].text
    costs = plots_gpu.tile_costs(*tile)
    assert list(trace(figure, "share of the limit").x) == [costs["shared memory"] / SHARED["sm_80"],
                                                           costs["registers for sums"] / 255]  # fmt: skip


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR6][R4.64] ;   /* 0x0 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;   /* 0x0 */
        /*0030*/              @UP1 UIADD3 UR4, UR4, 0x2, URZ ;   /* 0x0 */
        /*0040*/                   FMUL R1, R2, R3 ;   /* 0x0 */
        /*10050*/             @P0 FMUL R1, R2, R3 ;   /* 0x0 */
"""


def test_every_instruction_is_in_one_group():
    groups = plots_gpu.instruction_groups(SASS)
    assert groups == {
        "multiply on a tensor core": 1,
        "move numbers": 1,
        "SwiGLU and rounding": 2,
        "addresses, masks, waiting": 2,
    }
    figure = plots_gpu.instructions_figure({"sm_90": Compiled("", SASS, 1, 0, 0, {})})
    assert {bar.name: list(bar.x) for bar in figure.data} == {name: [n] for name, n in groups.items()}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed: make test installs it where it exists")
def test_products_in_the_program_are_those_of_its_tile():
    """One turn of the loop: 128 x 128 results, two accumulators, 64 deep; each wgmma is 64 x 128 x 16, in two groups."""
    from sigma_lite.kernels.compile_offline import compiled

    groups = plots_gpu.instruction_groups(compiled("swiglu_forward", "sm_90").sass)
    assert groups["multiply on a tensor core"] * 2 * 64 * 128 * 16 == 2 * 128 * 128 * 64


PTX = """
\tld.global.b32 \t%r1, [%rd1];
\tcp.async.cg.shared.global [ %r25 + 0 ], [ %rd29 + 0 ], 0x10, %r26;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r839,%r840,%r841,%r842,%r843,%r844}, %rd1, %rd2;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r0}, %rd1, %rd2;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;
"""


def test_the_compiler_table_has_counts_and_the_lines_that_matter():
    made = Compiled(PTX, "", 254, 3, 2048, {"wgmma": 3, "mma.sync": 0})
    facts, lines = plots_gpu.compiled_figure("sm_90", made).data
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
    assert max(len(line) for line in plots_gpu.ptx_lines(PTX)) == 40, "a phone of 390 px shows no more"


@pytest.mark.parametrize("file", ["kernels/cuda/primitives.cuh", "kernels/cuda/tile.cuh"])
def test_excerpts_are_whole_definitions_with_true_line_numbers(file):
    whole = (Path(plots_gpu.__file__).parents[1] / file).read_text("utf-8").splitlines()
    names = {"primitives": ("copy_async", "load_matrices", "multiply_add"), "tile": ("swizzle", "copy_tile", "tile_product")}
    for name in names[Path(file).stem]:
        part = excerpt(file, name)
        lines = part.text.splitlines()
        assert [line.strip() for line in whole[part.first - 1 : part.first - 1 + len(lines)]] == [s.strip() for s in lines]
        assert f"{name}(" in part.text and part.text.count("{") == part.text.count("}")
        assert lines[0].startswith("//") or name == "copy_tile"


def test_an_excerpt_can_be_folded_and_a_wrong_name_gets_the_nearest():
    folded = excerpt("teach/exercises/kernels_17.py", "gather_rows", fold="a solution")
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
