// The memory passes of the fused engine on a CPU; fused.py holds their maths and calls them.
//
// A layer's neurons over all time-steps are one matrix x[t][n][c], channels innermost, n = (b, h, w).
// S is the type in memory (float, double, bfloat16), A the type of all arithmetic (float or double).
// Work is cut into items that do not depend on the number of threads, and partial sums are added in
// the order of the items: results are the same for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 {
    uint16_t bits;
};

static inline float load(float x) { return x; }
static inline double load(double x) { return x; }
static inline float load(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
static inline void store(float &to, float x) { to = x; }
static inline void store(double &to, double x) { to = x; }
static inline void store(bf16 &to, float x) {  // round to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    to.bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// The shape of a layer and the constants of its neurons, filled in by fused.py (struct of int64 and double).
struct Layer {
    int64_t T, B, H, W, C;
    int64_t pool;        // side of the pooling window, 1 for none
    int64_t fire_first;  // 0: integrate_first
    double leak, threshold, alpha;
};

// Neurons worked on together: the pixels of one pooling window, or up to 4 neighbours where there is no pool.
struct Window {
    int64_t rows[256];  // n of each pixel
    int64_t size, out;  // out: n of the pooled pixel, -1 for the odd edge that the pool drops
};

static const int64_t RUN = 4;

static int64_t count_windows(const Layer &l) {
    if (l.pool == 1) return (l.B * l.H * l.W + RUN - 1) / RUN;
    return l.B * ((l.H + l.pool - 1) / l.pool) * ((l.W + l.pool - 1) / l.pool);
}

static void fill_window(const Layer &l, int64_t i, Window &w) {
    w.size = 0;
    if (l.pool == 1) {
        int64_t end = std::min((i + 1) * RUN, l.B * l.H * l.W);
        for (int64_t n = i * RUN; n < end; n++) w.rows[w.size++] = n;
        w.out = i * RUN;
        return;
    }
    int64_t across = (l.W + l.pool - 1) / l.pool, down = (l.H + l.pool - 1) / l.pool;
    int64_t j = i % across, k = i / across % down, b = i / (across * down);
    for (int64_t y = k * l.pool; y < std::min((k + 1) * l.pool, l.H); y++)
        for (int64_t x = j * l.pool; x < std::min((j + 1) * l.pool, l.W); x++) w.rows[w.size++] = (b * l.H + y) * l.W + x;
    bool whole = w.size == l.pool * l.pool;
    w.out = whole ? (b * (l.H / l.pool) + k) * (l.W / l.pool) + j : -1;
}

static int64_t windows_per_item(int64_t windows) { return std::max<int64_t>(1, (windows + 127) / 128); }

// Channels worked on at a time: few enough that what a window keeps for all T stays in cache.
static int64_t channel_block(int64_t T, int64_t size) {
    int64_t block = 64;
    while (block > 16 && T * size * block > 32768) block /= 2;
    return block;
}

template <class S, class A>
static void lif_forward(const Layer &l, const S *x, const A *scale, const A *shift, A *membrane, int keep_membrane,
                        S *spikes, uint8_t *packed) {
    const int64_t N = l.B * l.H * l.W, C = l.C;
    const int64_t outs = l.pool == 1 ? N : l.B * (l.H / l.pool) * (l.W / l.pool);
    const int64_t windows = count_windows(l), step = windows_per_item(windows), items = (windows + step - 1) / step;
    const A leak = l.leak, threshold = l.threshold, share = A(1) / A(l.pool * l.pool);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        Window w;
        std::vector<A> u(l.pool * l.pool * 64 + RUN * 64), sum(64);
        for (int64_t i = item * step; i < std::min(windows, (item + 1) * step); i++) {
            fill_window(l, i, w);
            for (int64_t c0 = 0; c0 < C; c0 += 64) {
                const int64_t block = std::min<int64_t>(64, C - c0);
                for (int64_t p = 0; p < w.size; p++)
                    for (int64_t c = 0; c < block; c++) u[p * 64 + c] = keep_membrane ? membrane[w.rows[p] * C + c0 + c] : A(0);
                for (int64_t t = 0; t < l.T; t++) {
                    const A *a = scale + t * C + c0, *b = shift + t * C + c0;
                    std::fill(sum.begin(), sum.end(), A(0));
                    for (int64_t p = 0; p < w.size; p++) {
                        const S *in = x + (t * N + w.rows[p]) * C + c0;
                        A *m = &u[p * 64], *total = sum.data();
                        S *out = spikes + (t * outs + w.out + p) * C + c0;
                        uint8_t *bits = packed ? packed + (t * outs + w.out + p) * C + c0 : nullptr;
                        if (l.pool == 1) {
                            if (l.fire_first) {
#pragma omp simd
                                for (int64_t c = 0; c < block; c++) {
                                    A fired = m[c] > threshold ? A(1) : A(0);
                                    m[c] = leak * m[c] + (a[c] * load(in[c]) + b[c]) - threshold * fired;
                                    total[c] = fired;
                                }
                            } else {
#pragma omp simd
                                for (int64_t c = 0; c < block; c++) {
                                    A v = leak * m[c] + (a[c] * load(in[c]) + b[c]);
                                    A fired = v > threshold ? A(1) : A(0);
                                    m[c] = v - threshold * fired;
                                    total[c] = fired;
                                }
                            }
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) store(out[c], total[c]);
                            if (bits)
#pragma omp simd
                                for (int64_t c = 0; c < block; c++) bits[c] = uint8_t(int(total[c]));
                        } else if (l.fire_first) {
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                A fired = m[c] > threshold ? A(1) : A(0);
                                m[c] = leak * m[c] + (a[c] * load(in[c]) + b[c]) - threshold * fired;
                                total[c] += fired;
                            }
                        } else {
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                A v = leak * m[c] + (a[c] * load(in[c]) + b[c]);
                                A fired = v > threshold ? A(1) : A(0);
                                m[c] = v - threshold * fired;
                                total[c] += fired;
                            }
                        }
                    }
                    if (l.pool > 1 && w.out >= 0) {
                        S *out = spikes + (t * outs + w.out) * C + c0;
#pragma omp simd
                        for (int64_t c = 0; c < block; c++) store(out[c], sum[c] * share);
                        if (packed) {
                            uint8_t *bits = packed + (t * outs + w.out) * C + c0;
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) bits[c] = uint8_t(int(sum[c]));
                        }
                    }
                }
                if (membrane)
                    for (int64_t p = 0; p < w.size; p++)
                        for (int64_t c = 0; c < block; c++) membrane[w.rows[p] * C + c0 + c] = u[p * 64 + c];
            }
        }
    }
}

