// y_t = sum over chosen experts e of  gate_te * W2_e ( silu(Wg_e x_t) * Wu_e x_t ), forward and backward, on tensor cores.
//
// Six matrix products, four kernels. Reading order: Layer (what goes in and out), up (the first product, step by step), then
// to_slots, hidden_gradient, weight_gradient; tile.cuh holds the product itself, plan.cuh the sort by expert, launch.cuh the
// host's side.
//
//   forward   z = x[token] W13_e^T     h = silu(z_gate) z_up     y[slot] = gate * h W2_e^T
//   backward  dh = dy[token] W2_e      dz, gate * h, <dh, h>     dW2_e = dy[token]^T (gate * h)
//             dx[slot] = dz W13_e      dW13_e = dz^T x[token]
//
// Every element is written once, by one thread, in a fixed order of additions: no atomics, the same bits every time.
#include "plan.cuh"
#include "tile.cuh"

constexpr int TILE_N = 128;

// While one block waits, or writes its results, another multiplies. The compiler is told how many must fit, in registers:
// 2 blocks x 128 threads x 255 registers, or 3 x 128 x 168 for the lower tiles, fill an SM's 65536.
template <int TILE_M>
constexpr int BLOCKS_PER_SM = TILE_M == 128 ? 2 : 3;

struct Layer {
    int device, dtype;  // dtype 0 bfloat16, 1 float16
    int tokens, k, experts, width, units;
    int tile;  // rows of a tile: 32, 64 or 128
    int chunk, chunks, max_tiles, gate_parts;
    const int64_t* ids;                // [T, K]
    int *counts, *slot, *token, *ends, *tiles;  // see plan.cuh; N = T K sorted rows
    const void *x, *w13, *w2;          // [T, D], [E, 2F, D], [E, D, F]
    const float* gates;                // [T, K]
    void *z, *h, *y;                   // [N, 2F] or null if no backward will follow, [N, F], [N, D] in slot order
    const void* dy;                    // [T, D]
    void *dz, *gated_h;                // [N, 2F], [N, F]
    float* dgates;                     // [N, gate_parts] in slot order: parts of sums
    void *dx, *dw13, *dw2;             // [N, D] in slot order, [E, 2F, D], [E, D, F]
    void* stream;
};

// Which rows and columns a block computes. All tiles of an expert follow each other, columns fastest: blocks that run at the
// same time share its rows and its weights in the L2 cache, so that both are read from memory once.
struct Place {
    int expert, first, last, column;

    template <class Grid>
    DEVICE static Place of(const Grid& layer, int columns) {
        const int across = (columns + TILE_N - 1) / TILE_N, tile = blockIdx.x / across;
        const int expert = layer.tiles[2 * tile];
        if (expert < 0) return {-1, 0, 0, 0};
        return {expert, layer.tiles[2 * tile + 1], layer.ends[expert], int(blockIdx.x) % across * TILE_N};
    }
};

// Write 16 neighbouring columns of a row. A lane holds two words, columns 2t, 2t+1 of each 8-column block (t = lane % 4).
// Neighbours swap one word first: each then has 4 columns side by side, and the warp fills whole 32-byte sectors.
template <class T>
DEVICE void store_16(T* row, int column, int columns, uint32_t left, uint32_t right) {
    const int t = threadIdx.x & 3, odd = t & 1;
    const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
    column += 8 * odd + 2 * (t & 2);
    if (row == nullptr || column >= columns) return;
    *reinterpret_cast<Words*>(row + column) = odd ? Words{other, right} : Words{left, other};
}

// Row `row` of a matrix, or nullptr where the tile reaches past the rows of its expert: store_16 leaves those alone.
template <class T>
DEVICE T* row_if(bool inside, void* matrix, int64_t row, int columns) {
    if (!inside) return nullptr;
    return static_cast<T*>(matrix) + row * columns;
}

// The approximate exponential and division are off by some 1e-6, a thousandth of what rounding to bf16 costs.
DEVICE float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

