"""The matmuls of an expert layer as Triton kernels: five functions do the forward and the backward pass.

    forward    swiglu_forward       z = x[token] W13^T,  h = silu(z_gate) * z_up
               project              y = gate * h W2^T, written to the slot that asked for it
    backward   swiglu_backward      dh = dy[token] W2,  and from it dz, d gate and gate * h
               weight_gradient      dW2 = dy[token]^T (gate * h),  and dW13 = dz^T x[token]
               project              dx = dz W13, written to the slot
    K > 1      sum_choices          out[token] = sum of its K slots

Rows are the slots sorted by expert (kernels/triton_plan.py). No sorted copy of x is ever made: a tile follows `slot_ptr`
to the tokens it needs while it multiplies, and scatters results back the same way. A slot is written exactly once, so
nothing is added atomically and equal inputs give equal bits; with K = 1 the slots are the output.

Programs of one tile of rows are neighbours in launch order and so are the tiles of one expert: what they share, x and
the weights, is then read from memory once and found in L2 by the others.

Addresses: an expert's offset in the weights, or a row's in the activations, can pass 2^31 elements, hence 64 bits; what
is added inside an expert or a row fits in 32. D and F are compile-time constants: a width that its block divides needs
no mask, and that is what makes 16-byte copies and their pipelining possible. Only the bound of the loops is passed again
at run time, as `depth`: where ptxas knows it, it unrolls the whole loop and spills hundreds of registers.
"""

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as if the bit patterns were integers (triton issue 11584), and cuts fp32 off where a
# GPU rounds to nearest: what it runs needs help in both places.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _multiply(a, b, acc):
    """acc + a b in fp32; "ieee" forbids the tensor cores to round fp32 operands to TF32's 10 bits."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(ptr, live, ALWAYS: tl.constexpr):
    """What is not live reads as 0. With ALWAYS the mask is dropped at compile time."""
    return tl.load(ptr) if ALWAYS else tl.load(ptr, mask=live, other=0.0)


@triton.jit
def _store(ptr, values, live):
    """Round to the type of `ptr`, to nearest even."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(ptr, values.to(dtype), mask=live)


@triton.jit
def _inside(live, column, width: tl.constexpr, BN: tl.constexpr):
    """Which results of a tile exist. Asking about columns that all do would cost a register each."""
    return live[:, None] if width % BN == 0 else live[:, None] & (column < width)[None, :]


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right columns. What follows a matmul needs half the registers if it takes them in turn."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _tile(tiles_ptr, ends_ptr, tile, n_tiles, BM: tl.constexpr):
    """The expert of a tile of rows (-1: this routing has no such tile), its first row, and which rows are its own."""
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + n_tiles + tile)
    return expert, first.to(tl.int64), tl.arange(0, BM) < tl.load(ends_ptr + expert, mask=expert >= 0, other=0) - first


