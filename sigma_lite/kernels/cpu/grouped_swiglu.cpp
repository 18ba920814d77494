// y_t = sum over chosen experts e of  gate_te * W2_e ( silu(Wg_e x_t) * Wu_e x_t ), forward and backward, fp32, on a CPU.
//
// In an ultra-sparse layer an expert sees few tokens: 4096 tokens over 96 experts are 43 each, against matrices of 256 x 128.
// Libraries pack the matrices before they multiply, to read them in their inner loop's order; here that would cost as much as
// the product. So the *tokens* are packed: up to PANEL of them stand side by side, one feature below the other, and a vector
// register holds one feature of LANES tokens. The weights are read where they lie, a number at a time, once per panel.
//
//   forward   z = W13 x     h = silu(z_gate) z_up     y = gate * W2 h               all [feature, token]
//   backward  dh = W2^T dy  dz, gate * h, <dh, h>     dx = W13^T dz
//             dW2 = dy (gate h)^T   dW13 = dz x^T     here a register holds LANES columns of the gradient
//
// One thread does all of an expert, and every sum has a fixed order: the same bits at any number of threads.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "tile.h"

constexpr int PANEL = 96;  // most experts' tokens are one panel then, and no gradient of a weight is read again
constexpr int64_t TOKENS_AT_ONCE = 256;  // of the sum over a token's K rows

struct Layer {
    int64_t tokens, k, experts, width, units, threads;
    const int64_t* ids;                  // [T, K]
    const float *x, *w13, *w2, *gates;   // [T, D], [E, 2F, D], [E, D, F], [T, K]
    int32_t *slot, *start;               // [N = T K] slots (token * K + choice) by expert; [E + 1] where an expert's begin
    float *z, *rows, *y;                 // [2F * room()], [N, D] by slot (y itself if K = 1), [T, D]
    const float* dy;                     // [T, D]
    float *dgates, *dx, *dw13, *dw2;     // like what they are gradients of

    const float* of_w13(int64_t e) const { return w13 + e * 2 * units * width; }
    const float* of_w2(int64_t e) const { return w2 + e * units * width; }
};

struct Panel {
    int expert, first, tokens, lanes;  // sorted rows first .. first + tokens - 1; the lanes after them hold zeros
    int64_t z;                         // lanes of the panels before: this one's z begins at 2F times as many
    bool begins, ends;                 // the expert's first panel, its last
};

struct Scratch {
    std::vector<float> narrow, other, hidden, rows, hidden_rows, dz;

    explicit Scratch(const Layer& l)
        : narrow(l.width * PANEL), other(l.width * PANEL), hidden(l.units * PANEL), rows(l.width * PANEL),
          hidden_rows(l.units * PANEL), dz(2 * l.units * PANEL) {}
};

// panel [features, lanes] from `tokens` rows.
static void pack(const float* const* rows, const Panel& p, int features, float* panel) {
    for (int t = 0; t < p.lanes; t += LANES)
        for (int f = 0; f < features; f += LANES) {
            Vector square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = t + i < p.tokens ? load(rows[t + i] + f) : Vector{};
            turn(square);
            for (int i = 0; i < LANES; i++) store(panel + (f + i) * p.lanes + t, square[i]);
        }
}

// The other way round, each row times its scale.
static void unpack(const float* panel, const Panel& p, int features, float* const* rows, const float* scale) {
    for (int t = 0; t < p.tokens; t += LANES)
        for (int f = 0; f < features; f += LANES) {
            Vector square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(panel + (f + i) * p.lanes + t);
            turn(square);
            for (int i = 0; i < LANES && t + i < p.tokens; i++) store(rows[t + i] + f, square[i] * scale[t + i]);
        }
}

