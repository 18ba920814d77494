"""CUDA: which tile, which chunk, which bank; SwiGLU where the sums lie; shuffles; copies that run ahead; what fits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.cuda.resources import blocks_that_fit
from sigma_lite.teach import plots_cuda
from sigma_lite.teach.exercises.exercise import Exercise

Tile = tuple[int, int]  # expert and first row
NO_TILE = (-1, 0)


def place(block: int, tiles: list[Tile], ends: list[int], columns: int) -> tuple[int, int, int, int]:
    """(expert, first row, end of the expert's rows, first column) of a block; -1, 0, 0, 0 where there is no work."""
    across = -(-columns // 128)
    expert, first = tiles[block // across]
    return (-1, 0, 0, 0) if expert < 0 else (expert, first, ends[expert], block % across * 128)


def _counted(block: int, tiles: list[Tile], ends: list[int], columns: int) -> tuple[int, int, int, int]:
    number = 0
    for expert, first in tiles:
        for column in range(0, columns, 128):
            if number == block:
                if expert == -1:
                    return -1, 0, 0, 0
                return expert, first, ends[expert], column
            number += 1
    raise IndexError("no such block")


def _rows_fastest(block: int, tiles: list[Tile], ends: list[int], columns: int) -> tuple[int, int, int, int]:
    expert, first = tiles[block % len(tiles)]
    return (-1, 0, 0, 0) if expert < 0 else (expert, first, ends[expert], block // len(tiles) * 128)


def _across_rounded_down(block: int, tiles: list[Tile], ends: list[int], columns: int) -> tuple[int, int, int, int]:
    return place(block, tiles, ends, columns // 128 * 128)


def _last_of_python(block: int, tiles: list[Tile], ends: list[int], columns: int) -> tuple[int, int, int, int]:
    across = -(-columns // 128)
    expert, first = tiles[block // across]
    return expert, first, ends[expert], block % across * 128


def _places() -> list:
    tiles, ends = [(0, 0), (0, 64), (2, 70), NO_TILE], [70, 70, 110]  # nobody asks for expert 1
    return [(block, tiles, ends, columns) for block, columns in ((3, 200), (2, 128), (2, 300), (3, 128))]


def chunk_of(thread: int, round: int) -> tuple[int, int]:
    """(row, first column) of what a thread copies in this round: chunks of 8 numbers, 8 of them in a row of 64."""
    number = thread + 128 * round
    return number // 8, number % 8 * 8


def _rows_apart(thread: int, round: int) -> tuple[int, int]:
    row = thread // 8 + 16 * round
    return row, thread % 8 * 8


def _down_the_column(thread: int, round: int) -> tuple[int, int]:
    number = thread + 128 * round
    return number % 64, number // 64 * 8


def _chunk_for_column(thread: int, round: int) -> tuple[int, int]:
    row, column = chunk_of(thread, round)
    return row, column // 8


def _neighbouring_rounds(thread: int, round: int) -> tuple[int, int]:
    number = 4 * thread + round
    return number // 8, number % 8 * 8


def turns(word_L: Tensor) -> int:
    return plots_cuda.turns(word_L.tolist())


def _bank_by_bank(word_L: Tensor) -> int:
    most = 0
    for bank in range(32):
        different = {word for word in word_L.tolist() if word % 32 == bank}
        most = max(most, len(different))
    return most


def _no_broadcast(word_L: Tensor) -> int:
    return int(torch.bincount(word_L % 32).max())


def _mean_of_banks(word_L: Tensor) -> int:
    words = word_L.unique()
    return -(-len(words) // len((words % 32).unique()))


def _banks_in_blocks(word_L: Tensor) -> int:
    return int(torch.bincount(word_L.unique() // 32).max())


def _accesses() -> list:
    lane = torch.arange(32)
    uneven = torch.cat((lane[:28], torch.tensor([64, 32, 96, 32])))  # four words in bank 0, and one of them asked for twice
    return [(2 * lane,), (lane // 8,), (torch.tensor(plots_cuda.chunk_words(64, 2, xor=False)),), (uneven,)]


def source_rows(row_R: Tensor, units: int) -> Tensor:
    """Row of W13, [2F, D], for row r of the operand: 8 gate rows, their 8 up rows, the next 8 gate rows; -1 past the end."""
    unit_R = row_R // 16 * 8 + row_R % 8
    inside_R = torch.where(row_R % 16 < 8, unit_R, unit_R + units)
    return torch.where(unit_R < units, inside_R, -1)


def _one_after_another(row_R: Tensor, units: int) -> Tensor:
    rows = []
    for row in row_R.tolist():
        group, within = divmod(row, 16)
        unit = 8 * group + within % 8
        if unit >= units:
            rows.append(-1)
        elif within < 8:
            rows.append(unit)
        else:
            rows.append(units + unit)
    return torch.tensor(rows)


def _as_they_lie(row_R: Tensor, units: int) -> Tensor:
    return torch.where(row_R < 2 * units, row_R, -1)


def _alternating_singly(row_R: Tensor, units: int) -> Tensor:
    unit_R = row_R // 2
    return torch.where(unit_R < units, unit_R + row_R % 2 * units, -1)


def _without_end(row_R: Tensor, units: int) -> Tensor:
    unit_R = row_R // 16 * 8 + row_R % 8
    return torch.where(row_R % 16 < 8, unit_R, unit_R + units)


def _halves(sum_MN: Tensor) -> tuple[Tensor, Tensor]:
    M, N = sum_MN.shape
    gate, up = sum_MN.view(M, N // 16, 2, 8).unbind(2)
    return gate.reshape(M, N // 2), up.reshape(M, N // 2)


@torch.no_grad()
def epilogue(sum_MN: Tensor) -> Tensor:
    """h = silu(gate) * up in bf16 from fp32 sums, [M, N] -> [M, N/2]: 8 columns of gate and 8 of up take turns."""
    gate, up = _halves(sum_MN)
    return (F.silu(gate) * up).bfloat16()


@torch.no_grad()
def _block_by_block(sum_MN: Tensor) -> Tensor:
    blocks = []
    for column in range(0, sum_MN.shape[1], 16):
        gate, up = sum_MN[:, column : column + 8], sum_MN[:, column + 8 : column + 16]
        blocks.append(gate * torch.sigmoid(gate) * up)
    return torch.cat(blocks, dim=1).bfloat16()


@torch.no_grad()
def _rounded_first(sum_MN: Tensor) -> Tensor:
    gate, up = (half.bfloat16() for half in _halves(sum_MN))
    return F.silu(gate) * up


@torch.no_grad()
def _left_and_right(sum_MN: Tensor) -> Tensor:
    gate, up = sum_MN.chunk(2, dim=1)
    return (F.silu(gate) * up).bfloat16()


@torch.no_grad()
def _gate_for_up(sum_MN: Tensor) -> Tensor:
    gate, up = _halves(sum_MN)
    return (gate * F.silu(up)).bfloat16()


def quad_sum(value_L: Tensor) -> Tensor:
    """The sum of each four neighbouring lanes, in all four: two shuffles."""
    lane_L = torch.arange(32)
    value_L = value_L + value_L[lane_L ^ 1]
    return value_L + value_L[lane_L ^ 2]


def _lane_by_lane(value_L: Tensor) -> Tensor:
    pairs = torch.stack([value_L[lane] + value_L[lane ^ 1] for lane in range(32)])
    return torch.stack([pairs[lane] + pairs[lane ^ 2] for lane in range(32)])


def _old_values(value_L: Tensor) -> Tensor:
    lane_L = torch.arange(32)
    return value_L + value_L[lane_L ^ 1] + value_L[lane_L ^ 2]


def _whole_warp(value_L: Tensor) -> Tensor:
    return value_L.sum().expand(32)


def _same_partner_twice(value_L: Tensor) -> Tensor:
    lane_L = torch.arange(32)
    value_L = value_L + value_L[lane_L ^ 1]
    return value_L + value_L[lane_L ^ 1]


def _lanes() -> list:
    draw = torch.Generator().manual_seed(18)
    return [(torch.randn(32, generator=draw),), (torch.arange(32.0) ** 2,)]


def finish(slices: int, stages: int, latency: float, multiply: float) -> float:
    return plots_cuda.timeline(slices, stages, latency, multiply)[-1].ends


def _slice_after_slice(slices: int, stages: int, latency: float, multiply: float) -> float:
    begins, end = [], 0.0
    for s in range(slices):
        issued = 0.0
        if s >= stages - 1:
            issued = begins[s - (stages - 1)]
        begins.append(max(issued + latency, end))
        end = begins[s] + multiply
    return end


def _no_overlap(slices: int, stages: int, latency: float, multiply: float) -> float:
    return float(slices * (latency + multiply))


def _all_at_once(slices: int, stages: int, latency: float, multiply: float) -> float:
    return float(latency + slices * multiply)


def _one_place_too_many(slices: int, stages: int, latency: float, multiply: float) -> float:
    return finish(slices, stages + 1, latency, multiply)


def blocks(registers: int, shared: int, threads: int) -> int:
    return blocks_that_fit(registers, shared, threads)


def _scarcest(registers: int, shared: int, threads: int) -> int:
    rounded = (registers + 7) // 8 * 8  # a thread's registers come in eights
    by_registers = 65536 // (rounded * threads)
    by_shared = 228 * 1024 // (shared + 1024)
    by_threads = 2048 // threads
    return min(by_registers, by_shared, by_threads, 32)


def _registers_of_one_thread(registers: int, shared: int, threads: int) -> int:
    return min(65536 // ((registers + 7) // 8 * 8), 228 * 1024 // (shared + 1024), 2048 // threads, 32)


def _not_rounded(registers: int, shared: int, threads: int) -> int:
    return min(65536 // (registers * threads), 228 * 1024 // (shared + 1024), 2048 // threads, 32)


def _nothing_reserved(registers: int, shared: int, threads: int) -> int:
    return min(65536 // ((registers + 7) // 8 * 8 * threads), 228 * 1024 // shared, 2048 // threads, 32)


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="tile_place",
        chapter=18,
        asks="which tile is mine?",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=place,
        also=_counted,
        source="kernels/cuda/grouped_swiglu.cu#of",
        hint="First find how many blocks stand side by side: the columns divided by 128, rounded up. The block's number"
        " divided by that is its tile, and the remainder says which 128 columns. Look the tile up; if its expert is"
        " -1, stop.",
        inputs=_places,
        mistake=_last_of_python,
        says="expert -1 means that there is no work: return (-1, 0, 0, 0). `ends[-1]` is the last expert in Python, and"
        " somebody else's memory in C++",
        others=(
            (_across_rounded_down, "round up: 200 columns need two blocks side by side, the second of them partly empty"),
            (
                _rows_fastest,
                "columns run fastest: block 0 and block 1 have the same tile, as long as its row has columns left",
            ),
        ),
    ),
    Exercise(
        name="chunk_of_thread",
        chapter=18,
        asks="which chunk is mine?",
        minutes=5,
        difficulty=2,
        importance=5,
        solution=chunk_of,
        also=_rows_apart,
        source="kernels/cuda/tile.cuh#copy_tile",
        hint="Number the chunks row by row, eight to a row. In the first round thread t takes chunk t, in the next t + 128.",
        inputs=lambda: [(9, 0), (127, 1), (70, 3), (5, 2)],
        mistake=_down_the_column,
        says="together the threads copy the right chunks, but neighbouring threads lie a row apart: number them along"
        " the row",
        others=(
            (_chunk_for_column, "a chunk has 8 numbers: the first column is 8 times the chunk's place in its row"),
            (
                _neighbouring_rounds,
                "one thread takes four neighbouring chunks, so neighbouring threads read 64 bytes apart: in one"
                " round let neighbours take neighbours",
            ),
        ),
    ),
    Exercise(
        name="bank_turns",
        chapter=18,
        asks="turns at the banks",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=turns,
        also=_bank_by_bank,
        source="teach.plots_cuda.turns",
        hint="Word w lies in bank w % 32. Throw out words that are asked for twice, count what is left in each bank,"
        " and take"
        " the fullest.",
        inputs=_accesses,
        mistake=_no_broadcast,
        says="lanes that want the same word are served in the same turn: count different words",
        others=(
            (_banks_in_blocks, "neighbouring words lie in neighbouring banks: the bank is the remainder, word % 32"),
            (_mean_of_banks, "that is the mean over the banks in use: the access ends with the fullest bank"),
        ),
    ),
    Exercise(
        name="gate_beside_up",
        chapter=18,
        asks="gate beside up",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=source_rows,
        also=_one_after_another,
        source="kernels/cuda/tile.cuh#GateUpRows",
        hint="Sixteen rows of the operand hold eight units. The row's place among its sixteen says whether it is a"
        " gate (0 to"
        " 7) or an up row (8 to 15), and that place modulo 8 is the unit's place among its eight.",
        inputs=lambda: [(torch.arange(48), 20), (torch.tensor([40, 3, 8, 25, 63, 72]), 32)],
        mistake=_as_they_lie,
        says="that is W13 as it lies, all gates and then all ups: the gate and the up of a unit end up in different blocks",
        others=(
            (
                _alternating_singly,
                "they take turns one by one: a column block of the tensor core has 8 columns, so take eights",
            ),
            (_without_end, "F need not fill the tile: a unit from `units` on has no row, return -1 for it"),
        ),
        axes="R",
    ),
    Exercise(
        name="bf16_epilogue",
        chapter=18,
        asks="the epilogue",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=epilogue,
        also=_block_by_block,
        source="kernels/cuda/grouped_swiglu.cu#up",
        hint="Take the columns in blocks of eight: a block of gates, then the block of their ups. Apply SwiGLU in fp32, and"
        " round once, at the end.",
        inputs=lambda: [
            (3 * torch.randn(M, N, generator=torch.Generator().manual_seed(M)),) for M, N in ((16, 32), (5, 64))
        ],
        mistake=_left_and_right,
        says="the first half of the columns is not the gate: blocks of 8 gate columns and 8 up columns take turns",
        others=(
            (_rounded_first, "you round gate and up before SwiGLU: the sums are fp32 and cost nothing there, so round once"),
            (_gate_for_up, "silu goes around the gate, the first block of eight, not around up"),
        ),
        axes="MF",
    ),
    Exercise(
        name="quad_sum",
        chapter=18,
        asks="four lanes, one sum",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=quad_sum,
        also=_lane_by_lane,
        source="kernels/cuda/grouped_swiglu.cu#hidden_gradient",
        hint="After the first exchange each lane holds the sum of a pair. In the second exchange it adds the sum of"
        " the other"
        " pair, which lane ^ 2 holds.",
        inputs=_lanes,
        mistake=_old_values,
        says="in the second exchange you read the first values again, so one lane of four is missing: add the sums of"
        " the pairs",
        others=(
            (_whole_warp, "that is the sum of all 32 lanes: only lanes 4n to 4n + 3 belong to one row"),
            (_same_partner_twice, "you ask the same partner twice: lane ^ 1 in the first exchange, lane ^ 2 in the second"),
        ),
        axes="L",
    ),
    Exercise(
        name="pipeline_end",
        chapter=18,
        asks="copies that run ahead",
        minutes=15,
        difficulty=3,
        importance=4,
        solution=finish,
        also=_slice_after_slice,
        source="kernels/cuda/tile.cuh#tile_product",
        hint="Go through the slices and keep when each multiplication begins. A slice begins when its copy has landed"
        " and the"
        " slice before it has ended. Its copy is issued when the slice stages - 1 places earlier begins.",
        inputs=lambda: [(24, 3, 600.0, 128.0), (24, 2, 600.0, 512.0), (5, 4, 1000.0, 100.0), (2, 3, 600.0, 512.0)],
        mistake=_one_place_too_many,
        says="you have `stages` copies on their way while a slice is being multiplied, but its own place is not free"
        " yet: only"
        " stages - 1 can be",
        others=(
            (_no_overlap, "nothing overlaps there: the next copies are on their way while a slice is multiplied"),
            (_all_at_once, "there is no room for all slices at once: copy s waits until slice s - (stages - 1) begins"),
        ),
    ),
    Exercise(
        name="blocks_side_by_side",
        chapter=18,
        asks="blocks side by side",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=blocks,
        also=_scarcest,
        source="kernels.cuda.resources.blocks_that_fit",
        hint="Work out for registers, shared memory, threads and places how many blocks each allows, rounded down. The"
        " smallest"
        " of the four numbers counts.",
        inputs=lambda: [(170, 50_000, 128), (40, 3 * 1024, 128), (112, 37 * 1024, 256), (32, 76 * 1024, 256)],
        mistake=_registers_of_one_thread,
        says="registers never run out in yours: `registers` are those of one thread, and a block has `threads` threads",
        others=(
            (_not_rounded, "a thread's registers come in eights: round up before you multiply"),
            (_nothing_reserved, "each block costs 1 KB of shared memory besides its own"),
        ),
    ),
)
