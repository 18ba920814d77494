"""Tensor cores: tiles, banks, one program in torch, and four Triton kernels.

What a kernel must compute is said in torch, once more in plain torch by `also`; only the reader's kernel needs triton.
The solutions as kernels stand in kernels_17.py, and so do not have to be imported where there is no triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.plan import Plan, routing_plan
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import SECONDS, Exercise, Verdict
from sigma_lite.teach.plots_gpu import flop_per_byte

GUARD = 256  # numbers behind the end of every tensor that a kernel gets: NaN, and NaN they must stay
ROWS, BM, BN, BK = 4, 16, 16, 16
SUMS = Tolerance(1e-4, 1e-4)  # the order of a sum is the kernel's own


@dataclass(frozen=True)
class KernelExercise(Exercise):
    """The answer is a Triton kernel; `launch(kernel, *inputs)` runs it and returns its output, None if it stored nothing."""

    launch: Callable = field(kw_only=True)

    def judge(self, mine: object, cases: Sequence[tuple] | None = None, seconds: float = SECONDS) -> Verdict:
        return super().judge(self.of_tensors(mine), cases, seconds)

    def of_tensors(self, mine: object) -> object:
        """`mine` as a function of the exercise's inputs: a kernel is launched, all else is left as it is."""
        if hasattr(mine, "__getitem__") and hasattr(mine, "fn"):
            return lambda *inputs: self.launch(mine, *(tensor.detach() for tensor in inputs))
        return mine

    def solved(self) -> str:
        from sigma_lite.teach.excerpt import excerpt  # it shows exercises, and so comes after them

        return excerpt("teach/exercises/kernels_17.py", self.name).text


def _run(kernel, programs: int, shape: tuple[int, ...], *tensors: Tensor, **numbers: int) -> Tensor | None:
    """The kernel's output [shape], which it gets as the last of its pointers.

    Raises: IndexError if everything is stored, and something behind the end of the output as well.
    """
    memory = torch.full((math.prod(shape) + GUARD,), math.nan)
    out = memory[:-GUARD].view(shape)
    kernel[(programs,)](*(_guarded(t) for t in tensors), out, **numbers)
    beyond = int((~memory[-GUARD:].isnan()).sum())
    if beyond and not out.isnan().any():
        raise IndexError(
            f"right so far, but {beyond} numbers behind the end of the output were written: which mask is missing?"
        )
    return None if out.isnan().all() and not beyond else out


def _guarded(tensor: Tensor) -> Tensor:
    end = torch.full((GUARD,), math.nan) if tensor.is_floating_point() else torch.zeros(GUARD, dtype=tensor.dtype)
    return torch.cat((tensor.flatten(), end))[:-GUARD].view(tensor.shape)


def _block(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(13))


def tile_intensity(rows: int, columns: int) -> float:
    return flop_per_byte(rows, columns)


def _counted(rows: int, columns: int) -> float:
    flops = rows * columns * 2  # each result: one multiplication, one addition
    read = (rows + columns) * 2  # one column of tokens and one row of weights, two bytes a number
    return flops / read


def _reads_for_each(rows: int, columns: int) -> float:
    return 2 * rows * columns / (2 * 2 * rows * columns)


def _without_bytes(rows: int, columns: int) -> float:
    return 2 * flop_per_byte(rows, columns)


def bank(row_R: Tensor, piece: int) -> Tensor:
    """Bank in which the piece of each row begins, where piece p of row r lies at place p XOR r."""
    return (row_R * 128 + (piece ^ row_R) * 16) // 4 % 32


def _bank_of_each(row_R: Tensor, piece: int) -> Tensor:
    banks = []
    for row in row_R.tolist():
        byte = 128 * row + 16 * (piece ^ row)
        word = byte // 4
        banks.append(word % 32)
    return torch.tensor(banks)


def _as_they_come(row_R: Tensor, piece: int) -> Tensor:
    return (row_R * 128 + piece * 16) // 4 % 32