static void forward(const Layer& l, const Panel& p, Scratch& s) {
    const int D = l.width, F = l.units, w = p.lanes;
    const float* in[PANEL];
    float *out[PANEL], gates[PANEL];
    for (int t = 0; t < p.tokens; t++) {
        const int64_t slot = l.slot[p.first + t];
        in[t] = l.x + slot / l.k * D, out[t] = l.rows + slot * D, gates[t] = l.gates[slot];
    }
    float *x = s.narrow.data(), *h = s.hidden.data(), *y = s.other.data(), *z = l.z + p.z * 2 * F;
    const float *w13 = l.of_w13(p.expert), *w2 = l.of_w2(p.expert);
    const Ahead next = p.expert + 1 < l.experts ? Ahead{l.of_w13(p.expert + 1), 2 * F * D} : Ahead{};

    pack(in, p, D, x);
    matmul(2 * F, w, D, {w13, D, 1}, {x, w}, {z, w}, {w2, F * D});
    for (int i = 0; i < F * w; i += LANES) {
        const Vector gate = load(z + i), up = load(z + F * w + i);
        store(h + i, gate / (1.f + exponential(-gate)) * up);
    }
    matmul(D, w, F, {w2, F, 1}, {h, w}, {y, w}, next);
    unpack(y, p, D, out, gates);
}

// From z and dh: dz, gate * h in place of dh, and dgate = <dh, h> in its slot.
static void swiglu_backward(const Layer& l, const Panel& p, const float* gates, float* dh, float* dz) {
    const int F = l.units, w = p.lanes;
    const float* z = l.z + p.z * 2 * F;
    for (int t = 0; t < w; t += LANES) {
        const Vector scale = load(gates + t);
        Vector dgate{};
        for (int i = t; i < F * w; i += w) {
            const Vector gate = load(z + i), up = load(z + F * w + i), into = load(dh + i);
            const Vector sigmoid = 1.f / (1.f + exponential(-gate)), silu = gate * sigmoid, h = silu * up;
            dgate += into * h;
            store(dz + i, scale * into * up * (sigmoid + silu * (1.f - sigmoid)));
            store(dz + F * w + i, scale * into * silu);
            store(dh + i, scale * h);
        }
        for (int i = 0; i < LANES && t + i < p.tokens; i++) l.dgates[l.slot[p.first + t + i]] = dgate[i];
    }
}

static void backward(const Layer& l, const Panel& p, Scratch& s) {
    const int D = l.width, F = l.units, w = p.lanes;
    const float* in[PANEL];
    float *out[PANEL], *hidden_rows[PANEL], gates[PANEL] = {}, ones[PANEL];
    for (int t = 0; t < p.tokens; t++) {
        const int64_t slot = l.slot[p.first + t];
        in[t] = l.dy + slot / l.k * D, out[t] = l.rows + slot * D, gates[t] = l.gates[slot], ones[t] = 1;
        hidden_rows[t] = s.hidden_rows.data() + t * F;
        memcpy(s.rows.data() + t * D, l.x + slot / l.k * D, D * sizeof(float));
    }
    float *dy = s.narrow.data(), *dx = s.other.data(), *h = s.hidden.data(), *dz = s.dz.data();
    const float *w13 = l.of_w13(p.expert), *w2 = l.of_w2(p.expert);
    const Ahead next = p.expert + 1 < l.experts ? Ahead{l.of_w2(p.expert + 1), F * D} : Ahead{};
    float *dw13 = l.dw13 + (w13 - l.w13), *dw2 = l.dw2 + (w2 - l.w2);

    pack(in, p, D, dy);
    matmul(F, w, D, {w2, 1, F}, {dy, w}, {h, w});
    swiglu_backward(l, p, gates, h, dz);
    unpack(h, p, F, hidden_rows, ones);
    matmul(D, F, p.tokens, {dy, w, 1}, {s.hidden_rows.data(), F}, {dw2, F, !p.begins, p.ends}, {w13, 2 * F * D});
    matmul(2 * F, D, p.tokens, {dz, w, 1}, {s.rows.data(), D}, {dw13, D, !p.begins, p.ends});
    matmul(D, w, 2 * F, {w13, 1, D}, {dz, w}, {dx, w}, next);
    unpack(dx, p, D, out, ones);
}

