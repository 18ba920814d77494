"""Tensor cores: four Triton kernels. What each must compute is said in torch; only the reader's kernel needs triton.

The solutions as kernels stand in kernels_17.py, and so do not have to be imported where there is no triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.plan import Plan, routing_plan
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise

GUARD = 256  # numbers behind the end of every tensor that a kernel gets: NaN, and NaN they must stay
ROWS, BM, BN, BK = 4, 16, 16, 16
SUMS = Tolerance(1e-4, 1e-4)  # the order of a sum is the kernel's own


@dataclass(frozen=True)
class KernelExercise(Exercise):
    """The answer is a Triton kernel; `launch(kernel, *inputs)` runs it and returns its output, None if it stored nothing."""

    launch: Callable = field(kw_only=True)

    def verdict(self, mine: Callable) -> str:
        if not hasattr(mine, "__getitem__"):  # a plain function of the inputs
            return super().verdict(mine)
        return super().verdict(lambda *inputs: self.launch(mine, *(t.detach() for t in inputs)))


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


@torch.no_grad()
def scale_rows(x_TD: Tensor, scale_T: Tensor) -> Tensor:
    return x_TD * scale_T[:, None]


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


def _launch_gather(kernel, x_TD: Tensor, token_N: Tensor) -> Tensor | None:
    N, D = len(token_N), x_TD.shape[1]
    return _run(kernel, math.ceil(N / ROWS), (N, D), x_TD, token_N, N=N, D=D, ROWS=ROWS, BLOCK=_block(D))


@torch.no_grad()
def _scatter(x_TD: Tensor, token_N: Tensor) -> Tensor:
    return torch.full(x_TD.shape, math.nan).index_copy(0, token_N, x_TD[: len(token_N)])[: len(token_N)]


@torch.no_grad()
def matmul_tile(x_MD: Tensor, w_FD: Tensor) -> Tensor:
    return x_MD @ w_FD.T


def _launch_tile(kernel, x_MD: Tensor, w_FD: Tensor) -> Tensor | None:
    return _run(kernel, 1, (BM, BN), x_MD, w_FD, D=x_MD.shape[1], F=BN, BM=BM, BN=BN, BK=BK)


@torch.no_grad()
def _not_transposed(x_MD: Tensor, w_FD: Tensor) -> Tensor:
    return x_MD @ w_FD.reshape(w_FD.T.shape)


@torch.no_grad()
def grouped_matmul(x_TD: Tensor, ids_TK: Tensor, w_EFD: Tensor) -> Tensor:
    plan = routing_plan(ids_TK, len(w_EFD))
    return F.grouped_mm(x_TD[plan.token_N], w_EFD.transpose(1, 2), offs=plan.ends_E)


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
    KernelExercise(
        name="scale_rows",
        chapter=17,
        solution=scale_rows,
        inputs=lambda: [(_normal(3, 5), _normal(3)), (_normal(4, 8), _normal(4))],
        mistake=_rows_a_block_apart,
        says="rows lie D numbers apart in memory, not BLOCK: a block is the next power of two, and the mask cuts it off",
        axes="TD",
        launch=_launch_scale,
    ),
    KernelExercise(
        name="gather_rows",
        chapter=17,
        solution=gather_rows,
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
        solution=matmul_tile,
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
        solution=grouped_matmul,
        inputs=_routed,
        mistake=_into_the_next_expert,
        says="a tile runs past its expert's last row into the rows of the next. Run in ascending order the next one would"
        " overwrite that, but programs run in any order: mask with the expert's end",
        axes="NF",
        tolerance=SUMS,
        launch=_launch_grouped,
    ),
)
