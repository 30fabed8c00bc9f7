// One decoding step of a LLaMA on a CPU: a few tokens in for each of B rows, logits out. cpu_step.py compiles and calls
// it.
//
// Every weight is read once and used for all tokens of the step; while they are few, reading the weights takes all the
// time. A step is one parallel region: a thread computes some rows of every matrix, and waits for the others only
// before it reads their results. W is the type of weights, keys and values; everything else is computed in A.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <new>
#include <thread>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_grouped.h"
#include "cpu_vectors.h"

using std::int64_t;

// The same fields in the same order stand in cpu_step.py. Missing biases and norms are null.
struct Layer {
    Weight q, k, v, o, gate, up, down;
    const void *input_norm, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *mlp_norm;
};

struct Model {
    int64_t dtype, n_layers, dim, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, window, slots;
    double norm_eps;
    const Layer *layers;
    const void *embedding, *norm;
    Weight head;
    const float *cos, *sin;  // (slots, head_dim / 2)
};

// An array that begins at a cache line: a vector that lies across two lines takes twice as long to load.
template <class A> class Buffer {
    A *start;

  public:
    explicit Buffer(int64_t n) : start((A *)::operator new(n * sizeof(A), std::align_val_t(64))) {}
    ~Buffer() { ::operator delete(start, std::align_val_t(64)); }
    Buffer(const Buffer &) = delete;
    A *data() { return start; }
    A &operator[](int64_t i) { return start[i]; }
};

// w . x for n numbers: whole vectors first, then the rest.
template <class W, class A> A dot(const W *w, const A *x, int64_t n) {
    V<A> total = {};
    int64_t i = 0;
    for (; i + LANES<A> <= n; i += LANES<A>) total = add_product(total, load(w + i), load(x + i));
    A out = sum<A>(total);
    for (; i < n; i++) out = add_product(out, value(w[i]), x[i]);
    return out;
}

// A register of bfloat16 weights is taken apart into two vectors of floats, each with a sum of its own.
template <class W> constexpr int PARTS = sizeof(W) == 2 ? 2 : 1;

template <class A> inline void load_parts(const A *p, V<A> *parts) { parts[0] = load(p); }
inline void load_parts(const bf16 *p, V<float> *parts) {  // those of even number, then those of odd number
    const auto both = *(const typename Vector<uint32_t, LANES<float>>::anywhere *)p;
    parts[0] = (V<float>)(both << 16), parts[1] = (V<float>)(both & 0xffff0000);
}

// x (batch, n) for products with bfloat16: in each register's worth of weights those of even number, then those of odd
// number; what is left at the end stays as it is.
inline void part(const float *x, int64_t batch, int64_t n, float *out) {
    constexpr int HALF = LANES<float>;
    for (int64_t b = 0; b < batch; b++, x += n, out += n) {
        int64_t i = 0;
        for (; i + 2 * HALF <= n; i += 2 * HALF)
            for (int j = 0; j < HALF; j++) out[i + j] = x[i + 2 * j], out[i + HALF + j] = x[i + 2 * j + 1];
        std::copy(x + i, x + n, out + i);
    }
}

// out[b][r] = w[r] . x[b] for R rows of w and N rows of x of n numbers each: a weight is loaded once for all N.
template <int R, int N, class W, class A>
inline void tile(const W *w, const A *x, int64_t n, A *out, int64_t out_stride) {
    constexpr int P = PARTS<W>;
    V<A> total[N][R][P] = {};  // all in registers: SUMS bounds their number
    int64_t i = 0;
    for (; i + P * LANES<A> <= n; i += P * LANES<A>) {
        V<A> weights[R][P];
        for (int r = 0; r < R; r++) load_parts(w + r * n + i, weights[r]);
        for (int b = 0; b < N; b++)
            for (int p = 0; p < P; p++) {
                const V<A> column = load(x + b * n + i + p * LANES<A>);
                for (int r = 0; r < R; r++) total[b][r][p] = add_product(total[b][r][p], weights[r][p], column);
            }
    }
#pragma GCC unroll 8
    for (int b = 0; b < N; b++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            for (int p = 1; p < P; p++) total[b][r][0] += total[b][r][p];
            out[b * out_stride + r] = sum<A>(total[b][r][0]);
        }
    // the numbers after the last whole vector
    for (; i < n; i++)
        for (int b = 0; b < N; b++)
            for (int r = 0; r < R; r++) {
                A &here = out[b * out_stride + r];
                here = add_product(here, value(w[r * n + i]), x[b * n + i]);
            }
}

