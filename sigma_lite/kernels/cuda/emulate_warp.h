// What threads do together in the emulator of emulate.h: barriers, warp instructions, asynchronous copies.
#pragma once

namespace emulated {

// Wait until `group` threads from `first` on have come here with the same `tag`; the last one frees all.
// Returns true in that last one, before the others go on.
inline bool gather(unsigned first, unsigned group, int tag) {
    fibers[current].waits_for = tag;
    for (unsigned t = first; t < first + group; ++t)
        if (fibers[t].done || fibers[t].waits_for != tag) return false;
    return true;
}
inline void release(unsigned first, unsigned group) {
    for (unsigned t = first; t < first + group; ++t) fibers[t].waits_for = 0;
}

// One instruction of a whole warp: every lane brings a pointer to its own data, the last to come computes for all.
template <class Lane, class Compute>
void warp_instruction(Lane& mine, int tag, Compute compute) {
    const unsigned first = current / 32 * 32;
    fibers[current].argument = &mine;
    if (!gather(first, 32, tag)) return yield();
    Lane* lanes[32];
    for (unsigned l = 0; l < 32; ++l) lanes[l] = const_cast<Lane*>(static_cast<const Lane*>(fibers[first + l].argument));
    compute(lanes);
    release(first, 32);
}

inline void land(const Copy& c) { c.copy ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16); }

inline void count_conflicts(const void* const* rows) {  // eight rows of 16 bytes are one pass if their banks differ
    unsigned seen = 0;
    for (int i = 0; i < 8; ++i) {
        const size_t at = static_cast<const unsigned char*>(rows[i]) - shared;
        if (at + 16 > shared_bytes || at % 16) fail("ldmatrix outside shared memory or not on 16 bytes");
        const unsigned bank = 1u << (at / 16 % 8);
        bank_conflicts += (seen & bank) != 0;
        seen |= bank;
    }
}

}  // namespace emulated

inline void __syncthreads() {
    using namespace emulated;
    if (!gather(0, n_threads, 1)) return yield();
    release(0, n_threads);
}

inline void copy_async(void* to, const void* from, bool copy) {
    using namespace emulated;
    const size_t at = static_cast<unsigned char*>(to) - shared;
    if (at + 16 > shared_bytes || at % 16) fail("cp.async outside shared memory or not on 16 bytes");
    if (copy && uintptr_t(from) % 16) fail("cp.async from an address that is no multiple of 16");
    const Copy c{to, from, copy};
    if (late) fibers[current].groups.back().push_back(c);
    else land(c);
}
inline void copy_commit() { emulated::fibers[emulated::current].groups.emplace_back(); }
template <int PENDING>
void copy_wait() {
    auto& groups = emulated::fibers[emulated::current].groups;
    while (groups.size() > PENDING + 1) {  // the last one is still open
        for (const auto& c : groups.front()) emulated::land(c);
        groups.erase(groups.begin());
    }
}

template <bool TRANSPOSE>
void load_matrices(uint32_t (&r)[4], const void* row) {
    struct Lane {
        uint32_t* r;
        const void* row;
    } mine{r, row};
    emulated::warp_instruction(mine, 2 + TRANSPOSE, [](Lane** lanes) {
        for (int q = 0; q < 4; ++q) {
            const void* rows[8];
            for (int i = 0; i < 8; ++i) rows[i] = lanes[8 * q + i]->row;
            emulated::count_conflicts(rows);
            for (int l = 0; l < 32; ++l) {
                uint16_t two[2];
                for (int i = 0; i < 2; ++i) {
                    const int across = 2 * (l % 4) + i, down = l / 4;
                    two[i] = static_cast<const uint16_t*>(rows[TRANSPOSE ? across : down])[TRANSPOSE ? down : across];
                }
                memcpy(&lanes[l]->r[q], two, 4);
            }
        }
    });
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
    struct Lane {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } mine{c, a, {b0, b1}};
    emulated::warp_instruction(mine, 4, [](Lane** lanes) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; ++l) {
            const int group = l / 4, in_group = l % 4;
            T a[8], b[4];
            memcpy(a, lanes[l]->a, 16);
            memcpy(b, lanes[l]->b, 8);
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                A[row][in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = to_float(a[i]);
            }
            for (int i = 0; i < 4; ++i) B[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = to_float(b[i]);
        }
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + (i < 2 ? 0 : 8), column = l % 4 * 2 + (i & 1);
                for (int k = 0; k < 16; ++k) lanes[l]->c[i] += A[row][k] * B[k][column];
            }
    });
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
    struct Lane {
        V value, result;
        int mask;
    } mine{value, value, mask};
    emulated::warp_instruction(mine, 5, [](Lane** lanes) {
        for (int l = 0; l < 32; ++l) lanes[l]->result = lanes[l ^ lanes[l]->mask]->value;
    });
    return mine.result;
}

inline unsigned __match_any_sync(unsigned, int value) {
    struct Lane {
        int value;
        unsigned result;
    } mine{value, 0};
    emulated::warp_instruction(mine, 6, [](Lane** lanes) {
        for (int l = 0; l < 32; ++l)
            for (int m = 0; m < 32; ++m) lanes[l]->result |= unsigned(lanes[m]->value == lanes[l]->value) << m;
    });
    return mine.result;
}

inline void __trap() { emulated::fail("__trap"); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