def _words_of_one_byte(row_R: Tensor, piece: int) -> Tensor:
    return (row_R * 128 + (piece ^ row_R) * 16) % 32


def program(x_TD: Tensor, token_N: Tensor, w_FD: Tensor, first: int, end: int) -> Tensor:
    """[up to BM, F]: rows first .. first + BM - 1 of the sorted rows, those before `end` only, times w transposed."""
    row = first + torch.arange(BM)
    return x_TD[token_N[row[row < end]]] @ w_FD.T


def _slice_after_slice(x_TD: Tensor, token_N: Tensor, w_FD: Tensor, first: int, end: int) -> Tensor:
    token = token_N[first : min(first + 16, end)]
    acc = torch.zeros(len(token), len(w_FD))
    for k in range(0, x_TD.shape[1], 16):  # as a GPU does it: slices of both operands
        acc = acc + x_TD[token, k : k + 16] @ w_FD[:, k : k + 16].T
    return acc


def _past_the_end(x_TD: Tensor, token_N: Tensor, w_FD: Tensor, first: int, end: int) -> Tensor:
    return program(x_TD, token_N, w_FD, first, first + BM)


def _not_gathered(x_TD: Tensor, token_N: Tensor, w_FD: Tensor, first: int, end: int) -> Tensor:
    return program(x_TD, torch.arange(len(token_N)), w_FD, first, end)


def _tiles() -> list:
    token_N = torch.randperm(40, generator=torch.Generator().manual_seed(13))
    return [(_normal(40, 32), token_N, _normal(8, 32), first, end) for first, end in ((3, 10), (16, 40))]


@torch.no_grad()
def scale_rows(x_TD: Tensor, scale_T: Tensor) -> Tensor:
    return x_TD * scale_T[:, None]


def _each_row_scaled(x_TD: Tensor, scale_T: Tensor) -> Tensor:
    return torch.stack([x_D * scale for x_D, scale in zip(x_TD, scale_T, strict=True)])


def _launch_scale(kernel, x_TD: Tensor, scale_T: Tensor) -> Tensor | None:
    T, D = x_TD.shape
    return _run(kernel, T, (T, D), x_TD, scale_T, D=D, BLOCK=_block(D))


@torch.no_grad()
def _rows_a_block_apart(x_TD: Tensor, scale_T: Tensor) -> Tensor:
    (T, D), out = x_TD.shape, torch.full_like(x_TD, math.nan)
    for row in range(T):
        reached = slice(row * _block(D), row * _block(D) + D)
        out.view(-1)[reached] = x_TD.flatten()[reached] * scale_T[row]
    return out


@torch.no_grad()
def gather_rows(x_TD: Tensor, token_N: Tensor) -> Tensor:
    return x_TD[token_N]


def _each_row_fetched(x_TD: Tensor, token_N: Tensor) -> Tensor:
    return torch.stack([x_TD[token] for token in token_N.tolist()])


def _launch_gather(kernel, x_TD: Tensor, token_N: Tensor) -> Tensor | None:
    N, D = len(token_N), x_TD.shape[1]
    return _run(kernel, math.ceil(N / ROWS), (N, D), x_TD, token_N, N=N, D=D, ROWS=ROWS, BLOCK=_block(D))


@torch.no_grad()
def _scatter(x_TD: Tensor, token_N: Tensor) -> Tensor:
    return torch.full(x_TD.shape, math.nan).index_copy(0, token_N, x_TD[: len(token_N)])[: len(token_N)]


@torch.no_grad()
def matmul_tile(x_MD: Tensor, w_FD: Tensor) -> Tensor:
    return x_MD @ w_FD.T


def _number_by_number(x_MD: Tensor, w_FD: Tensor) -> Tensor:
    return torch.stack([torch.stack([(x_D * w_D).sum() for w_D in w_FD]) for x_D in x_MD])


