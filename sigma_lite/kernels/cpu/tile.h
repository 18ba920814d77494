// A matrix product for a CPU, C = A B or C += A B, and what goes with it: vectors, their exponential, turning squares.
//
// Peak speed needs every cycle to start a multiply-add on a full vector register. One costs two loads if its operands come
// from memory, and a core has too few loads for that. So a block of C stays in registers while k runs: each row of B that is
// loaded serves DOWN numbers of A, each number of A is spread over a register and serves ACROSS of B.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)  // 32 registers of 16 floats: 24 sums, 3 of a row of B, 1 number of A
constexpr int LANES = 16, DOWN = 8, ACROSS = 3;
#elif defined(__AVX__)  // 16 registers of 8 floats: 12 sums, 3, 1
constexpr int LANES = 8, DOWN = 4, ACROSS = 3;
#else  // NEON: 32 registers of 4 floats
constexpr int LANES = 4, DOWN = 8, ACROSS = 3;
#endif
constexpr int LINE = 16;               // floats in a cache line
constexpr long MOST_AHEAD = 64 << 10;  // floats to fetch ahead: 256 KB, half of a small second-level cache

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* p) { return *(const Unaligned*)p; }
inline void store(float* p, Vector v) { *(Unaligned*)p = v; }

// Past the caches: whoever reads these numbers comes much later, and a line that is written whole need not be read first.
inline void store_far(float* p, Vector v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, v);
#else
    store(p, v);
#endif
}

inline void finish_far_stores() {  // before another thread may read them
#if defined(__AVX__)
    _mm_sfence();
#endif
}

struct Left {  // A [m, k]: element (i, s) is at[i * row + s * column], so that a transposed A is no copy
    const float* at;
    long row, column;
};
struct Right {  // B [k, n]: rows of consecutive numbers
    const float* at;
    long row;
};
struct Out {  // C [m, n]
    float* at;
    long row;
    bool add = false, far = false;
};
struct Ahead {  // what the next product will read: fetched while this one computes, as cp.async does on a GPU
    const float* at = nullptr;
    long floats = 0;

    void fetch(long some) {
        some = std::min(some, floats);
        for (long i = 0; i < some; i += LINE) __builtin_prefetch(at + i, 0, 2);
        at += some, floats -= some;
    }
};

// DOWN x (WIDE * LANES) numbers of C, in registers from the first k to the last.
template <int WIDE>
inline void tile(int k, Left a, Right b, Out c) {
    Vector sum[DOWN][WIDE];
    for (int i = 0; i < DOWN; i++)
        for (int j = 0; j < WIDE; j++) sum[i][j] = c.add ? load(c.at + i * c.row + j * LANES) : Vector{};
    for (int s = 0; s < k; s++) {
        Vector row[WIDE];
        for (int j = 0; j < WIDE; j++) row[j] = load(b.at + s * b.row + j * LANES);
        for (int i = 0; i < DOWN; i++) {
            const float weight = a.at[i * a.row + s * a.column];
            for (int j = 0; j < WIDE; j++) sum[i][j] += weight * row[j];
        }
    }
    for (int i = 0; i < DOWN; i++)
        for (int j = 0; j < WIDE; j++) (c.far ? store_far : store)(c.at + i * c.row + j * LANES, sum[i][j]);
}

template <int WIDE>
void strip(int m, int k, Left a, Right b, Out c, Ahead& ahead, long share) {
    for (int i = 0; i < m; i += DOWN) {
        ahead.fetch(share);
        tile<WIDE>(k, {a.at + i * a.row, a.row, a.column}, b, {c.at + i * c.row, c.row, c.add, c.far});
    }
}

// C [m, n] = A B, or += with c.add. m is a multiple of DOWN, n of LANES, k any number.
inline void matmul(int m, int n, int k, Left a, Right b, Out c, Ahead ahead = {}) {
    const int vectors = n / LANES, strips = (vectors + ACROSS - 1) / ACROSS;
    ahead.floats = std::min(ahead.floats, MOST_AHEAD);
    const long share = (ahead.floats / (strips * (m / DOWN)) / LINE + 1) * LINE;
    for (int left = strips, from = 0; left > 0; left--) {
        const int wide = (vectors - from + left - 1) / left;  // 4 vectors are two strips of 2, not one of 3 and one of 1
        const Right of_b{b.at + from * LANES, b.row};
        const Out of_c{c.at + from * LANES, c.row, c.add, c.far};
        if (wide == 3) strip<3>(m, k, a, of_b, of_c, ahead, share);
        if (wide == 2) strip<2>(m, k, a, of_b, of_c, ahead, share);
        if (wide == 1) strip<1>(m, k, a, of_b, of_c, ahead, share);
        from += wide;
    }
}

// e^x = 2^n e^r with n whole and |r| <= ln 2 / 2: n goes into the exponent's bits, e^r is a polynomial (Cephes' expf).
inline Vector exponential(Vector x) {
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it pushes the fraction out of a float
    x = x < -87.f ? Vector{} - 87.f : x;
    x = x > 88.f ? Vector{} + 88.f : x;
    const Vector shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    const Vector power = (Vector)(((Ints)shifted << 23) + (127 << 23));
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first times n is exact
    Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.f) * power;
}

template <int STEP, int... LANE>
inline void swap_blocks(Vector& a, Vector& b, std::integer_sequence<int, LANE...>) {
    const Vector old = a;
#if defined(__clang__)
    a = __builtin_shufflevector(old, b, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
    b = __builtin_shufflevector(old, b, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
#else
    a = __builtin_shuffle(old, b, Ints{(LANE & STEP ? LANES + LANE - STEP : LANE)...});
    b = __builtin_shuffle(old, b, Ints{(LANE & STEP ? LANES + LANE : LANE + STEP)...});
#endif
}

// Transpose LANES x LANES numbers in registers: swap the off-diagonal quarters, then the same within each quarter.
template <int STEP = LANES / 2>
inline void turn(Vector* square) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) swap_blocks<STEP>(square[i], square[i + STEP], std::make_integer_sequence<int, LANES>());
    if constexpr (STEP > 1) turn<STEP / 2>(square);
}
