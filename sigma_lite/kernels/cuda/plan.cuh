// The routing plan on the device: slots sorted by expert, and which tile works for which expert. A stable counting sort in
// three launches, without atomics (so the order never varies) and without a word to the host.
#pragma once

#include "primitives.cuh"

constexpr int MAX_EXPERTS = 1024;  // the scan gives each expert one thread

struct Plan {
    const int64_t* ids;  // [slots]: the expert of each (token, choice) pair
    int slots, k, experts, tile;
    int chunk, chunks;  // slots are counted in `chunks` pieces of `chunk`
    int* counts;        // [chunks, experts]: how many; after the scan, the first row of the piece
    int* slot;          // [slots]: which slot stands in each sorted row
    int* token;         // [slots]: its token
    int* ends;          // [experts]: one past the last row of each expert
    int* tiles;         // [max_tiles, 2]: expert and first row of each tile; expert -1 where there is no more work
    int max_tiles;      // slots / tile + experts: known to the host, whatever the routing
};

// One warp counts one piece, 32 slots at a time; then the same loop runs again and places them. Lanes that hold the same
// expert find each other with `match`: rank = how many of them stand in lower lanes.
template <bool PLACE>
__global__ void __launch_bounds__(32) count_or_place(Plan p) {
    DYNAMIC_SHARED(memory);
    int* const next = reinterpret_cast<int*>(memory);  // [experts]
    const int lane = threadIdx.x, first = blockIdx.x * p.chunk;
    const int last = first + p.chunk < p.slots ? first + p.chunk : p.slots;
    int* const counts = p.counts + int64_t(blockIdx.x) * p.experts;
    for (int e = lane; e < p.experts; e += 32) next[e] = PLACE ? counts[e] : 0;
    __syncthreads();
    for (int base = first; base < last; base += 32) {
        const int slot = base + lane;
        const int expert = slot < last ? int(p.ids[slot]) : -1;
        if (slot < last && (expert < 0 || expert >= p.experts)) __trap();  // no such expert
        const unsigned same = __match_any_sync(~0u, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int row = expert < 0 ? 0 : next[expert] + rank;
        __syncthreads();
        if (expert >= 0 && rank == 0) next[expert] += __popc(same);
        __syncthreads();
        if (PLACE && expert >= 0) {
            p.slot[row] = slot;
            p.token[row] = slot / p.k;
        }
    }
    if (!PLACE)
        for (int e = lane; e < p.experts; e += 32) counts[e] = next[e];
}

// One block, one thread per expert: running sums over the pieces, then over the experts, then the list of tiles.
__global__ void __launch_bounds__(MAX_EXPERTS) scan_counts(Plan p) {
    DYNAMIC_SHARED(memory);
    int* const rows = reinterpret_cast<int*>(memory);  // [experts]
    int* const tiles = rows + p.experts;               // [experts]
    const int e = threadIdx.x;
    int count = 0;
    if (e < p.experts) {
#pragma unroll 8
        for (int c = 0; c < p.chunks; ++c) {
            int& here = p.counts[int64_t(c) * p.experts + e];
            const int n = here;
            here = count;
            count += n;
        }
        rows[e] = count;
        tiles[e] = (count + p.tile - 1) / p.tile;
    }
    for (int step = 1; step < p.experts; step *= 2) {  // each adds the sum that ends `step` places before its own
        __syncthreads();
        const int add = e >= step && e < p.experts ? rows[e - step] : 0;
        const int add_tiles = e >= step && e < p.experts ? tiles[e - step] : 0;
        __syncthreads();
        if (e < p.experts) {
            rows[e] += add;
            tiles[e] += add_tiles;
        }
    }
    __syncthreads();
    if (e < p.experts) {
        p.ends[e] = rows[e];
        const int begin = rows[e] - count;
        for (int c = 0; c < p.chunks; ++c) p.counts[int64_t(c) * p.experts + e] += begin;
        int at = e ? tiles[e - 1] : 0;
        for (int row = begin; row < rows[e]; row += p.tile, ++at) {
            p.tiles[2 * at] = e;
            p.tiles[2 * at + 1] = row;
        }
    }
    for (int t = tiles[p.experts - 1] + e; t < p.max_tiles; t += MAX_EXPERTS) p.tiles[2 * t] = -1;
}

inline cudaError_t make_plan(const Plan& p, cudaStream_t stream) {
    const int bytes = p.experts * int(sizeof(int));
    if (auto error = launch(count_or_place<false>, p.chunks, 32, bytes, stream, p)) return error;
    if (auto error = launch(scan_counts, 1, MAX_EXPERTS, 2 * bytes, stream, p)) return error;
    return launch(count_or_place<true>, p.chunks, 32, bytes, stream, p);
}
