// The kernel against a loop in double, as one program: for a processor that this machine only emulates.
// It prints the relative error of every result, and fails where one is above 1e-5.
#include <cmath>
#include <cstdio>
#include <numeric>
#include <new>
#include <random>

#include "grouped_swiglu.cpp"

struct Floats {  // zeros, as far apart from others as torch puts a tensor: far stores want whole cache lines
    float* at;
    explicit Floats(int64_t n) : at(new (std::align_val_t(64)) float[n]()) {}
    float* data() { return at; }
    float& operator[](int64_t i) const { return at[i]; }
};
using Doubles = std::vector<double>;

static bool close(const char* name, const Floats& ours, const Doubles& exact) {
    double off = 0, all = 0;
    for (size_t i = 0; i < exact.size(); i++) off += std::pow(ours[i] - exact[i], 2), all += exact[i] * exact[i];
    const double error = std::sqrt(off / all);
    printf("%s %.1e\n", name, error);
    return error <= 1e-5;
}

int main() {
    const int64_t T = 300, K = 2, E = 5, D = 48, F = 16, N = T * K;  // some experts have several panels, the last has none
    std::mt19937 engine(0);
    std::normal_distribution<float> normal;
    auto draw = [&](int64_t n, float scale) {
        Floats values(n);
        for (int64_t i = 0; i < n; i++) values[i] = scale * normal(engine);
        return values;
    };
    Floats x = draw(T * D, 1), gates = draw(N, 1), w13 = draw(E * 2 * F * D, 0.15f), w2 = draw(E * D * F, 0.25f);
    Floats dy = draw(T * D, 1);
    std::vector<int64_t> ids(N);
    for (int64_t i = 0; i < N; i++) ids[i] = i % K ? 3 : (i / K) % 7 == 0 ? 1 : (i / K) % 2 * 2;

    std::vector<int32_t> slot(N), start(E + 1);
    Floats z(2 * F * (N + E * (LANES - 1))), rows(N * D), y(T * D), dgates(N), dx(T * D), dw13(E * 2 * F * D), dw2(E * D * F);
    Layer layer{T, K, E, D, F, 2, ids.data(), x.data(), w13.data(), w2.data(), gates.data(), slot.data(), start.data(),
                z.data(), rows.data(), y.data(), dy.data(), dgates.data(), dx.data(), dw13.data(), dw2.data()};
    if (sigma_forward(&layer) || sigma_backward(&layer)) return 2;

    Doubles y_(T * D), dgates_(N), dx_(T * D), dw13_(E * 2 * F * D), dw2_(E * D * F);
    for (int64_t i = 0; i < N; i++) {
        const int64_t e = ids[i], t = i / K;
        Doubles gate(F), up(F), h(F), dh(F);
        for (int64_t f = 0; f < F; f++)
            for (int64_t d = 0; d < D; d++) {
                gate[f] += double(w13[(e * 2 * F + f) * D + d]) * x[t * D + d];
                up[f] += double(w13[(e * 2 * F + F + f) * D + d]) * x[t * D + d];
            }
        for (int64_t f = 0; f < F; f++) h[f] = gate[f] / (1 + std::exp(-gate[f])) * up[f];
        for (int64_t d = 0; d < D; d++)
            for (int64_t f = 0; f < F; f++) {
                const int64_t at = (e * D + d) * F + f;
                y_[t * D + d] += gates[i] * w2[at] * h[f], dh[f] += double(w2[at]) * dy[t * D + d];
                dw2_[at] += double(gates[i]) * dy[t * D + d] * h[f];
            }
        dgates_[i] = std::inner_product(dh.begin(), dh.end(), h.begin(), 0.0);
        for (int64_t f = 0; f < F; f++) {
            const double sigmoid = 1 / (1 + std::exp(-gate[f])), silu = gate[f] * sigmoid;
            const double dz[] = {gates[i] * dh[f] * up[f] * (sigmoid + silu * (1 - sigmoid)), gates[i] * dh[f] * silu};
            for (int64_t half = 0; half < 2; half++)
                for (int64_t d = 0; d < D; d++) {
                    const int64_t at = (e * 2 * F + half * F + f) * D + d;
                    dx_[t * D + d] += dz[half] * w13[at], dw13_[at] += dz[half] * x[t * D + d];
                }
        }
    }
    const bool all[] = {close("y", y, y_), close("dx", dx, dx_), close("dgates", dgates, dgates_),
                        close("dw13", dw13, dw13_), close("dw2", dw2, dw2_)};
    return std::accumulate(all, all + 5, 0) == 5 ? 0 : 1;
}