template <class S, class A>
static void lif_backward(const Layer &l, const S *x, const A *scale, const A *shift, const A *centre, const A *membrane,
                         const S *grad, A *carry, int keep_carry, S *delta, double *sum_delta, double *sum_product) {
    const int64_t N = l.B * l.H * l.W, C = l.C, T = l.T;
    const int64_t outs = l.pool == 1 ? N : l.B * (l.H / l.pool) * (l.W / l.pool);
    const int64_t windows = count_windows(l), step = windows_per_item(windows), items = (windows + step - 1) / step;
    const A leak = l.leak, threshold = l.threshold, share = A(1) / A(l.pool * l.pool);
    const A inverse = A(1) / threshold, slope = A(l.alpha) * share * inverse;
    const int64_t widest = channel_block(T, std::max(l.pool * l.pool, RUN));
    std::vector<A> partial(sum_delta ? items * 2 * T * C : 0, A(0));
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        Window w;
        const int64_t most = std::max(l.pool * l.pool, RUN) * widest;
        std::vector<A> fire(T * most), shifted(T * most), u(most), d(most), zero(widest, A(0)), g(widest);
        A *first = sum_delta ? &partial[item * 2 * T * C] : nullptr, *second = first ? first + T * C : nullptr;
        for (int64_t i = item * step; i < std::min(windows, (item + 1) * step); i++) {
            fill_window(l, i, w);
            for (int64_t c0 = 0; c0 < C; c0 += widest) {
                const int64_t block = std::min(widest, C - c0);
                for (int64_t p = 0; p < w.size; p++)
                    for (int64_t c = 0; c < block; c++) {
                        int64_t n = w.rows[p] * C + c0 + c;
                        u[p * widest + c] = membrane ? membrane[n] : A(0);
                        d[p * widest + c] = keep_carry ? carry[n] : A(0);
                    }
                // Forward again: h(u) at each step, the membrane where the neuron decides.
                for (int64_t t = 0; t < T; t++) {
                    const A *a = scale + t * C + c0, *b = shift + t * C + c0, *mid = centre + t * C + c0;
                    for (int64_t p = 0; p < w.size; p++) {
                        const S *in = x + (t * N + w.rows[p]) * C + c0;
                        A *m = &u[p * widest], *f = &fire[t * most + p * widest], *z = &shifted[t * most + p * widest];
                        if (l.fire_first) {
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                A xv = load(in[c]), v = m[c];
                                A h = A(1) - std::abs(v * inverse - A(1));
                                f[c] = slope * (h > A(0) ? h : A(0));
                                z[c] = xv - mid[c];
                                m[c] = leak * v + (a[c] * xv + b[c]) - (v > threshold ? threshold : A(0));
                            }
                        } else {
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                A xv = load(in[c]), v = leak * m[c] + (a[c] * xv + b[c]);
                                A h = A(1) - std::abs(v * inverse - A(1));
                                f[c] = slope * (h > A(0) ? h : A(0));
                                z[c] = xv - mid[c];
                                m[c] = v - (v > threshold ? threshold : A(0));
                            }
                        }
                    }
                }
                // Reverse scan.
                for (int64_t t = T - 1; t >= 0; t--) {
                    for (int64_t p = 0; p < w.size; p++) {
                        const A *gs = zero.data();
                        if (w.out >= 0 && (p == 0 || l.pool == 1)) {
                            const S *from = grad + (t * outs + w.out + (l.pool == 1 ? p : 0)) * C + c0;
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) g[c] = load(from[c]);
                        }
                        if (w.out >= 0) gs = g.data();
                        A *e = &d[p * widest];
                        const A *f = &fire[t * most + p * widest], *z = &shifted[t * most + p * widest];
                        S *out = delta + (t * N + w.rows[p]) * C + c0;
                        A *s1 = first ? first + t * C + c0 : nullptr, *s2 = second ? second + t * C + c0 : nullptr;
                        if (l.fire_first) {
                            if (s1)
#pragma omp simd
                                for (int64_t c = 0; c < block; c++) {
                                    s1[c] += e[c];
                                    s2[c] += e[c] * z[c];
                                }
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                store(out[c], e[c]);
                                e[c] = leak * e[c] + gs[c] * f[c];
                            }
                        } else {
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                e[c] = leak * e[c] + gs[c] * f[c];
                                store(out[c], e[c]);
                            }
                            if (s1)
#pragma omp simd
                                for (int64_t c = 0; c < block; c++) {
                                    s1[c] += e[c];
                                    s2[c] += e[c] * z[c];
                                }
                        }
                    }
                }
                if (carry)
                    for (int64_t p = 0; p < w.size; p++)
                        for (int64_t c = 0; c < block; c++) carry[w.rows[p] * C + c0 + c] = d[p * widest + c];
            }
        }
    }
    if (!sum_delta) return;
