// One output tile of a matrix product, computed by one block of 128 threads: the routine under all products of the layer.
//
// Global memory -> shared memory by asynchronous copies, STAGES tiles deep -> registers by ldmatrix -> tensor cores. What
// differs between the products is only where a row of an operand starts (a functor) and which way it is stored.
#pragma once

#include "primitives.cuh"

constexpr int THREADS = 128;
constexpr int DEPTH = 64;  // columns of k per stage: a row of 64 two-byte numbers fills one 128-byte line
#ifndef STAGES
#define STAGES 3  // tiles under way; build.py takes 2 where shared memory is small, so that two blocks fit an SM
#endif

// Where element (row, chunk of 8) of a tile lies in shared memory, in elements. ldmatrix reads eight rows at one chunk; rows
// are multiples of 128 bytes, so all would start in the same bank and be served one after the other. XOR with the row number
// sends them to eight different 16-byte columns, at no cost in space.
template <int COLUMNS>
DEVICE int swizzle(int row, int chunk) {
    static_assert(COLUMNS % 64 == 0, "a row must fill whole 128-byte lines");
    return row * COLUMNS + ((chunk ^ (row & 7)) << 3);
}

// Which row of a matrix in memory is row r of an operand; -1 for none, which reads as zeros. Here: rows first .. last - 1,
// or with GATHER those that `index` names at these places.
template <bool GATHER>
struct Rows {
    int first, last;
    const int* index = nullptr;

    DEVICE int operator()(int row) const {
        row += first;
        if (row >= last) return -1;
        return GATHER ? index[row] : row;
    }
};

// The rows of W13 so that 8 gate rows and their 8 up rows alternate. Neighbouring 8-column blocks of the accumulator then
// hold the gate and the up projection of the same unit in the same thread: SwiGLU needs no exchange.
struct GateUpRows {
    int units;  // F

    DEVICE int operator()(int row) const {
        const int unit = (row >> 4) * 8 + (row & 7);
        return unit < units ? unit + (row & 8 ? units : 0) : -1;
    }
};

// An operand of C = A B. ALONG_K: its rows are rows of A or columns of B and k runs along them (the layout of an activation,
// and of a weight in y = x W^T). Otherwise its rows are numbered by k.
template <class T, class RowOf, bool ALONG_K, int SIZE>
struct Operand {
    static constexpr int ROWS = ALONG_K ? SIZE : DEPTH, COLUMNS = ALONG_K ? DEPTH : SIZE;
    static constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS, PER_THREAD = ROWS / STEP;
    static constexpr int ELEMENTS = ROWS * COLUMNS;
    static_assert(ROWS % STEP == 0);

    const T* base;
    int columns;  // of the matrix in memory; what lies past them reads as zeros
    int corner;   // first row of A, or column of B, in this tile
    RowOf row_of;
    int rows[PER_THREAD] = {};  // the rows that this thread copies next

    // Eight (or sixteen) neighbouring threads copy one row, so that the memory system sees whole lines. Rows are found one
    // tile ahead of their copy: where they are gathered, that hides the time it takes to read the index.
    DEVICE void find_rows(int k) {
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i)
            rows[i] = row_of((ALONG_K ? corner : k) + int(threadIdx.x) / CHUNKS + i * STEP);
    }

    DEVICE void copy_tile(T* tile, int k) {
        const int chunk = threadIdx.x % CHUNKS, column = (ALONG_K ? k : corner) + chunk * 8;
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) {
            const bool inside = rows[i] >= 0 && column < columns;
            const int64_t offset = int64_t(rows[i]) * columns + column;  // 96 experts of 1536 x 1536 come close to 2^28
            const T* from = inside ? base + offset : base;
            copy_async(tile + swizzle<COLUMNS>(int(threadIdx.x) / CHUNKS + i * STEP, chunk), from, inside);
        }
        if constexpr (!ALONG_K) find_rows(k + DEPTH);
    }

    // Fragments of a 16 x 16 piece at (m or n, k) of the tile. The four 8 x 8 matrices that ldmatrix loads come in the order
    // in which mma wants its registers: for A (m0 k0)(m8 k0)(m0 k8)(m8 k8), for B (n0 k0)(n0 k8)(n8 k0)(n8 k8).
    template <bool IS_A>
    DEVICE static void load(uint32_t (&r)[4], const T* tile, int mn, int k) {
        const int lane = threadIdx.x % 32, low = lane >> 3 & 1, high = lane >> 4;
        mn += 8 * (IS_A ? low : high);
        k += 8 * (IS_A ? high : low);
        if constexpr (ALONG_K)
            load_matrices<false>(r, tile + swizzle<COLUMNS>(mn + lane % 8, k / 8));
        else  // stored the other way round: transposed on the way to the registers, for free
            load_matrices<true>(r, tile + swizzle<COLUMNS>(k + lane % 8, mn / 8));
    }
};

