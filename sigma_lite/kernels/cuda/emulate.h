// A GPU small enough to read: enough of CUDA's execution model to run grouped_swiglu.cu, unchanged, on a CPU.
//
// Each thread of a block is a fiber: it runs until it must wait for others (a barrier, or a warp instruction that all 32
// lanes take together), then the next one runs. Fragment layouts are those of the PTX manual (mma.m16n8k16, ldmatrix).
// A copy may land anywhere between its issue and the wait for it, so there are two modes: early copies at once and runs
// blocks and threads in order, late copies at the wait and runs them backwards. A kernel that forgets a wait, a barrier or
// where its rows end differs from itself between the two. Shared memory starts as NaN. Bank conflicts are counted, not felt. One host thread at a time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define DEVICE inline
#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::shared

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct bfloat16 {
    uint16_t bits;
};
using float16 = _Float16;
inline float to_float(bfloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline float to_float(float16 v) { return float(v); }
inline void round_to(float16& to, float v) { to = float16(v); }
inline void round_to(bfloat16& to, float v) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &v, 4);
    to.bits = v != v ? 0x7fff : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

namespace emulated {

struct Index {
    unsigned x = 0;
};
struct Copy {
    void* to;
    const void* from;
    bool copy;
};
struct Fiber {
    ucontext_t start;
    jmp_buf place;
    bool begun = false, done = false;
    int waits_for = 0;                     // the barrier, or the warp instruction, that it stands at; 0: it can run
    std::vector<std::vector<Copy>> groups;  // asynchronous copies under way, the youngest group last
    const void* argument;                  // what this lane brings to a warp instruction
    std::vector<unsigned char> stack = std::vector<unsigned char>(64 << 10);
};

inline bool late = false;
inline long bank_conflicts = 0;
inline unsigned char* shared;
inline size_t shared_bytes;
inline std::vector<Fiber> fibers;
inline unsigned n_threads, current;
inline jmp_buf scheduler;
inline const std::function<void()>* body;
inline Index thread, block;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulate.h: %s (block %u, thread %u)\n", what, block.x, current);
    std::abort();
}

inline void enter() {
    (*body)();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

inline void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

inline void resume(unsigned t) {
    current = t;
    thread.x = t;
    Fiber& f = fibers[t];
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.place, 1);
    f.begun = true;
    setcontext(&f.start);
}

inline void run_block() {
    for (Fiber& f : fibers) {
        f.begun = f.done = false;
        f.waits_for = 0;
        f.groups.assign(1, {});
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.data();
        f.start.uc_stack.ss_size = f.stack.size();
        f.start.uc_link = nullptr;
        makecontext(&f.start, enter, 0);
    }
    memset(shared, 0xff, shared_bytes);  // NaN in every format
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned i = 0; i < n_threads; ++i) {
            const unsigned t = late ? n_threads - 1 - i : i;
            if (!fibers[t].done && !fibers[t].waits_for) resume(t), moved = true;
        }
        bool all_wait = true;
        for (const Fiber& f : fibers) all_wait = all_wait && (f.done || f.waits_for);
        if (!moved && all_wait)
            for (const Fiber& f : fibers)
                if (!f.done) fail("some threads stand at a barrier or warp instruction that the others never reach");
    }
}

inline void run_grid(const std::function<void()>& kernel, unsigned blocks, unsigned threads, size_t bytes) {
    std::vector<unsigned char> memory(bytes + 128);
    shared = memory.data() + (128 - uintptr_t(memory.data()) % 128) % 128;
    shared_bytes = bytes;
    body = &kernel;
    n_threads = threads;
    fibers.resize(threads);
    for (unsigned i = 0; i < blocks; ++i) {
        block.x = late ? blocks - 1 - i : i;
        run_block();
    }
}

}  // namespace emulated

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int bytes, cudaStream_t, Arguments... a) {
    emulated::run_grid([=] { kernel(a...); }, blocks, threads, bytes);
    return cudaSuccess;
}

#define threadIdx emulated::thread
#define blockIdx emulated::block

#include "emulate_warp.h"