// The same for N rows of x and any number of rows of w. From memory one row after another is read about twice as fast as
// several at once (the processor fetches ahead in one place); once in the nearest cache, several are faster.
template <int N, class W, class A>
inline void tiles(const W *w, const A *x, int64_t rows, int64_t n, A *out, int64_t out_stride, bool in_cache) {
    constexpr int R = std::max(1, std::min(8, SUMS / (N * PARTS<W>)));
    int64_t row = 0;
    for (; in_cache && row + R <= rows; row += R) tile<R, N>(w + row * n, x, n, out + row, out_stride);
    for (; row < rows; row++) tile<1, N>(w + row * n, x, n, out + row, out_stride);
}

// The rows of one thread, of `rows` in all: first <= row < last.
struct Share {
    int64_t first, last;
    Share(int64_t rows, int me, int threads) {
        int64_t size = (rows + threads - 1) / threads;
        first = std::min(rows, me * size), last = std::min(rows, first + size);
    }
};

// out[b][r] = w[r] . x[b] for the rows r of w (rows, n) in `mine`, and all rows b of x (batch, n); out (batch, rows).
template <class W, class A>
__attribute__((noinline)) void matmul(const W *w, const A *x, int64_t rows, int64_t n, int64_t batch, Share mine,
                                      A *out) {
    for (int64_t row = mine.first; row < mine.last; row += 8) {  // few enough to stay in the nearest cache for all of x
        int64_t count = std::min<int64_t>(8, mine.last - row), b = 0;
        // the number of rows of x in a tile is a constant of the compiler: eights, then what remains as 4, 2 and 1
        auto run = [&](auto width) {
            for (; b + width() <= batch; b += width())
                tiles<width()>(w + row * n, x + b * n, count, n, out + b * rows + row, rows, b > 0);
        };
        if constexpr (8 * PARTS<W> <= SUMS) run(std::integral_constant<int, 8>());
        run(std::integral_constant<int, 4>());
        run(std::integral_constant<int, 2>());
        run(std::integral_constant<int, 1>());
    }
}

