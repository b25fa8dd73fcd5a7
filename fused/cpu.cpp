// The memory passes of the fused engine on a CPU; engine.py holds their maths and calls them.
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

// Ask for memory that is about to be read (or written): the passes jump far between time-steps, and the
// processor's own prefetching stops at the end of a page.
template <class S> static inline void prefetch(const S *from, int64_t count) {
    for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(S))) __builtin_prefetch(from + i);
}
template <class S> static inline void prefetch_to_write(S *to, int64_t count) {
    for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(S))) __builtin_prefetch(to + i, 1);
}

// The shape of a layer and the constants of its neurons, filled in by engine.py (struct of int64 and double).
struct Layer {
    int64_t T, B, H, W, C;
    int64_t pool;        // side of the pooling window, 1 for none
    int64_t fire_first;  // 0: integrate_first
    int64_t hard_reset;  // 0: soft; belongs to integrate_first
    double leak, threshold, alpha;
};

// Neurons worked on together: `down` rows of `across` pixels of one image, whole pooling windows as far
// as there are any, and `width` channels at a time. Large enough to read memory in runs of a page, small
// enough that what the backward pass keeps of it for all T stays in the L2 cache. Without pooling all
// the pixels of all images are one long row.
struct Strips {
    int64_t rows, columns, side;           // of the layer, side: of the pooling window
    int64_t bands, per_band, across, width;  // rows of strips, strips in each, pixels in each, channels at a time
    int64_t out_rows, out_columns, most_items;

    Strips(const Layer &l, int64_t steps) : side(l.pool) {
        rows = side == 1 ? 1 : l.H;
        columns = side == 1 ? l.B * l.H * l.W : l.W;
        out_rows = rows / side, out_columns = columns / side;
        const int64_t budget = std::max<int64_t>(16 * side * side, std::min<int64_t>(2048, 131072 / steps));
        width = std::min(l.C, std::max<int64_t>(16, budget / (side * side) / 16 * 16));
        across = std::min((columns + side - 1) / side, std::max<int64_t>(1, budget / (side * side * width))) * side;
        most_items = std::clamp<int64_t>((int64_t(1) << 21) / (steps * l.C), 8, 128);  // each has sums of its own
        bands = (side == 1 ? 1 : l.B) * ((rows + side - 1) / side);
        per_band = (columns + across - 1) / across;
    }
    int64_t count() const { return bands * per_band; }
    int64_t outputs() const { return side == 1 ? columns : bands / ((rows + side - 1) / side) * out_rows * out_columns; }
    int64_t per_item() const { return (count() + most_items - 1) / most_items; }
    int64_t items() const { return (count() + per_item() - 1) / per_item(); }
    int64_t pixels() const { return side * across; }
};

struct Strip {
    int64_t first, row_step, down, across, out;  // n of the first pixel, of the next row; out: of its window, or -1

    Strip(const Strips &s, int64_t i) {
        const int64_t bands = (s.rows + s.side - 1) / s.side, band = i / s.per_band, j = i % s.per_band * s.across;
        const int64_t image = band / bands, row = band % bands;
        first = (image * s.rows + row * s.side) * s.columns + j;
        row_step = s.columns;
        down = std::min(s.side, s.rows - row * s.side);
        across = std::min(s.across, s.columns - j);
        out = row < s.out_rows ? (image * s.out_rows + row) * s.out_columns + j / s.side : -1;
        windows = out < 0 ? 0 : std::min((across + s.side - 1) / s.side, s.out_columns - j / s.side);
    }
    int64_t windows;  // whole ones: the odd edge that a pool drops has none
};