def _launch_tile(kernel, x_MD: Tensor, w_FD: Tensor) -> Tensor | None:
    return _run(kernel, 1, (BM, BN), x_MD, w_FD, D=x_MD.shape[1], F=BN, BM=BM, BN=BN, BK=BK)


@torch.no_grad()
def _not_transposed(x_MD: Tensor, w_FD: Tensor) -> Tensor:
    return x_MD @ w_FD.reshape(w_FD.T.shape)


@torch.no_grad()
def grouped_matmul(x_TD: Tensor, ids_TK: Tensor, w_EFD: Tensor) -> Tensor:
    plan = routing_plan(ids_TK, len(w_EFD))
    return F.grouped_mm(x_TD[plan.token_N], w_EFD.transpose(1, 2), offs=plan.ends_E)


def _each_token_alone(x_TD: Tensor, ids_TK: Tensor, w_EFD: Tensor) -> Tensor:
    ids_T = ids_TK[:, 0]
    rows_TF = torch.einsum("tfd,td->tf", w_EFD[ids_T], x_TD)
    return rows_TF[ids_T.argsort(stable=True)]  # sorted at the end


def tile_map(plan: Plan) -> tuple[Tensor, Tensor]:
    """Expert and first row of each tile of BM rows, the last expert first: a GPU promises no order either."""
    ends = plan.ends_E.tolist()
    tiles = [(e, row) for e, end in enumerate(ends) for row in range(ends[e - 1] if e else 0, end, BM)]
    return tuple(torch.tensor(tiles[::-1]).T.contiguous())


def _launch_grouped(kernel, x_TD: Tensor, ids_TK: Tensor, w_EFD: Tensor) -> Tensor | None:
    plan, (_, width, D) = routing_plan(ids_TK, len(w_EFD)), w_EFD.shape
    expert_M, first_M = tile_map(plan)
    where = plan.token_N, expert_M, first_M, plan.ends_E
    return _run(kernel, len(expert_M), (ids_TK.numel(), width), x_TD, *where, w_EFD, D=D, F=width, BM=BM, BN=BN, BK=BK)


@torch.no_grad()
def _into_the_next_expert(x_TD: Tensor, ids_TK: Tensor, w_EFD: Tensor) -> Tensor:
    plan = routing_plan(ids_TK, len(w_EFD))
    x_ND, out = x_TD[plan.token_N], torch.full((ids_TK.numel(), w_EFD.shape[1]), math.nan)
    for expert, first in zip(*tile_map(plan), strict=True):
        out[first : first + BM] = x_ND[first : first + BM] @ w_EFD[expert].T
    return out