@triton.jit
def swiglu_forward(
    x_ptr, slot_ptr, tiles_ptr, ends_ptr, w13_ptr, z_ptr, h_ptr, n_tiles, K, depth,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z [N, 2F] and h [N, F]. Two accumulators, so that a tile ends with the gate and the up half of the same columns."""
    n, tile = tl.program_id(0) % tl.cdiv(F, BN), tl.program_id(0) // tl.cdiv(F, BN)
    expert, first, live = _tile(tiles_ptr, ends_ptr, tile, n_tiles, BM)
    if expert < 0:
        return
    i = tl.arange(0, BM)
    # The rows past the end read some token too, any one: what they compute is not stored.
    token = tl.load(slot_ptr + first + i, mask=live, other=0) // K
    f, d = n * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * D + d[None, :]
    gate_ptrs = w13_ptr + expert.to(tl.int64) * (2 * F * D) + (f[None, :] * D + d[:, None])
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for done in range(0, depth, BK):
        inside = d < depth - done
        columns = inside[:, None] & (f < F)[None, :]
        x = _load(x_ptrs, inside[None, :], D % BK == 0)
        gate = _multiply(x, _load(gate_ptrs, columns, (D % BK == 0) and (F % BN == 0)), gate)
        up = _multiply(x, _load(gate_ptrs + F * D, columns, (D % BK == 0) and (F % BN == 0)), up)
        x_ptrs += BK
        gate_ptrs += BK
    z_ptr, h_ptr = z_ptr + first * (2 * F), h_ptr + first * F
    gate_left, gate_right = _halves(gate, BM, BN)
    up_left, up_right = _halves(up, BM, BN)
    _swiglu_half(gate_left, up_left, z_ptr, h_ptr, live, n * BN, F, BM, BN // 2)
    _swiglu_half(gate_right, up_right, z_ptr, h_ptr, live, n * BN + BN // 2, F, BM, BN // 2)


@triton.jit
def _swiglu_half(gate, up, z_ptr, h_ptr, live, first_column, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Stores z and h for the columns of gate and up."""
    f = first_column + tl.arange(0, BN)
    stored, i, f = _inside(live, f, F, 2 * BN), tl.arange(0, BM)[:, None], f[None, :]
    _store(z_ptr + (i * (2 * F) + f), gate, stored)
    _store(z_ptr + (i * (2 * F) + f + F), up, stored)
    _store(h_ptr + (i * F + f), gate * tl.sigmoid(gate) * up, stored)


@triton.jit
def project(
    a_ptr, slot_ptr, tiles_ptr, ends_ptr, w_ptr, gates_ptr, out_ptr, n_tiles, depth,
    WIDTH: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[slot of row] = a [N, WIDTH] times one expert's matrix, to OUT columns.

    GATED is the last step of forward: w2 is [OUT, WIDTH], and each row is weighted by its slot's gate before the only
    rounding. Otherwise it is dx: w13 is [WIDTH, OUT], and `gates_ptr` is not read.
    """
    n, tile = tl.program_id(0) % tl.cdiv(OUT, BN), tl.program_id(0) // tl.cdiv(OUT, BN)
    expert, first, live = _tile(tiles_ptr, ends_ptr, tile, n_tiles, BM)
    if expert < 0:
        return
    i, c, k = tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_ptrs = a_ptr + first * WIDTH + (tl.where(live, i, 0)[:, None] * WIDTH + k[None, :])
    w_ptrs = w_ptr + expert.to(tl.int64) * (OUT * WIDTH)
    w_ptrs += (c[None, :] * WIDTH + k[:, None]) if GATED else (k[:, None] * OUT + c[None, :])
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, depth, BK):
        inside = k < depth - done
        a = _load(a_ptrs, inside[None, :], WIDTH % BK == 0)
        w = _load(w_ptrs, inside[:, None] & (c < OUT)[None, :], (WIDTH % BK == 0) and (OUT % BN == 0))
        acc = _multiply(a, w, acc)
        a_ptrs += BK
        w_ptrs += BK if GATED else BK * OUT
    slot = tl.load(slot_ptr + first + i, mask=live, other=0).to(tl.int64)
    if GATED:
        acc *= tl.load(gates_ptr + slot).to(tl.float32)[:, None]
    _store(out_ptr + slot[:, None] * OUT + c[None, :], acc, _inside(live, c, OUT, BN))


@triton.jit
def swiglu_backward(
    dy_ptr, slot_ptr, tiles_ptr, ends_ptr, w2_ptr, z_ptr, gates_ptr, dz_ptr, h_ptr, dgates_ptr, n_tiles, N, K, depth,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz [N, 2F], gate * h [N, F], and each column tile's share of d gate, [column tiles, N].

    y = gate * w2 h, and so d gate = <dy, w2 h> = <w2^T dy, h> = <dh, h>: y was never kept. h is rebuilt from z, which
    costs a sigmoid where it would have cost memory. One program sees BN columns of h only; adding the shares up
    afterwards, in order, is what atomics could not promise.
    """
    n, tile = tl.program_id(0) % tl.cdiv(F, BN), tl.program_id(0) // tl.cdiv(F, BN)
    expert, first, live = _tile(tiles_ptr, ends_ptr, tile, n_tiles, BM)
    if expert < 0:
        return
    i = tl.arange(0, BM)
    slot = tl.load(slot_ptr + first + i, mask=live, other=0)
    f, d = n * BN + tl.arange(0, BN), tl.arange(0, BK)
    dy_ptrs = dy_ptr + (slot // K).to(tl.int64)[:, None] * D + d[None, :]
    w2_ptrs = w2_ptr + expert.to(tl.int64) * (D * F) + (d[:, None] * F + f[None, :])
    dh = tl.zeros((BM, BN), tl.float32)
    for done in range(0, depth, BK):
        inside = d < depth - done
        dy = _load(dy_ptrs, inside[None, :], D % BK == 0)
        w2 = _load(w2_ptrs, inside[:, None] & (f < F)[None, :], (D % BK == 0) and (F % BN == 0))
        dh = _multiply(dy, w2, dh)
        dy_ptrs += BK
        w2_ptrs += BK * F
    weight = tl.load(gates_ptr + slot).to(tl.float32)
    z_ptr, dz_ptr, h_ptr = z_ptr + first * (2 * F), dz_ptr + first * (2 * F), h_ptr + first * F
    left, right = _halves(dh, BM, BN)
    share = _swiglu_backward_half(left, z_ptr, dz_ptr, h_ptr, weight, live, n * BN, F, BM, BN // 2)
    share += _swiglu_backward_half(right, z_ptr, dz_ptr, h_ptr, weight, live, n * BN + BN // 2, F, BM, BN // 2)
    _store(dgates_ptr + n.to(tl.int64) * N + slot, share, live)


@triton.jit
def _swiglu_backward_half(
    dh, z_ptr, dz_ptr, h_ptr, weight, live, first_column, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Stores dz and gate * h for the columns of dh; returns their share of d gate, [BM]."""
    f = first_column + tl.arange(0, BN)
    stored, i, f = _inside(live, f, F, 2 * BN), tl.arange(0, BM)[:, None], f[None, :]
    gate = tl.load(z_ptr + (i * (2 * F) + f), mask=stored, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + (i * (2 * F) + f + F), mask=stored, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    h = gate * sigmoid * up
    share = tl.sum(dh * h, 1)
    dh *= weight[:, None]
    _store(h_ptr + (i * F + f), h * weight[:, None], stored)
    # silu(g) = g s with s = sigmoid(g), and so silu'(g) = s + g s (1 - s).
    _store(dz_ptr + (i * (2 * F) + f), dh * up * sigmoid * (1 + gate * (1 - sigmoid)), stored)
    _store(dz_ptr + (i * (2 * F) + f + F), dh * gate * sigmoid, stored)
    return share


@triton.jit
def weight_gradient(
    a_ptr, b_ptr, slot_ptr, ends_ptr, dw_ptr, K,
    M: tl.constexpr, N: tl.constexpr, GATHER_A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw[e] [M, N] = sum over the rows of expert e of a outer b. One of a and b has a row per token, the other per row.

    The length of this sum is the number of tokens the expert got, known only on the device. An expert without tokens
    goes through the loop zero times and writes zeros: memory that nobody writes would hold whatever was there before.
    """
    columns, tiles = tl.cdiv(N, BN), tl.cdiv(N, BN) * tl.cdiv(M, BM)
    n, m = tl.program_id(0) % columns, tl.program_id(0) % tiles // columns
    expert = tl.program_id(0) // tiles
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    i, j = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    row = first + tl.arange(0, BK)
    token = tl.load(slot_ptr + row, mask=row < end, other=0) // K
    for _ in range(first, end, BK):
        live = row < end
        # Both sides are masked: 0 times what lies behind the end would be NaN if an infinity lay there.
        a_row, b_row = (token, row) if GATHER_A else (row, token)
        a_ptrs = a_ptr + a_row.to(tl.int64)[:, None] * M + i[None, :]
        b_ptrs = b_ptr + b_row.to(tl.int64)[:, None] * N + j[None, :]
        a = tl.load(a_ptrs, mask=_inside(live, i, M, BM), other=0.0)
        b = tl.load(b_ptrs, mask=_inside(live, j, N, BN), other=0.0)
        row += BK
        token = tl.load(slot_ptr + row, mask=row < end, other=0) // K  # one step ahead: the next addresses wait for it
        acc = _multiply(tl.trans(a), b, acc)
    dw_ptrs = dw_ptr + expert.to(tl.int64) * (M * N) + (i[:, None] * N + j[None, :])
    _store(dw_ptrs, acc, _inside(i < M, j, N, BN))


@triton.jit
def sum_choices(slots_ptr, out_ptr, T, K, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """out [T, D] = slots [T, K, D] summed over K, in fp32 and in the order of K."""
    t = tl.program_id(0) // tl.cdiv(D, BD) * BT + tl.arange(0, BT)
    d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
    live = (t < T)[:, None] & (d < D)[None, :]
    ptrs = slots_ptr + t.to(tl.int64)[:, None] * (K * D) + d[None, :]
    total = tl.zeros((BT, BD), tl.float32)
    for k in range(K):
        total += tl.load(ptrs + k * D, mask=live, other=0.0).to(tl.float32)
    _store(out_ptr + t.to(tl.int64)[:, None] * D + d[None, :], total, live)