template <class S, class A, bool FIRE_FIRST, bool HARD>
static void lif_forward(const Layer &l, const S *x, const A *scale, const A *shift, A *membrane, int start, S *spikes,
                        uint8_t *packed) {
    const Strips strips(l, 1);
    const int64_t N = l.B * l.H * l.W, C = l.C, outs = strips.outputs(), width = strips.width;
    const A leak = l.leak, threshold = l.threshold, share = A(1) / A(l.pool * l.pool);
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < strips.items(); item++) {
        std::vector<A> state(strips.pixels() * width), sums((strips.across / l.pool + 1) * width);
        A *edge = &sums[strips.across / l.pool * width];
        const int64_t last = std::min(strips.count(), (item + 1) * strips.per_item());
        for (int64_t i = item * strips.per_item(); i < last; i++)
            for (int64_t c0 = 0; c0 < C; c0 += width) {
                const Strip s(strips, i);
                const int64_t block = std::min(width, C - c0);
                auto at = [&](int64_t y, int64_t j) { return (s.first + y * s.row_step + j) * C + c0; };
                for (int64_t y = 0; y < s.down; y++)
                    for (int64_t j = 0; j < s.across; j++) {
                        A *u = &state[(y * strips.across + j) * width];
                        for (int64_t c = 0; c < block; c++) u[c] = start ? membrane[at(y, j) + c] : A(0);
                    }
                for (int64_t t = 0; t < l.T; t++) {
                    const A *a = scale + t * C + c0, *b = shift + t * C + c0;
                    if (l.pool > 1) std::fill(sums.begin(), sums.end(), A(0));
                    for (int64_t y = 0; y < s.down; y++)
                        for (int64_t j = 0; j < s.across; j++) {
                            const S *in = x + t * N * C + at(y, j);
                            A *u = &state[(y * strips.across + j) * width];
                            A *sum = j / l.pool < s.windows ? &sums[j / l.pool * width] : edge;
                            if (t + 1 < l.T) prefetch(in + N * C, block);
                            if (l.pool == 1)
#pragma omp simd
                                for (int64_t c = 0; c < block; c++) sum[c] = A(0);
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                const A current = a[c] * load(in[c]) + b[c], before = u[c];
                                const A v = leak * before + current;
                                const A fired = (FIRE_FIRST ? before : v) > threshold ? A(1) : A(0);
                                u[c] = HARD ? v * (A(1) - fired) : v - threshold * fired;
                                sum[c] += fired;
                            }
                        }
                    for (int64_t w = 0; w < s.windows; w++) {
                        const A *sum = &sums[w * width];
                        const int64_t to = (t * outs + s.out + w) * C + c0;
                        S *out = spikes + to;
#pragma omp simd
                        for (int64_t c = 0; c < block; c++) store(out[c], sum[c] * share);
                        if (packed) {
                            uint8_t *bytes = packed + to;
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) bytes[c] = uint8_t(int(sum[c]));
                        }
                    }
                }
                if (membrane)
                    for (int64_t y = 0; y < s.down; y++)
                        for (int64_t j = 0; j < s.across; j++) {
                            const A *u = &state[(y * strips.across + j) * width];
                            for (int64_t c = 0; c < block; c++) membrane[at(y, j) + c] = u[c];
                        }
            }
    }
}