// z = x[token] W13^T and h = silu(gate) * up.
template <class T, int TILE_M>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<TILE_M>) up(Layer l) {
    using W = Split<TILE_M, TILE_N>;
    const Place at = Place::of(l, 2 * l.units);
    if (at.expert < 0) return;

    const T* const x = static_cast<const T*>(l.x);
    const T* const w13 = static_cast<const T*>(l.w13) + int64_t(at.expert) * 2 * l.units * l.width;
    Operand<T, Rows<true>, true, TILE_M> a{x, l.width, 0, {at.first, at.last, l.token}};
    Operand<T, GateUpRows, true, TILE_N> b{w13, l.width, at.column, {l.units}};
    float sum[W::BLOCKS_M][W::BLOCKS_N][4];
    tile_product<T, W>(a, b, l.width, sum);

#pragma unroll
    for (int i = 0; i < 2 * W::BLOCKS_M; ++i) {  // rows of this lane: two in each 16-row block
        const int row = at.first + W::row() + 8 * i + int(threadIdx.x) % 32 / 4, c = i % 2 * 2;
        const bool inside = row < at.last;
        T* const h = row_if<T>(inside, l.h, row, l.units);
        T* const z = row_if<T>(inside && l.z, l.z, row, 2 * l.units);
#pragma unroll
        for (int j = 0; j < W::BLOCKS_N; j += 4) {  // gate, up, gate, up: 16 units
            uint32_t gate[2], lift[2], out[2];
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                const float(&g)[4] = sum[i / 2][j + 2 * p], (&u)[4] = sum[i / 2][j + 2 * p + 1];
                gate[p] = pack<T>(g[c], g[c + 1]);
                lift[p] = pack<T>(u[c], u[c + 1]);
                out[p] = pack<T>(g[c] * sigmoid(g[c]) * u[c], g[c + 1] * sigmoid(g[c + 1]) * u[c + 1]);
            }
            const int unit = (at.column + W::column()) / 2 + j / 2 * 8;
            store_16(h, unit, l.units, out[0], out[1]);
            if (l.z) {
                store_16(z, unit, l.units, gate[0], gate[1]);
                store_16(z ? z + l.units : z, unit, l.units, lift[0], lift[1]);
            }
        }
    }
}

// out[slot] = scale * (rows W): the down projection and the gradient of x. Rows go back to where their token stands in the
// same breath: with one choice per token, slots are tokens and nothing is left to combine.
template <class T, int TILE_M, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<TILE_M>)
    to_slots(Layer l, const T* rows, int depth, const T* weights, const float* scale, T* out) {
    using W = Split<TILE_M, TILE_N>;
    const Place at = Place::of(l, l.width);
    if (at.expert < 0) return;

    weights += int64_t(at.expert) * depth * l.width;  // TRANSPOSED: [width, depth], else [depth, width]
    Operand<T, Rows<false>, true, TILE_M> a{rows, depth, 0, {at.first, at.last}};
    const int down = TRANSPOSED ? l.width : depth, across = TRANSPOSED ? depth : l.width;
    Operand<T, Rows<false>, TRANSPOSED, TILE_N> b{weights, across, at.column, {0, down}};
    float sum[W::BLOCKS_M][W::BLOCKS_N][4];
    tile_product<T, W>(a, b, depth, sum);

#pragma unroll
    for (int i = 0; i < 2 * W::BLOCKS_M; ++i) {
        const int row = at.first + W::row() + 8 * i + int(threadIdx.x) % 32 / 4, c = i % 2 * 2;
        const int slot = row < at.last ? l.slot[row] : -1;
        const float s = scale && slot >= 0 ? scale[slot] : 1.f;
        T* const to = row_if<T>(slot >= 0, out, slot, l.width);
#pragma unroll
        for (int j = 0; j < W::BLOCKS_N; j += 2) {
            const float(&left)[4] = sum[i / 2][j], (&right)[4] = sum[i / 2][j + 1];
            const uint32_t words[2] = {pack<T>(s * left[c], s * left[c + 1]), pack<T>(s * right[c], s * right[c + 1])};
            store_16(to, at.column + W::column() + 8 * j, l.width, words[0], words[1]);
        }
    }
}