// Work through pieces 0 .. n - 1, on the caller's thread and threads - 1 others; who is free takes the next one.
template <class Start>
static void share_out(int64_t n, int64_t threads, Start start) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        auto work = start();
        for (int64_t piece; (piece = next++) < n;) work(piece);
        finish_far_stores();
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min(threads, n); t++) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

// Cut an expert's tokens into panels of about equal height and call work(panel) for each, in order.
template <class Work>
static void each_panel(const Layer& l, int e, Work work) {
    int first = l.start[e], tokens = l.start[e + 1] - first, vectors = (tokens + LANES - 1) / LANES;
    int64_t z = first + int64_t(e) * (LANES - 1);  // every expert before may have that many lanes of padding
    const int panels = (vectors + PANEL / LANES - 1) / (PANEL / LANES);
    for (int left = panels; left > 0; left--) {
        const int lanes = (vectors + left - 1) / left * LANES, some = std::min(tokens, lanes);
        work(Panel{e, first, some, lanes, z, left == panels, left == 1});
        first += some, tokens -= some, z += lanes, vectors -= lanes / LANES;
    }
}

// Add the K rows of each token. They stand one after the other, by slot.
static void combine(const Layer& l, float* out) {
    if (l.rows == out) return;
    share_out((l.tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, l.threads, [&] {
        return [&](int64_t piece) {
            const int64_t begin = piece * TOKENS_AT_ONCE, end = std::min(l.tokens, begin + TOKENS_AT_ONCE);
            for (int64_t t = begin; t < end; t++)
                for (int64_t d = 0; d < l.width; d += LANES) {
                    Vector sum{};
                    for (int64_t k = 0; k < l.k; k++) sum += load(l.rows + (t * l.k + k) * l.width + d);
                    store(out + t * l.width + d, sum);
                }
        };
    });
}

// Counting sort of the slots by expert, ties in token order. False if an id is not in 0 .. E - 1.
static bool sort_slots(const Layer& l) {
    std::vector<int32_t> at(l.experts + 1);
    const int64_t slots = l.tokens * l.k;
    for (int64_t i = 0; i < slots; i++) {
        if (l.ids[i] < 0 || l.ids[i] >= l.experts) return false;
        at[l.ids[i] + 1]++;
    }
    for (int64_t e = 0; e < l.experts; e++) at[e + 1] += at[e];
    std::copy(at.begin(), at.end(), l.start);
    for (int64_t i = 0; i < slots; i++) l.slot[at[l.ids[i]]++] = int32_t(i);
    return true;
}

extern "C" {
int sigma_lanes() { return LANES; }
long sigma_size_of_layer() { return sizeof(Layer); }

int sigma_forward(const Layer* l) {
    if (!sort_slots(*l)) return 1;
    share_out(l->experts, l->threads, [&] {
        return [&, s = Scratch(*l)](int64_t e) mutable { each_panel(*l, e, [&](const Panel& p) { forward(*l, p, s); }); };
    });
    combine(*l, l->y);
    return 0;
}

int sigma_backward(const Layer* l) {
    share_out(l->experts, l->threads, [&] {
        return [&, s = Scratch(*l)](int64_t e) mutable {
            each_panel(*l, e, [&](const Panel& p) { backward(*l, p, s); });
            if (l->start[e] < l->start[e + 1]) return;
            const int64_t matrix = l->units * l->width;  // no token, no gradient
            memset(l->dw13 + e * 2 * matrix, 0, 2 * matrix * sizeof(float));
            memset(l->dw2 + e * matrix, 0, matrix * sizeof(float));
        };
    });
    combine(*l, l->dx);
    return 0;
}
}