#pragma omp parallel for
    for (int64_t k = 0; k < T * C; k++) {
        double s1 = 0, s2 = 0;
        for (int64_t item = 0; item < items; item++) {
            s1 += partial[item * 2 * T * C + k];
            s2 += partial[(item * 2 + 1) * T * C + k];
        }
        sum_delta[k] = s1;
        sum_product[k] = s2;
    }
}

// Mean and (biased) variance over n. Sums are taken of x - x[t][0][c], which keeps them from cancelling.
template <class S, class A>
static void statistics(int64_t T, int64_t N, int64_t C, const S *x, double *mean, double *variance) {
    const int64_t rows = std::max<int64_t>(32, 16384 / C), pieces = (N + rows - 1) / rows;
    std::vector<A> partial(T * pieces * 2 * C, A(0));
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int64_t t = 0; t < T; t++)
        for (int64_t piece = 0; piece < pieces; piece++) {
            A *s1 = &partial[(t * pieces + piece) * 2 * C], *s2 = s1 + C;
            const S *pivot = x + t * N * C;
            for (int64_t c0 = 0; c0 < C; c0 += 64) {
                const int64_t block = std::min<int64_t>(64, C - c0);
                A p[64], a[64] = {}, b[64] = {};
                for (int64_t c = 0; c < block; c++) p[c] = load(pivot[c0 + c]);
                for (int64_t n = piece * rows; n < std::min(N, (piece + 1) * rows); n++) {
                    const S *in = pivot + n * C + c0;
#pragma omp simd
                    for (int64_t c = 0; c < block; c++) {
                        A v = load(in[c]) - p[c];
                        a[c] += v;
                        b[c] += v * v;
                    }
                }
                for (int64_t c = 0; c < block; c++) s1[c0 + c] = a[c], s2[c0 + c] = b[c];
            }
        }
