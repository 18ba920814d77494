// The host's side of grouped_swiglu.cu: pick the kernel by dtype and tile height, count the blocks, start them, and the C
// interface that Python calls. Nothing here waits for the device.
#pragma once

#include <type_traits>

constexpr int blocks_across(int columns) { return (columns + TILE_N - 1) / TILE_N; }

template <class T, int TILE_M>
cudaError_t run_forward(const Layer& l) {
    const auto stream = static_cast<cudaStream_t>(l.stream);
    const int shared = shared_bytes(TILE_M, TILE_N);
    const int blocks = l.max_tiles * blocks_across(2 * l.units);
    if (auto error = launch(up<T, TILE_M>, blocks, THREADS, shared, stream, l)) return error;
    return launch(to_slots<T, TILE_M, true>, l.max_tiles * blocks_across(l.width), THREADS, shared, stream, l,
                  static_cast<const T*>(l.h), l.units, static_cast<const T*>(l.w2), l.gates, static_cast<T*>(l.y));
}

template <class T, int TILE_M>
cudaError_t run_backward(const Layer& l) {
    const auto stream = static_cast<cudaStream_t>(l.stream);
    const int shared = shared_bytes(TILE_M, TILE_N), units = l.units, width = l.width;
    const auto *x = static_cast<const T*>(l.x), *dy = static_cast<const T*>(l.dy), *w13 = static_cast<const T*>(l.w13);
    auto *dz = static_cast<T*>(l.dz), *gated_h = static_cast<T*>(l.gated_h);
    const int blocks = l.max_tiles * blocks_across(units);
    if (auto error = launch(hidden_gradient<T, TILE_M>, blocks, THREADS, shared, stream, l)) return error;
    const float* const no_gates = nullptr;
    if (auto error = launch(to_slots<T, TILE_M, false>, l.max_tiles * blocks_across(width), THREADS, shared, stream, l,
                            static_cast<const T*>(dz), 2 * units, w13, no_gates, static_cast<T*>(l.dx)))
        return error;
    const auto gradient = [&](auto kernel, const T* a, int a_width, const T* b, int b_width, void* out) {
        const int tiles = l.experts * blocks_across(a_width) * blocks_across(b_width);
        return launch(kernel, tiles, THREADS, shared_bytes(128, TILE_N), stream, static_cast<const int*>(l.ends),
                      static_cast<const int*>(l.token), a, a_width, b, b_width, static_cast<T*>(out));
    };
    if (auto error = gradient(weight_gradient<T, true>, dy, width, gated_h, units, l.dw2)) return error;
    return gradient(weight_gradient<T, false>, dz, 2 * units, x, width, l.dw13);
}

template <class F>
cudaError_t with_dtype_and_tile(const Layer& l, F run) {
    if (auto error = cudaSetDevice(l.device)) return error;
    const auto with_tile = [&](auto number) {
        if (l.tile == 32) return run(number, std::integral_constant<int, 32>{});
        if (l.tile == 64) return run(number, std::integral_constant<int, 64>{});
        return run(number, std::integral_constant<int, 128>{});
    };
    return l.dtype == 0 ? with_tile(bfloat16{}) : with_tile(float16{});
}

extern "C" {
// Called by binding.py, which mirrors Layer field by field. Each returns a CUDA error code, 0 for none.
int sigma_plan(const Layer* l) {
    if (auto error = cudaSetDevice(l->device)) return error;
    return make_plan({l->ids, l->tokens * l->k, l->k, l->experts, l->tile, l->chunk, l->chunks, l->counts, l->slot, l->token,
                      l->ends, l->tiles, l->max_tiles},
                     static_cast<cudaStream_t>(l->stream));
}
int sigma_forward(const Layer* l) {
    return with_dtype_and_tile(*l, [&](auto number, auto tile) { return run_forward<decltype(number), tile.value>(*l); });
}
int sigma_backward(const Layer* l) {
    return with_dtype_and_tile(*l, [&](auto number, auto tile) { return run_backward<decltype(number), tile.value>(*l); });
}
int sigma_size_of_layer() { return sizeof(Layer); }
const char* sigma_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#ifdef EMULATE
void sigma_emulate_late(int late) { emulated::late = late; }
long sigma_bank_conflicts() { return emulated::bank_conflicts; }
#endif
}