def _routed() -> list:
    ids = torch.tensor([3, 0, 0, 3, 1, 0, 3, 3, 1, 0, 0, 1, 0, 0, 3, 0, 1, 0, 0, 0, 0, 1, 3])[:, None]  # nobody asks for 2
    return [(_normal(len(ids), 32), ids, _normal(4, BN, 32)), (_normal(len(ids), 16), 3 - ids, _normal(4, BN, 16))]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="tile_intensity",
        chapter=17,
        asks="why tiles",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=tile_intensity,
        also=_counted,
        source="teach.plots_gpu.flop_per_byte",
        hint="In one step every one of BM numbers meets every one of BN numbers: that many multiplications and additions."
        " But only BM + BN numbers are read.",
        inputs=lambda: [(16, 16), (128, 256), (1, 64)],
        mistake=_without_bytes,
        says="that is FLOP for each number: a number has two bytes",
        others=(
            (_reads_for_each, "you read two numbers for each product: a tile reads each number once, and uses it again"),
        ),
    ),
    Exercise(
        name="swizzled_bank",
        chapter=17,
        asks="eight rows, eight banks",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=bank,
        also=_bank_of_each,
        source="teach.exercises.chapter_17.bank",
        hint="A row begins at byte 128 r, and its piece at place q begins 16 q bytes later. Four bytes are a word. Put"
        " q = piece ^ row.",
        inputs=lambda: [(torch.arange(8), 2), (torch.arange(8), 5)],
        mistake=_as_they_come,
        says="all in one bank: that is without the XOR. Piece p of row r lies at place p ^ r",
        others=((_words_of_one_byte, "a bank holds words of four bytes: divide the byte's number by four first"),),
        axes="R",
    ),
    Exercise(
        name="one_program",
        chapter=17,
        asks="one program, in torch",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=program,
        also=_slice_after_slice,
        source="teach.exercises.chapter_17.program",
        hint="Number the tile's rows from `first` on, and keep those before `end`. Look up their tokens, take the rows of x,"
        " and multiply by w transposed.",
        inputs=_tiles,
        mistake=_past_the_end,
        says="your tile runs past `end`, into the rows of the next expert: keep the rows before `end` only",
        others=((_not_gathered, "you take rows of x where they lie: sorted row r is token token_N[r]"),),
        axes="MF",
        tolerance=SUMS,
    ),
    KernelExercise(
        name="scale_rows",
        chapter=17,
        asks="scale rows",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=scale_rows,
        also=_each_row_scaled,
        source="teach.exercises.chapter_17.scale_rows",
        hint="The program's number is its row. Load the row with a mask, load one number of scale, store the product with"
        " the same mask.",
        inputs=lambda: [(_normal(3, 5), _normal(3)), (_normal(4, 8), _normal(4))],
        mistake=_rows_a_block_apart,
        says="rows lie D numbers apart in memory, not BLOCK: a block is the next power of two, and the mask cuts it off",
        axes="TD",
        launch=_launch_scale,
    ),
    KernelExercise(
        name="gather_rows",
        chapter=17,
        asks="gather rows",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=gather_rows,
        also=_each_row_fetched,
        source="teach.exercises.chapter_17.gather_rows",
        hint="A program has ROWS rows, so n is a block of numbers too. Load their tokens, with a mask. Rows go down and"
        " columns across: `[:, None]` and `[None, :]` make a table of addresses out of two lists.",
        inputs=lambda: [
            (_normal(6, 5), torch.tensor([2, 0, 5, 1, 4, 3])),
            (_normal(8, 8), torch.tensor([6, 1, 4, 0, 7])),
        ],
        mistake=_scatter,
        says="that is a scatter: `token` belongs into the address that is loaded from, `n` into the one that is stored to",
        axes="ND",
        launch=_launch_gather,
    ),
    KernelExercise(
        name="matmul_tile",
        chapter=17,
        asks="one tile of a matmul",
        minutes=15,
        difficulty=3,
        importance=5,
        solution=matmul_tile,
        also=_number_by_number,
        source="teach.exercises.chapter_17.matmul_tile",
        hint="Begin with zeros. For each slice of BK columns load a [BM, BK] block of x and a [BK, BN] block of w"
        " transposed, and add their product. w transposed is only another way to write addresses.",
        inputs=lambda: [(_normal(BM, D), _normal(BN, D) - 1) for D in (48, 32)],
        mistake=_not_transposed,
        says="w is [F, D], like the weight of nn.Linear: the step from one k to the next is 1, and from one n to the next D",
        axes="MF",
        tolerance=SUMS,
        launch=_launch_tile,
    ),
    KernelExercise(
        name="grouped_matmul",
        chapter=17,
        asks="gather, and multiply by groups",
        minutes=25,
        difficulty=4,
        importance=5,
        solution=grouped_matmul,
        also=_each_token_alone,
        source="teach.exercises.chapter_17.grouped_matmul",
        hint="Steps 5 and 6 in one kernel, with the mask of step 3. First load which expert, which first row and which end"
        " this program has. An expert's matrix begins expert * F * D numbers after the first one.",
        inputs=_routed,
        mistake=_into_the_next_expert,
        says="a tile runs past its expert's last row into the rows of the next. Run in ascending order the next one would"
        " overwrite that, but programs run in any order: mask with the expert's end",
        axes="NF",
        tolerance=SUMS,
        launch=_launch_grouped,
    ),
)
