"""Kernels as readers write them, right, wrong and empty, and what chapter 17 says; test_plots_of_gpu.py judges."""

import json

from sigma_lite.teach import exercises, interpreter

triton, tl = interpreter.start()

from sigma_lite.teach.exercises import kernels_17  # noqa: E402


@triton.jit
def empty_scale(x_ptr, scale_ptr, out_ptr, D, BLOCK: tl.constexpr): ...


@triton.jit
def empty_grouped(
    x_ptr, token_ptr, expert_ptr, first_ptr, ends_ptr, w_ptr, out_ptr,
    D, F, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    ...


@triton.jit
def block_apart(x_ptr, scale_ptr, out_ptr, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * BLOCK + d, mask=d < D)
    tl.store(out_ptr + row * BLOCK + d, x * tl.load(scale_ptr + row), mask=d < D)


@triton.jit
def no_mask(x_ptr, scale_ptr, out_ptr, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + d)
    tl.store(out_ptr + row * D + d, tl.where(d < D, x, 1.0) * tl.load(scale_ptr + row))


@triton.jit
def misspelt(x_ptr, scale_ptr, out_ptr, D, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + rwo, row)  # noqa: F821


@triton.jit
def scatter(x_ptr, token_ptr, out_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    token = tl.load(token_ptr + n, mask=n < N, other=0)
    inside = (n < N)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + n[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + token[:, None] * D + d[None, :], x, mask=inside)


@triton.jit
def not_transposed(x_ptr, w_ptr, out_ptr, D, F, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, D, BK):
        x = tl.load(x_ptr + m[:, None] * D + (done + k)[None, :])
        acc = tl.dot(x, tl.load(w_ptr + (done + k)[:, None] * F + n[None, :]), acc)
    tl.store(out_ptr + m[:, None] * F + n[None, :], acc)


@triton.jit
def into_the_next_expert(
    x_ptr, token_ptr, expert_ptr, first_ptr, ends_ptr, w_ptr, out_ptr,
    D, F, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert = tl.load(expert_ptr + tl.program_id(0))
    row = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, BM)
    live = row < 23  # N, where the end of the expert should stand
    token = tl.load(token_ptr + row, mask=live, other=0)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, D, BK):
        x = tl.load(x_ptr + token[:, None] * D + (done + k)[None, :])
        acc = tl.dot(x, tl.load(w_ptr + expert * F * D + n[None, :] * D + (done + k)[:, None]), acc)
    tl.store(out_ptr + row[:, None] * F + n[None, :], acc, mask=live[:, None])


ANSWERS = {name: getattr(kernels_17, name) for name in ("scale_rows", "gather_rows", "matmul_tile", "grouped_matmul")}
ANSWERS |= {
    "scale_rows, empty": empty_scale,
    "grouped_matmul, empty": empty_grouped,
    "scale_rows, a block apart": block_apart,
    "scale_rows, no mask": no_mask,
    "scale_rows, misspelt": misspelt,
    "gather_rows, scatter": scatter,
    "matmul_tile, not transposed": not_transposed,
    "grouped_matmul, into the next expert": into_the_next_expert,
}

print(json.dumps({what: exercises.find(what.split(",")[0]).verdict(kernel) for what, kernel in ANSWERS.items()}))
