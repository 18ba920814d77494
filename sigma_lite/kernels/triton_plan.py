"""Sort the slots by expert on the GPU, in four small kernels, and cut each expert's rows into tiles.

A counting sort: count per block of slots, turn counts into positions, place. It is stable, so tokens keep their order
inside an expert, and it never asks the host how many tokens an expert got. The host must still say how many programs to
launch: it launches as many as the worst routing needs, and the tiles that this routing does not need return at once.

torch's own sort is more launches than all of this; at toy sizes launches are the whole cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # slots that one program sorts among themselves, by comparing all pairs
CHUNK = 1024  # block counts that one program adds up at a time


class TilePlan(NamedTuple):
    """Slots are (token, choice) pairs flattened, N = T * K of them: slot n belongs to token n // K. All int32."""

    slot_N: Tensor  # the slot in each sorted row
    ends_E: Tensor  # expert e owns rows ends[e-1] .. ends[e] - 1
    tiles_2M: Tensor  # for each tile its expert (-1: no such tile) and its first row


def max_tiles(n_slots: int, n_experts: int, rows: int) -> int:
    """The most tiles of `rows` rows that any routing needs: each expert that is used leaves at most rows - 1 empty."""
    return (n_slots + min(n_slots, n_experts) * (rows - 1)) // rows


def tile_plan(launch, ids_TK: Tensor, n_experts: int, rows: int) -> TilePlan:
    """The plan for tiles of `rows` rows; `launch` as in kernels/triton_tiles.py."""
    N, E = ids_TK.numel(), n_experts
    blocks, n_tiles = triton.cdiv(N, BLOCK), max_tiles(N, E, rows)
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=ids_TK.device)  # noqa: E731
    counts_EP, totals_E, plan = new(E, blocks), new(E), TilePlan(new(N), new(E), new(2, n_tiles))
    sizes = {"E": E, "BE": triton.next_power_of_2(E), "BLOCK": BLOCK, "num_warps": 8}
    launch(count_block, blocks, ids_TK, counts_EP, N, blocks, **sizes)
    launch(scan_blocks, E, counts_EP, totals_E, blocks, CHUNK=CHUNK)
    launch(place, blocks, ids_TK, counts_EP, totals_E, plan.slot_N, N, blocks, **sizes)
    programs = max(1, triton.cdiv(n_tiles, BLOCK))  # one at least: backward asks for the ends even if there are no tokens
    launch(cut_tiles, programs, totals_E, plan.ends_E, plan.tiles_2M, n_tiles, ROWS=rows, **sizes)
    return plan


@triton.jit
def count_block(ids_ptr, counts_ptr, N, blocks, E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr):
    """counts[e, block]: how many of this block's slots chose expert e."""
    slot, expert = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BE)
    ids = tl.load(ids_ptr + slot, mask=slot < N, other=-1).to(tl.int32)
    counts = tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + expert * blocks + tl.program_id(0), counts, mask=expert < E)


@triton.jit
def scan_blocks(counts_ptr, totals_ptr, blocks, CHUNK: tl.constexpr):
    """counts[e, block] becomes the number of slots of e in earlier blocks; totals[e] is the number in all."""
    expert = tl.program_id(0)
    total = 0
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        ptrs = counts_ptr + expert * blocks + block
        counts = tl.load(ptrs, mask=block < blocks, other=0)
        tl.store(ptrs, total + tl.cumsum(counts, 0) - counts, mask=block < blocks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit
def place(ids_ptr, before_ptr, totals_ptr, slot_ptr, N, blocks, E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr):
    """slot_ptr[row] = slot, where row counts the slots of lower experts, of earlier blocks, and earlier in this block."""
    i, expert = tl.arange(0, BLOCK), tl.arange(0, BE)
    slot = tl.program_id(0) * BLOCK + i
    ids = tl.load(ids_ptr + slot, mask=slot < N, other=0).to(tl.int32)
    totals = tl.load(totals_ptr + expert, mask=expert < E, other=0)
    lower = tl.sum(tl.where(expert[None, :] < ids[:, None], totals[None, :], 0), 1)
    earlier = tl.sum(((ids[None, :] == ids[:, None]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    row = lower + tl.load(before_ptr + ids * blocks + tl.program_id(0)) + earlier
    tl.store(slot_ptr + row, slot, mask=slot < N)


@triton.jit
def cut_tiles(
    totals_ptr, ends_ptr, tiles_ptr, n_tiles, E: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Tile t belongs to the first expert whose tiles, together with those of all lower experts, are more than t."""
    expert = tl.arange(0, BE)
    totals = tl.load(totals_ptr + expert, mask=expert < E, other=0)
    tl.store(ends_ptr + expert, tl.cumsum(totals, 0), mask=expert < E)  # every program writes the same numbers
    tiles = (totals + ROWS - 1) // ROWS
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.sum((tl.cumsum(tiles, 0)[None, :] <= tile[:, None]).to(tl.int32), 1)
    lower = expert[None, :] < owner[:, None]
    nth = tile - tl.sum(tl.where(lower, tiles[None, :], 0), 1)
    first_row = tl.sum(tl.where(lower, totals[None, :], 0), 1) + nth * ROWS
    tl.store(tiles_ptr + tile, tl.where(owner < E, owner, -1), mask=tile < n_tiles)
    tl.store(tiles_ptr + n_tiles + tile, first_row, mask=tile < n_tiles)