#pragma omp parallel for
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < C; c++) {
            double s1 = 0, s2 = 0;
            for (int64_t piece = 0; piece < pieces; piece++) {
                s1 += partial[(t * pieces + piece) * 2 * C + c];
                s2 += partial[((t * pieces + piece) * 2 + 1) * C + c];
            }
            mean[t * C + c] = double(load(x[t * N * C + c])) + s1 / N;
            variance[t * C + c] = std::max(0.0, s2 / N - s1 / N * (s1 / N));
        }
}

// delta <- k1 * delta + k2 * x + k3, coefficients per (t, c).
template <class S, class A>
static void affine(int64_t T, int64_t N, int64_t C, S *delta, const S *x, const A *k1, const A *k2, const A *k3) {
    const int64_t rows = std::max<int64_t>(1, 8192 / C), pieces = (N + rows - 1) / rows;
#pragma omp parallel for collapse(2)
    for (int64_t t = 0; t < T; t++)
        for (int64_t piece = 0; piece < pieces; piece++)
            for (int64_t n = piece * rows; n < std::min(N, (piece + 1) * rows); n++) {
                const A *a = k1 + t * C, *b = k2 + t * C, *k = k3 + t * C;
                S *d = delta + (t * N + n) * C;
                const S *in = x + (t * N + n) * C;
#pragma omp simd
                for (int64_t c = 0; c < C; c++) store(d[c], a[c] * load(d[c]) + (b[c] * load(in[c]) + k[c]));
            }
}

template <class S, class A>
static void unpack(int64_t count, const uint8_t *packed, S *spikes, A share) {
    const int64_t piece = 65536;
#pragma omp parallel for
    for (int64_t i = 0; i < (count + piece - 1) / piece; i++) {
        const int64_t end = std::min(count, (i + 1) * piece);
#pragma omp simd
        for (int64_t k = i * piece; k < end; k++) store(spikes[k], A(int(packed[k])) * share);
    }
}

#define EXPORT(NAME, S, A)                                                                                              \
    extern "C" void lif_forward_##NAME(const Layer *l, const S *x, const A *scale, const A *shift, A *membrane,         \
                                       int keep, S *spikes, uint8_t *packed) {                                          \
        lif_forward<S, A>(*l, x, scale, shift, membrane, keep, spikes, packed);                                         \
    }                                                                                                                   \
    extern "C" void lif_backward_##NAME(const Layer *l, const S *x, const A *scale, const A *shift, const A *centre,    \
                                        const A *membrane, const S *grad, A *carry, int keep, S *delta, double *s1,     \
                                        double *s2) {                                                                   \
        lif_backward<S, A>(*l, x, scale, shift, centre, membrane, grad, carry, keep, delta, s1, s2);                    \
    }                                                                                                                   \
    extern "C" void statistics_##NAME(int64_t T, int64_t N, int64_t C, const S *x, double *mean, double *variance) {    \
        statistics<S, A>(T, N, C, x, mean, variance);                                                                   \
    }                                                                                                                   \
    extern "C" void affine_##NAME(int64_t T, int64_t N, int64_t C, S *delta, const S *x, const A *k1, const A *k2,      \
                                  const A *k3) {                                                                        \
        affine<S, A>(T, N, C, delta, x, k1, k2, k3);                                                                    \
    }                                                                                                                   \
    extern "C" void unpack_##NAME(int64_t count, const uint8_t *packed, S *spikes, A share) {                           \
        unpack<S, A>(count, packed, spikes, share);                                                                     \
    }

EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bf16, float)