// sums: of `count` kinds, [T][C] each: of delta, of delta (x - centre), of delta and the membrane before the step.
template <class S, class A, bool FIRE_FIRST, bool HARD>
static void lif_backward(const Layer &l, const S *x, const A *scale, const A *shift, const A *centre, const A *membrane,
                         const S *grad, A *carry, int start, S *delta, int64_t count, double *sums) {
    const Strips strips(l, l.T);
    const int64_t N = l.B * l.H * l.W, C = l.C, T = l.T, outs = strips.outputs(), width = strips.width;
    const int64_t items = strips.items(), size = strips.pixels() * width;
    const A leak = l.leak, threshold = l.threshold, inverse = A(1) / threshold;
    const A slope = A(l.alpha) * inverse / A(l.pool * l.pool);
    const int64_t kinds = std::max<int64_t>(2, count);
    std::vector<A> partial(items * kinds * T * C, A(0));
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        // u: where each neuron decides, at every step; kept: x, read from memory once
        std::vector<A> decisions(T * size), state(size), backward(size), grads((strips.across / l.pool + 1) * width, A(0));
        std::vector<S> kept(T * size);
        const A *none = &grads[strips.across / l.pool * width];
        A *first = &partial[item * kinds * T * C], *second = first + T * C, *third = second + T * C;
        const int64_t last = std::min(strips.count(), (item + 1) * strips.per_item());
        for (int64_t i = item * strips.per_item(); i < last; i++)
            for (int64_t c0 = 0; c0 < C; c0 += width) {
                const Strip s(strips, i);
                const int64_t block = std::min(width, C - c0);
                auto at = [&](int64_t y, int64_t j) { return (s.first + y * s.row_step + j) * C + c0; };
                for (int64_t y = 0; y < s.down; y++)
                    for (int64_t j = 0; j < s.across; j++) {
                        A *u = &state[(y * strips.across + j) * width], *d = &backward[(y * strips.across + j) * width];
                        for (int64_t c = 0; c < block; c++) {
                            u[c] = membrane ? membrane[at(y, j) + c] : A(0);
                            d[c] = start ? carry[at(y, j) + c] : A(0);
                        }
                    }
                for (int64_t t = 0; t < T; t++) {  // the membranes once more
                    const A *a = scale + t * C + c0, *b = shift + t * C + c0;
                    for (int64_t y = 0; y < s.down; y++)
                        for (int64_t j = 0; j < s.across; j++) {
                            const int64_t p = (y * strips.across + j) * width;
                            const S *in = x + t * N * C + at(y, j);
                            A *u = &state[p], *decides = &decisions[t * size + p];
                            S *keep = &kept[t * size + p];
                            if (t + 1 < T) prefetch(in + N * C, block);
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                const A before = u[c], v = leak * before + (a[c] * load(in[c]) + b[c]);
                                const A decision = FIRE_FIRST ? before : v, fired = decision > threshold ? A(1) : A(0);
                                keep[c] = in[c];
                                decides[c] = decision;
                                u[c] = HARD ? v * (A(1) - fired) : v - threshold * fired;
                            }
                        }
                }
                for (int64_t t = T - 1; t >= 0; t--) {  // the reverse scan
                    const A *mid = centre + t * C + c0;
                    A *s1 = first + t * C + c0, *s2 = second + t * C + c0;
                    for (int64_t w = 0; w < s.windows; w++) {
                        const S *from = grad + (t * outs + s.out + w) * C + c0;
                        A *g = &grads[w * width];
                        if (t > 0) prefetch(from - outs * C, block);
#pragma omp simd
                        for (int64_t c = 0; c < block; c++) g[c] = slope * load(from[c]);
                    }
                    for (int64_t y = 0; y < s.down; y++)
                        for (int64_t j = 0; j < s.across; j++) {
                            const int64_t p = (y * strips.across + j) * width;
                            const A *g = j / l.pool < s.windows ? &grads[j / l.pool * width] : none;
                            const A *decides = &decisions[t * size + p];
                            const S *keep = &kept[t * size + p];
                            S *out = delta + t * N * C + at(y, j);
                            A *d = &backward[p];
                            if (t > 0) prefetch_to_write(out - N * C, block);
                            if (kinds > 2 && FIRE_FIRST)
                                for (int64_t c = 0; c < block; c++) third[t * C + c0 + c] += d[c] * decides[c];
#pragma omp simd
                            for (int64_t c = 0; c < block; c++) {
                                const A h = A(1) - std::abs(decides[c] * inverse - A(1));
                                const A left = HARD && decides[c] > threshold ? A(0) : leak;
                                const A back = left * d[c] + g[c] * (h < A(0) ? A(0) : h);  // keeps a NaN
                                const A here = FIRE_FIRST ? d[c] : back;
                                d[c] = back;
                                store(out[c], here);
                                s1[c] += here;
                                s2[c] += here * (load(keep[c]) - mid[c]);
                            }
                            if (kinds > 2 && !FIRE_FIRST && (t > 0 || membrane))
                                for (int64_t c = 0; c < block; c++) {
                                    const A v = t > 0 ? decisions[(t - 1) * size + p + c] : membrane[at(y, j) + c];
                                    const A lost = t == 0 || !(v > threshold) ? A(0) : HARD ? v : threshold;
                                    third[t * C + c0 + c] += d[c] * (v - lost);
                                }
                        }
                }
                if (carry)
                    for (int64_t y = 0; y < s.down; y++)
                        for (int64_t j = 0; j < s.across; j++) {
                            const A *d = &backward[(y * strips.across + j) * width];
                            for (int64_t c = 0; c < block; c++) carry[at(y, j) + c] = d[c];
                        }
            }
    }
#pragma omp parallel for
    for (int64_t k = 0; k < count * T * C; k++) {
        sums[k] = 0;
        for (int64_t item = 0; item < items; item++) sums[k] += partial[item * kinds * T * C + k];
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
            const double found = s2 / N - s1 / N * (s1 / N);
            variance[t * C + c] = found < 0 ? 0 : found;  // keeps a NaN
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
                                       int start, S *spikes, uint8_t *packed) {                                          \
        auto pass = l->fire_first   ? lif_forward<S, A, true, false>                                                    \
                    : l->hard_reset ? lif_forward<S, A, false, true>                                                    \
                                    : lif_forward<S, A, false, false>;                                                  \
        pass(*l, x, scale, shift, membrane, start, spikes, packed);                                                      \
    }                                                                                                                   \
    extern "C" void lif_backward_##NAME(const Layer *l, const S *x, const A *scale, const A *shift, const A *centre,    \
                                        const A *membrane, const S *grad, A *carry, int start, S *delta, int64_t count, \
                                        double *sums) {                                                                 \
        auto pass = l->fire_first   ? lif_backward<S, A, true, false>                                                   \
                    : l->hard_reset ? lif_backward<S, A, false, true>                                                   \
                                    : lif_backward<S, A, false, false>;                                                 \
        pass(*l, x, scale, shift, centre, membrane, grad, carry, start, delta, count, sums);                            \
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
