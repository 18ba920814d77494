"""How large a tile each Triton kernel works on, and how a kernel is launched.

Chosen by rule, not yet by measurement. What pulls which way: a tile of BM x BN reads BM + BN vectors for BM x BN results,
so large tiles ask less of L2; but rows that an expert does not have are multiplied for nothing, and a small tile leaves
room for a second program on the same multiprocessor, which computes while the first one stores.
"""

from __future__ import annotations

import functools

import torch

# BM rows, BN columns, BK deep, warps, and at most so many BK-deep slices in flight. The key is BM, but for the weight
# gradient, whose sum runs over an expert's tokens, it is whether that sum is long.
SMALL = {16: (16, 64, 64, 4, 4), 32: (32, 64, 64, 4, 4), 64: (64, 64, 64, 4, 4)}
WIDER = {16: (16, 128, 64, 4, 4), 32: (32, 128, 64, 4, 4), 64: (64, 128, 64, 4, 4)}
TILES = {
    "swiglu_forward": SMALL | {128: (128, 128, 64, 8, 4)},  # two accumulators: as much as 256 columns
    "project": WIDER | {128: (128, 256, 64, 8, 4)},
    "swiglu_backward": SMALL | {128: (128, 128, 64, 8, 5)},  # its end holds z too: no registers for a wider tile
    "weight_gradient": {"short": (128, 128, 64, 8, 3), "long": (128, 256, 64, 8, 4)},
}
# fp32 is multiplied without tensor cores, operand by operand from registers: those set the size.
TILES_FP32 = {name: {BM: (BM, 32, 32, 4, 2) for BM in (16, 32, 64)} for name in TILES}
TILES_FP32["weight_gradient"] = dict.fromkeys(("short", "long"), (64, 64, 32, 8, 2))
LONG = 1024  # tokens per expert
# Shared memory from which tensor cores read their operands there (Hopper, Blackwell). Before, and on consumer cards, they
# come from registers, and the largest tiles would leave none.
DATACENTER = 200_000


def rows_per_tile(n_slots: int, n_experts: int, dtype: torch.dtype) -> int:
    """BM: the smallest tile that holds a usual expert at once, so that its weights travel to one multiprocessor only.

    Usual: the mean plus two standard deviations of a multinomial, m + 2 sqrt(m). It is 16, 32, 64 at m = 9.8, 22.5, 49.9.
    """
    mean = n_slots // n_experts
    rows = 16 if mean < 10 else 32 if mean < 23 else 64 if mean < 50 else 128
    return min(rows, 64) if dtype == torch.float32 else rows


def tile(kernel: str, key, sizes: tuple[int, int, int], dtype: torch.dtype, shared: int) -> dict[str, int]:
    """BM, BN, BK, num_warps and num_stages for a matmul of `sizes` = rows, columns, depth (the products in each sum).

    Blocks shrink to small sizes. `shared`: bytes of shared memory a program may have; the slices in flight must fit.
    """
    *blocks, warps, stages = (TILES_FP32 if dtype == torch.float32 else TILES)[kernel][key]
    accumulators = 2 if kernel == "swiglu_forward" else 1
    if shared < DATACENTER and blocks[0] * blocks[1] * accumulators > 128 * 128:
        blocks[1] //= 2
    BM, BN, BK = (max(16, min(block, _power_of_2(size))) for block, size in zip(blocks, sizes, strict=True))
    slice_bytes = (BM + BN * accumulators) * BK * dtype.itemsize
    stages = max(1, min(stages, shared // slice_bytes))
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": stages}


def _power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


class Launcher:
    """Runs kernels on one device. Pass another callable to see what would be launched: compile_offline.py."""

    def __init__(self, device: torch.device):
        self.shared = _shared_memory(device)

    def __call__(self, kernel, programs: int, *args, **constants) -> None:
        if programs:  # no tokens, no tiles: a grid of 0 is an error
            kernel[(programs,)](*args, **constants)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 20  # the interpreter has no such limit
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
