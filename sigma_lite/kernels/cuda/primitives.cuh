// The five instructions that a tensor-core kernel is made of, one function each, and the number types.
// With nvcc they are one line of PTX. With a C++ compiler (-DEMULATE) emulate.h computes what the PTX manual says they do.
#pragma once

#include <cstdint>

#ifdef EMULATE
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// Start a kernel; the error code is 0 if it could be started. Blocks get more than 48 KB of shared memory only on request.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int shared, cudaStream_t stream, Arguments... a) {
    if (blocks == 0) return cudaSuccess;
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, threads, shared, stream>>>(a...);
    return cudaGetLastError();
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, past the registers and without waiting. `copy` false writes zeros instead and does
// not touch `from`: that is how rows past an expert's last and columns past a matrix's edge become zeros at no cost.
DEVICE void copy_async(void* to, const void* from, bool copy) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(copy ? 16 : 0)
                 : "memory");
}

// Copies are counted in groups, one per tile: `commit` closes a group, `wait<n>` returns when at most n are on their way.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 2-byte numbers, one row address per lane (lanes 0-7: matrix 0, 8-15: matrix 1, ...). Lane l gets
// of each matrix the two neighbours (row l/4, columns 2(l%4) and +1), or with TRANSPOSE (rows 2(l%4) and +1, column l/4).
template <bool TRANSPOSE>
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    if constexpr (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// c += a b on the tensor core: a is 16 x 16, b 16 x 8, c 16 x 8 in fp32, spread over the 32 lanes of a warp.
#define MMA(type)                                                                                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                        \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bfloat16) { MMA("bf16"); }
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float16) { MMA("f16"); }
#undef MMA

DEVICE float to_float(bfloat16 v) { return __bfloat162float(v); }
DEVICE float to_float(float16 v) { return __half2float(v); }
DEVICE void round_to(bfloat16& to, float v) { to = __float2bfloat16(v); }
DEVICE void round_to(float16& to, float v) { to = __float2half(v); }

#endif

// Two neighbours in a row, moved as one 4-byte word; and four of them as one 8-byte word.
template <class T>
struct alignas(4) Pair {
    T first, second;
};
struct alignas(8) Words {
    uint32_t first, second;
};

template <class T>
DEVICE uint32_t pack(float first, float second) {
    Pair<T> pair;
    round_to(pair.first, first);
    round_to(pair.second, second);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

template <class T>
DEVICE void unpack(float (&to)[2], uint32_t word) {
    Pair<T> pair;
    memcpy(&pair, &word, 4);
    to[0] = to_float(pair.first);
    to[1] = to_float(pair.second);
}
