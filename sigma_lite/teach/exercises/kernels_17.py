"""Solutions of chapter 17's kernels. Imports triton, so nobody imports this file but tests; the chapter shows its text."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x_ptr, scale_ptr, out_ptr, D, BLOCK: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + row * D + d, x * tl.load(scale_ptr + row), mask=d < D)


@triton.jit
def gather_rows(x_ptr, token_ptr, out_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    token = tl.load(token_ptr + n, mask=n < N, other=0)
    inside = (n < N)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + token[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + n[:, None] * D + d[None, :], x, mask=inside)


@triton.jit
def matmul_tile(x_ptr, w_ptr, out_ptr, D, F, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, D, BK):
        x = tl.load(x_ptr + m[:, None] * D + (done + k)[None, :])
        w = tl.load(w_ptr + n[None, :] * D + (done + k)[:, None])  # [BK, BN]: a column of the product is a row of w
        acc = tl.dot(x, w, acc)
    tl.store(out_ptr + m[:, None] * F + n[None, :], acc)


@triton.jit
def grouped_matmul(
    x_ptr, token_ptr, expert_ptr, first_ptr, ends_ptr, w_ptr, out_ptr,
    D, F, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert = tl.load(expert_ptr + tl.program_id(0))
    row = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, BM)
    live = row < tl.load(ends_ptr + expert)
    token = tl.load(token_ptr + row, mask=live, other=0)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, D, BK):
        x = tl.load(x_ptr + token[:, None] * D + (done + k)[None, :])
        w = tl.load(w_ptr + expert * F * D + n[None, :] * D + (done + k)[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(out_ptr + row[:, None] * F + n[None, :], acc, mask=live[:, None])