// dh = dy[token] W2, and all that follows from it unit by unit: dz, the gated h that dW2 needs (h is rebuilt from z, never
// stored), and <dh, h>, the gradient of the gate. The last is a sum over units: one part per warp column, which the caller
// adds.
template <class T, int TILE_M>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<TILE_M>) hidden_gradient(Layer l) {
    using W = Split<TILE_M, TILE_N>;
    const Place at = Place::of(l, l.units);
    if (at.expert < 0) return;

    const T *dy = static_cast<const T*>(l.dy), *w2 = static_cast<const T*>(l.w2) + int64_t(at.expert) * l.width * l.units;
    Operand<T, Rows<true>, true, TILE_M> a{dy, l.width, 0, {at.first, at.last, l.token}};
    Operand<T, Rows<false>, false, TILE_N> b{w2, l.units, at.column, {0, l.width}};
    float sum[W::BLOCKS_M][W::BLOCKS_N][4];
    tile_product<T, W>(a, b, l.width, sum);

#pragma unroll
    for (int i = 0; i < 2 * W::BLOCKS_M; ++i) {
        const int row = at.first + W::row() + 8 * i + int(threadIdx.x) % 32 / 4, c = i % 2 * 2;
        const int slot = row < at.last ? l.slot[row] : -1;
        const float gate = slot >= 0 ? l.gates[slot] : 0.f;
        const T* const z = static_cast<const T*>(l.z) + int64_t(row) * 2 * l.units;
        T* const dz = row_if<T>(slot >= 0, l.dz, row, 2 * l.units);
        T* const gated_h = row_if<T>(slot >= 0, l.gated_h, row, l.units);
        float dgate = 0;
#pragma unroll
        for (int j = 0; j < W::BLOCKS_N; j += 2) {
            const int unit = at.column + W::column() + 8 * j;
            uint32_t d_gate[2], d_up[2], out[2];
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                const int mine = unit + 8 * p + int(threadIdx.x) % 4 * 2;
                uint32_t words[2] = {0, 0};
                if (slot >= 0 && mine < l.units) {
                    words[0] = *reinterpret_cast<const uint32_t*>(z + mine);
                    words[1] = *reinterpret_cast<const uint32_t*>(z + l.units + mine);
                }
                float g[2], u[2], dg[2], du[2], gh[2];
                unpack<T>(g, words[0]);
                unpack<T>(u, words[1]);
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    const float s = sigmoid(g[q]), silu = g[q] * s, dh = sum[i / 2][j + p][c + q];
                    dgate += dh * silu * u[q];
                    gh[q] = gate * silu * u[q];
                    du[q] = gate * dh * silu;
                    dg[q] = gate * dh * u[q] * s * (1.f + g[q] * (1.f - s));
                }
                d_gate[p] = pack<T>(dg[0], dg[1]);
                d_up[p] = pack<T>(du[0], du[1]);
                out[p] = pack<T>(gh[0], gh[1]);
            }
            store_16(dz, unit, l.units, d_gate[0], d_gate[1]);
            store_16(dz ? dz + l.units : dz, unit, l.units, d_up[0], d_up[1]);
            store_16(gated_h, unit, l.units, out[0], out[1]);
        }
        dgate += __shfl_xor_sync(~0u, dgate, 1);
        dgate += __shfl_xor_sync(~0u, dgate, 2);
        const int part = (at.column + W::column()) / W::N;
        if (slot >= 0 && threadIdx.x % 4 == 0 && part < l.gate_parts) l.dgates[int64_t(slot) * l.gate_parts + part] = dgate;
    }
}

// dW_e = a^T b over the rows of expert e, one of the two gathered by token: here k runs over tokens. An expert without
// tokens runs no step and writes zeros.
template <class T, bool GATHER_A>
__global__ void __launch_bounds__(THREADS, 2)
    weight_gradient(const int* ends, const int* index, const T* a_rows, int a_width, const T* b_rows, int b_width, T* out) {
    using W = Split<128, TILE_N>;
    const int down = (a_width + 127) / 128, across = (b_width + TILE_N - 1) / TILE_N;
    const int expert = blockIdx.x / (down * across), tile = blockIdx.x % (down * across);
    const int m = tile / across * 128, n = tile % across * TILE_N;
    const int first = expert ? ends[expert - 1] : 0, last = ends[expert];

    Operand<T, Rows<GATHER_A>, false, 128> a{a_rows, a_width, m, {first, last, index}};
    Operand<T, Rows<!GATHER_A>, false, TILE_N> b{b_rows, b_width, n, {first, last, index}};
    float sum[W::BLOCKS_M][W::BLOCKS_N][4];
    tile_product<T, W>(a, b, last - first, sum);

    out += int64_t(expert) * a_width * b_width;
#pragma unroll
    for (int i = 0; i < 2 * W::BLOCKS_M; ++i) {
        const int row = m + W::row() + 8 * i + int(threadIdx.x) % 32 / 4, c = i % 2 * 2;
        T* const to = row_if<T>(row < a_width, out, row, b_width);
#pragma unroll
        for (int j = 0; j < W::BLOCKS_N; j += 2) {
            const float(&left)[4] = sum[i / 2][j], (&right)[4] = sum[i / 2][j + 1];
            store_16(to, n + W::column() + 8 * j, b_width, pack<T>(left[c], left[c + 1]), pack<T>(right[c], right[c + 1]));
        }
    }
}

#include "launch.cuh"