// Four warps share a tile of M x N. For M = 128 each takes 64 x 64: the larger the piece, the fewer bytes of shared memory a
// product costs, and 64 x 64 is what fits in the registers next to the fragments.
template <int TILE_M, int TILE_N>
struct Split {
    static constexpr int WARPS_M = TILE_M >= 64 ? 2 : 1, WARPS_N = 4 / WARPS_M;
    static constexpr int M = TILE_M / WARPS_M, N = TILE_N / WARPS_N;
    static constexpr int BLOCKS_M = M / 16, BLOCKS_N = N / 8;

    DEVICE static int row() { return int(threadIdx.x) / 32 / WARPS_N * M; }
    DEVICE static int column() { return int(threadIdx.x) / 32 % WARPS_N * N; }
};

constexpr int shared_bytes(int tile_m, int tile_n) { return STAGES * (tile_m + tile_n) * DEPTH * 2; }

// sum = A B over k = 0 .. depth - 1. Sum[i][j] is the 16 x 8 piece (i, j) of this warp; in it lane l holds row l/4, columns
// 2(l%4) and +1, then the same of row l/4 + 8.
template <class T, class W, class A, class B>
DEVICE void tile_product(A& a, B& b, int depth, float (&sum)[W::BLOCKS_M][W::BLOCKS_N][4]) {
    DYNAMIC_SHARED(memory);
    T* const tiles_a = reinterpret_cast<T*>(memory);
    T* const tiles_b = tiles_a + STAGES * A::ELEMENTS;
    const int steps = (depth + DEPTH - 1) / DEPTH;
#pragma unroll
    for (int i = 0; i < W::BLOCKS_M; ++i)
#pragma unroll
        for (int j = 0; j < W::BLOCKS_N; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[i][j][c] = 0;

    a.find_rows(0);
    b.find_rows(0);
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) {
            a.copy_tile(tiles_a + s * A::ELEMENTS, s * DEPTH);
            b.copy_tile(tiles_b + s * B::ELEMENTS, s * DEPTH);
        }
        copy_commit();
    }
    int read = 0, write = STAGES - 1;
    for (int s = 0; s < steps; ++s) {
        copy_wait<STAGES - 2>();  // my part of tile s has landed
        __syncthreads();          // everyone's has, and everyone is done with tile s - 1, whose place is filled next
        if (s + STAGES - 1 < steps) {
            a.copy_tile(tiles_a + write * A::ELEMENTS, (s + STAGES - 1) * DEPTH);
            b.copy_tile(tiles_b + write * B::ELEMENTS, (s + STAGES - 1) * DEPTH);
        }
        copy_commit();  // also when there is nothing left: the count of groups must go on
        const T *tile_a = tiles_a + read * A::ELEMENTS, *tile_b = tiles_b + read * B::ELEMENTS;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t fa[W::BLOCKS_M][4], fb[W::BLOCKS_N / 2][4];
#pragma unroll
            for (int i = 0; i < W::BLOCKS_M; ++i) A::template load<true>(fa[i], tile_a, W::row() + 16 * i, k);
#pragma unroll
            for (int j = 0; j < W::BLOCKS_N / 2; ++j) B::template load<false>(fb[j], tile_b, W::column() + 16 * j, k);
#pragma unroll
            for (int i = 0; i < W::BLOCKS_M; ++i)
#pragma unroll
                for (int j = 0; j < W::BLOCKS_N; ++j)
                    multiply_add(sum[i][j], fa[i], fb[j / 2][2 * (j % 2)], fb[j / 2][2 * (j % 2) + 1], T{});
        }
        read = read + 1 == STAGES ? 0 : read + 1;
        write = write + 1 == STAGES ? 0 : write + 1;
    }
}