// out = x / sqrt(mean(x^2) + eps) * weight, n numbers each; out may be x.
template <class W, class A> void rms_norm(const A *x, const W *weight, int64_t n, A eps, A *out) {
    A scale = 1 / std::sqrt(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * value(weight[i]);
}

// Norm (null: none) and rotation of one head x (head_dim) into out: the pairs are (i, i + half), as in rope/base.py.
template <class W, class A>
void place(const Model &m, const A *x, const void *norm, int64_t position, A *out) {
    int64_t half = m.head_dim / 2;
    const float *cos = m.cos + position * half, *sin = m.sin + position * half;
    if (norm) rms_norm(x, (const W *)norm, m.head_dim, (A)m.norm_eps, out);
    for (int64_t i = 0; i < half; i++) {
        A a = norm ? out[i] : x[i], b = norm ? out[i + half] : x[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

// Attention of one query head q (D) over `count` slots of keys, values (count, D): out = softmax(q k / sqrt(D)) v.
template <class W, class A>
void attend(const A *q, const W *keys, const W *values, int64_t count, int64_t D, A *scores, A *out) {
    // the largest score is subtracted before exp, so that nothing overflows
    A largest = -INFINITY, total = 0, scale = 1 / std::sqrt((A)D);
    for (int64_t j = 0; j < count; j++) {
        scores[j] = dot(keys + j * D, q, D) * scale;
        largest = std::max(largest, scores[j]);
    }
    for (int64_t j = 0; j < count; j++) scores[j] = exponential(scores[j] - largest);
    for (int64_t j = 0; j < count; j++) total += scores[j];
    // weighted sum of the values, one vector of dimensions at a time
    int64_t d = 0;
    for (; d + LANES<A> <= D; d += LANES<A>) {
        V<A> sums = {};
        for (int64_t j = 0; j < count; j++) sums = add_product(sums, load(values + j * D + d), all<A>(scores[j]));
        store(out + d, sums / total);
    }
    for (; d < D; d++) {
        A one = 0;
        for (int64_t j = 0; j < count; j++) one = add_product(one, value(values[j * D + d]), scores[j]);
        out[d] = one / total;
    }
}

// The tokens of a step: those of row b are starts[b]..starts[b+1]-1, the first of them at position past[b].
struct Input {
    int64_t batch;
    const int64_t *starts, *past, *tokens;
    int64_t last;  // number of tokens at the end of each row whose logits are returned
    const int64_t *places;  // row b is in row places[b] of the cache's `rows`
    int64_t rows;
};

// A meeting point of n threads. Waits are some microseconds, about forty a token: to sleep and be woken takes longer, so a
// thread first looks again and again, then lets others run, and sleeps only where it waits for long. OpenMP's own barrier
// sleeps at once with OMP_WAIT_POLICY=PASSIVE (int4 was 2.5 times slower), and else holds up other busy programs.
class Barrier {
    std::atomic<int> arrived{0}, round{0};

  public:
    void wait(int n) {
        const int mine = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == n) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; round.load(std::memory_order_acquire) == mine; i++) {
            if (i < 5000) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else if (i < 6000) {
                std::this_thread::yield();
            } else {
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        }
    }
};

template <class W, class A>
void step(const Model &m, const Input &in, W *keys, W *values, A *logits, int threads) {
    const int64_t dim = m.dim, D = m.head_dim, H = m.n_heads, K = m.n_kv_heads, F = m.hidden_dim, L = m.slots;
    const int64_t B = in.batch, T = in.starts[B];
    const A eps = m.norm_eps;
    // The residual stream x, and the results that threads exchange; T rows each.
    Buffer<A> x(T * dim), q(T * H * D), k(T * K * D), v(T * K * D), attention(T * H * D), gate(T * F), up(T * F);
    Buffer<A> change(T * dim);
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int me = omp_get_thread_num(), n = omp_get_num_threads();
#else
        const int me = 0, n = 1;
#endif
        Buffer<A> normed(T * dim), head(D), scores(L);  // each thread computes all norms itself: cheaper than waiting
        Buffer<A> parted(PARTS<W> == 2 ? T * std::max({dim, H * D, F}) : 0);
        int64_t most = 0;  // bytes that any product needs
        for (int64_t i = 0; i < m.n_layers; i++)
            for (const Weight *w : {&m.layers[i].q, &m.layers[i].k, &m.layers[i].v, &m.layers[i].o, &m.layers[i].gate,
                                    &m.layers[i].up, &m.layers[i].down})
                most = std::max(most, grouped::Rounded::bytes(*w, T));
        Buffer<char> integers(std::max(most, grouped::Rounded::bytes(m.head, T)));
        grouped::Rounded rounded(integers.data());  // of what goes into the next product, if that is quantized
        auto norm = [&](const void *weight) {
            rounded.forget();
            for (int64_t t = 0; t < T; t++)
                rms_norm(&x[t * dim], (const W *)weight, dim, eps, &normed[t * dim]);
        };
        // this thread's columns of out (batch, rows) = in (batch, columns) wᵀ, quantized or not
        auto multiply = [&](const Weight &w, const A *in, int64_t rows, int64_t columns, int64_t batch, A *out) {
            const Share mine(rows, me, n);
            if constexpr (std::is_same_v<A, float>) {
                if (w.bits) {
                    rounded.round(in, batch, columns, w);
                    return grouped::matmul(w, rounded, batch, mine.first, mine.last, rows, out);
                }
            }
            if constexpr (PARTS<W> == 2) {
                part(in, batch, columns, parted.data());
                in = parted.data();
            }
            matmul((const W *)w.data, in, rows, columns, batch, mine, out);
        };
        // this thread's columns of out (T, rows) = normed (T, dim) wᵀ + bias
        auto project = [&](const Weight &w, const void *bias, int64_t rows, A *out) {
            multiply(w, normed.data(), rows, dim, T, out);
            const Share mine(rows, me, n);
            for (int64_t t = 0; bias && t < T; t++)
                for (int64_t r = mine.first; r < mine.last; r++) out[t * rows + r] += value(((const W *)bias)[r]);
        };
        // x (T, dim) += in (T, columns) wᵀ, for this thread's columns of x
        auto add = [&](const Weight &w, const A *in, int64_t columns) {
            rounded.forget();
            multiply(w, in, dim, columns, T, change.data());
            const Share mine(dim, me, n);
            for (int64_t t = 0; t < T; t++)
                for (int64_t r = mine.first; r < mine.last; r++) x[t * dim + r] += change[t * dim + r];
        };
        // embeddings
        for (int64_t i = me; i < T * dim; i += n)
            x[i] = value(((const W *)m.embedding)[in.tokens[i / dim] * dim + i % dim]);
        barrier.wait(n);
        for (int64_t i = 0; i < m.n_layers; i++) {
            const Layer &layer = m.layers[i];
            norm(layer.input_norm);
            project(layer.q, layer.q_bias, H * D, q.data());
            project(layer.k, layer.k_bias, K * D, k.data());
            project(layer.v, layer.v_bias, K * D, v.data());
            barrier.wait(n);
            for (int64_t item = me; item < B * K; item += n) {  // a key head and the query heads that read it
                const int64_t b = item / K, kv = item % K;
                // the slots of this layer, row and head: (slots, D)
                const int64_t at = ((i * in.rows + in.places[b]) * K + kv) * L * D;
                W *row = keys + at, *value_row = values + at;
                for (int64_t t = in.starts[b]; t < in.starts[b + 1]; t++) {
                    const int64_t position = in.past[b] + t - in.starts[b];
                    // a window hides the slots before `first`
                    const int64_t first = std::max<int64_t>(0, position + 1 - m.window);
                    place<W>(m, &k[(t * K + kv) * D], layer.k_norm, position, head.data());
                    for (int64_t d = 0; d < D; d++) {
                        round_to(row[position * D + d], head[d]);
                        round_to(value_row[position * D + d], v[(t * K + kv) * D + d]);
                    }
                    for (int64_t h = t * H + kv * (H / K); h < t * H + (kv + 1) * (H / K); h++) {
                        place<W>(m, &q[h * D], layer.q_norm, position, head.data());
                        attend(head.data(), row + first * D, value_row + first * D, position + 1 - first, D,
                               scores.data(), &attention[h * D]);
                    }
                }
            }
            barrier.wait(n);
            add(layer.o, attention.data(), H * D);
            barrier.wait(n);
            norm(layer.mlp_norm);
            project(layer.gate, nullptr, F, gate.data());
            project(layer.up, nullptr, F, up.data());
            // SwiGLU, on the columns that this thread has just computed: no barrier
            Share mine(F, me, n);
            for (int64_t t = 0; t < T; t++)
                for (int64_t f = t * F + mine.first; f < t * F + mine.last; f++)
                    up[f] *= gate[f] / (1 + exponential(-gate[f]));
            barrier.wait(n);
            add(layer.down, up.data(), F);
            barrier.wait(n);
        }
        rounded.forget();
        // norm of the tokens that logits are returned for, gathered into the first rows of `normed`
        for (int64_t r = 0; r < B * in.last; r++) {
            int64_t t = in.starts[r / in.last + 1] - in.last + r % in.last;
            rms_norm(&x[t * dim], (const W *)m.norm, dim, eps, &normed[r * dim]);
        }
        multiply(m.head, normed.data(), m.vocab_size, dim, B * in.last, logits);
    }
}

// starts (batch + 1) begins with 0, past (batch), tokens (starts[batch]), places (batch) all different; keys, values
// (n_layers, rows, n_kv_heads, slots, head_dim), whose slots at the tokens' positions are written; logits (batch, last,
// vocab_size), float, or double for a model in double; last is at most the number of tokens of any row.
extern "C" void decode_step(const Model *m, int64_t batch, const int64_t *starts, const int64_t *past,
                            const int64_t *tokens, const int64_t *places, int64_t rows, int64_t last, void *keys,
                            void *values, void *logits, int threads) {
    const Input in = {batch, starts, past, tokens, last, places, rows};
    if (m->dtype == 0)
        step(*m, in, (float *)keys, (float *)values, (float *)logits, threads);
    else if (m->dtype == 1)
        step(*m, in, (bf16 *)keys, (bf16 *)values, (float *)logits, threads);
    else
        step(*m, in, (double *)keys, (double *)values, (double *)logits, threads);
}
