// Products with weights of 2, 4 or 8 bits (decoding/cpu_weights.py), read where they lie. Included by cpu_step.cpp.
//
// weight ~ scale * (code - zero), with a scale and a zero point for each group of inputs of a row; or scale * level[code].
// x is rounded to 16-bit integers, so that all products are of integers, which are exact: 16 bits of x are far more than
// the 2 to 8 of a weight. Where a method rounds x to 8 bits itself, it is rounded so. A block is a part of a group: its x
// share a scale.
//
// A vector of codes is taken apart into planes, by a shift and a mask: plane p has the p-th code of every 16 bits. The
// integers of x lie in that order, so that nothing else is moved. A place of 32 bits sums products of one block only,
// sixteen at most, which fit.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_vectors.h"

// The same fields in the same order stand in cpu_weights.py.
struct Weight {
    const void *data;  // (rows, inputs) numbers; or (rows, groups * group * bits / 8) bytes, codes from the lowest bit on
    const float *scales;    // (rows, groups)
    const uint8_t *zeros;   // (rows, groups), where has_zeros(bits)
    const int16_t *levels;  // (16), for LEVELS
    int64_t bits;           // 2, 4 or 8, SIGNED or LEVELS, or 0 for a weight that is not quantized
    int64_t group, groups;  // group: a multiple of 32
    int64_t inputs;         // how x is rounded: BLOCKS_16, TOKEN_8 or TOKEN_8_BITNET
};  // groups * group may exceed the inputs: the codes beyond them count for nothing

namespace grouped {

constexpr int SIGNED = 9;  // 8 bits with a sign
constexpr int LEVELS = 5;  // 4 bits that name a level, the first of a pair in the high half of a byte
constexpr int BLOCKS_16 = 0, TOKEN_8 = 1, TOKEN_8_BITNET = 2;
constexpr int BLOCK = 32;  // inputs

constexpr int SHORTS = BYTES / 2, WIDE = LANES<float>;
typedef Vector<int16_t, SHORTS>::type shorts;
typedef Vector<uint16_t, SHORTS>::type ushorts;
typedef Vector<int32_t, WIDE>::type ints;
typedef V<float> floats;

// Whether codes have zero points; if not, they have signs, or levels have.
constexpr bool has_zeros(int bits) { return bits != SIGNED && bits != LEVELS; }
constexpr int planes_of(int bits) { return bits == SIGNED ? 2 : bits == LEVELS ? 4 : 16 / bits; }

template <class T> inline T read(const void *p) {
    T out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

// 0, 1, 2, ..
inline ints counting() {
    ints out;
    for (int i = 0; i < WIDE; i++) out[i] = i;
    return out;
}

// sum + a b, where neighbours are added: twice as many products as sums.
inline ints multiply_add(ints sum, shorts a, shorts b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < SHORTS; i++) sum[i / 2] += (int32_t)a[i] * b[i];
    return sum;
#endif
}

// numbers[index], each index below WIDE.
inline floats pick(floats numbers, ints index) {
#if defined(__AVX512BW__)
    return (floats)_mm512_permutexvar_ps((__m512i)index, (__m512)numbers);
#elif defined(__AVX2__)
    return (floats)_mm256_permutevar8x32_ps((__m256)numbers, (__m256i)index);
#else
    floats out;
    for (int i = 0; i < WIDE; i++) out[i] = numbers[index[i]];
    return out;
#endif
}

// The first `count` of the numbers at p, and zeros; what lies behind them is not read.
inline floats load_some(const float *p, int64_t count) {
    if (count >= WIDE) return load(p);
#if defined(__AVX512BW__)
    return (floats)_mm512_maskz_loadu_ps((1u << count) - 1, p);
#else
    floats out = {};
    for (int64_t i = 0; i < count; i++) out[i] = p[i];
    return out;
#endif
}
inline floats load_some(const uint8_t *p, int64_t count) {
#if defined(__AVX512BW__)
    const __m128i bytes = _mm_maskz_loadu_epi8(count >= WIDE ? 0xffff : (1u << count) - 1, p);
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#else
    typename Vector<uint8_t, WIDE>::type out = {};
    if (count >= WIDE) out = read<decltype(out)>(p);
    else
        for (int64_t i = 0; i < count; i++) out[i] = p[i];
    return __builtin_convertvector(out, floats);
#endif
}
inline ushorts load_codes(const uint8_t *p, int64_t bytes) {  // an even number
    if (bytes >= BYTES) return read<ushorts>(p);
#if defined(__AVX512BW__)
    return (ushorts)_mm512_maskz_loadu_epi16((1u << bytes / 2) - 1, p);
#else
    ushorts out = {};
    std::memcpy(&out, p, bytes);
    return out;
#endif
}

// level[code] of codes in 16 bits each, of which the lower four count.
inline shorts look_up(ushorts codes, const int16_t *levels) {
#if defined(__AVX512BW__)
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)levels));
    return (shorts)_mm512_permutexvar_epi16((__m512i)codes, table);
#elif defined(__AVX2__)  // low and high bytes of the levels apart
    const __m256i both = _mm256_loadu_si256((const __m256i *)levels), mask = _mm256_set1_epi16(255);
    const __m256i packed = _mm256_packus_epi16(_mm256_and_si256(both, mask), _mm256_srli_epi16(both, 8));
    const __m256i lows = _mm256_permute4x64_epi64(packed, 0x88), highs = _mm256_permute4x64_epi64(packed, 0xdd);
    const __m256i low = (__m256i)((codes & 15) | (uint16_t)0x8000), high = (__m256i)((codes & 15) << 8 | 0x80);
    return (shorts)_mm256_or_si256(_mm256_shuffle_epi8(lows, low), _mm256_shuffle_epi8(highs, high));
#else
    shorts out;
    for (int i = 0; i < SHORTS; i++) out[i] = levels[codes[i] & 15];
    return out;
#endif
}

// Plane P of a vector of codes.
template <int BITS, int P> inline shorts plane(ushorts codes, const int16_t *levels) {
    if constexpr (BITS == SIGNED)
        return P ? (shorts)codes >> 8 : (shorts)(codes << 8) >> 8;
    else if constexpr (BITS == LEVELS)
        return look_up(codes >> 4 * (P ^ 1), levels);
    else if constexpr (P + 1 == planes_of(BITS))
        return (shorts)(codes >> BITS * P);
    else
        return (shorts)(codes >> BITS * P & (uint16_t)((1 << BITS) - 1));
}

// x (batch, inputs) as integers, padded with zeros: x ~ scale * integer, with a scale for each block.
class Rounded {
  public:
    int planes = 0;                 // of the codes that x is multiplied with
    int64_t way = 0, blocks = 0;    // how x was rounded; blocks in a row
    int16_t *values = nullptr;      // (batch, padded), in the order of the planes
    int64_t padded = 0, stride = 0; // inputs and blocks, rounded up to whole vectors
    float *scales = nullptr;        // (batch, stride), 0 beyond the blocks
    float *sums = nullptr;          // (batch, stride): of the integers of a block, times their scale
    int32_t *group_of = nullptr;    // (stride): of each block; counts on beyond the blocks

    // `memory`: Rounded::bytes, at the beginning of a cache line.
    explicit Rounded(void *memory) : values((int16_t *)memory) {}

    static int64_t bytes(const Weight &w, int64_t batch) {
        const int64_t n = w.groups * w.group + 16 * SHORTS;
        return batch * (2 * n + 8 * (n / BLOCK + WIDE)) + 4 * (n / BLOCK + WIDE);
    }

    // Forget x, which changes.
    void forget() { blocks = 0; }

    // Round x for the products with w, unless it is so already.
    void round(const float *x, int64_t batch, int64_t inputs, const Weight &w) {
        const int64_t count = w.groups * w.group / BLOCK;
        if (blocks != count || planes != planes_of(w.bits) || way != w.inputs) {
            blocks = count, planes = planes_of(w.bits), way = w.inputs, group = 0;
            const int64_t step = planes * SHORTS;
            padded = (blocks * BLOCK + step - 1) / step * step, stride = (blocks + WIDE - 1) / WIDE * WIDE;
            scales = (float *)(values + batch * padded), sums = scales + batch * stride;
            group_of = (int32_t *)(sums + batch * stride);
            auto run = planes == 2 ? &Rounded::fill<2> : planes == 4 ? &Rounded::fill<4> : &Rounded::fill<8>;
            (this->*run)(x, batch, inputs);
        }
        if (group != w.group) {
            group = w.group;
            for (int64_t i = 0; i < stride; i++) group_of[i] = i * BLOCK / group;
        }
    }

  private:
    int64_t group = 0;  // inputs in a group of `group_of`

    template <int PLANES> void fill(const float *x, int64_t batch, int64_t inputs) {
        constexpr int64_t STEP = PLANES * SHORTS;
        std::fill_n(scales, 2 * batch * stride, 0.0f);
        for (int64_t b = 0; b < batch; b++) {
            const float of_token = way == BLOCKS_16 ? 0 : scale_of_token(x + b * inputs, inputs);
            std::fill_n(values + (b + 1) * padded - STEP, STEP, 0);  // the end stays so
            for (int64_t i = 0; i * BLOCK < inputs; i++) {
                const int64_t at = i * BLOCK, here = inputs - at;
                const float *from = x + b * inputs + at;
                float filled[BLOCK] = {};
                if (here < BLOCK) from = std::copy_n(from, here, filled) - here;
                int32_t whole[BLOCK], sum = 0;
                const float scale = way == BLOCKS_16 ? round_block(from, whole) : round_to_8_bits(from, of_token, whole);
                for (int j = 0; j < BLOCK; j++) sum += whole[j];  // below 2^24: exact
                scales[b * stride + i] = scale, sums[b * stride + i] = scale * sum;
                int16_t *to = values + b * padded + at / STEP * STEP + at % STEP / PLANES;
                for (int p = 0; p < PLANES; p++)
                    for (int j = 0; j < BLOCK / PLANES; j++) to[p * SHORTS + j] = whole[PLANES * j + p];
            }
        }
    }

    // What the integers of a token are multiplied by (TOKEN_8, quant/int8.py) or divided by (TOKEN_8_BITNET, bitnet.py).
    float scale_of_token(const float *x, int64_t inputs) {
        int32_t largest_bits = 0;
        for (int64_t i = 0; i < inputs; i++) largest_bits = std::max(largest_bits, read<int32_t>(x + i) & 0x7fffffff);
        const float largest = read<float>(&largest_bits);
        if (largest_bits >= 0x7f800000) return NAN;
        if (way == TOKEN_8_BITNET) return 127 / std::max(largest, 1e-5f);
        return largest > 0 ? largest / 127.5f : 1;
    }

    // 8 bits of a token; the roundings are those of the layer in PyTorch. Return the scale.
    float round_to_8_bits(const float *from, float scale, int32_t *to) {
        const bool divided = way == TOKEN_8;
        for (int j = 0; j < BLOCK; j++) {
            const float moved = (divided ? from[j] / scale : from[j] * scale) + 12582912.0f;
            to[j] = std::min(127, std::max(-128, read<int32_t>(&moved) - 0x4b400000));
        }
        return !std::isfinite(scale) ? NAN : divided ? scale : 1 / scale;
    }

    // 16 bits, with a scale for this block, which is returned.
    float round_block(const float *from, int32_t *to) {
        int32_t largest_bits = 0;  // numbers above 0 are ordered as their bits are
        for (int j = 0; j < BLOCK; j++) largest_bits = std::max(largest_bits, read<int32_t>(from + j) & 0x7fffffff);
        const float largest = read<float>(&largest_bits);
        const bool finite = largest_bits < 0x7f800000;
        const float by = finite && largest > 1e-30f ? 32767 / largest : 0;  // else 32767 / largest may be infinite
        for (int j = 0; j < BLOCK; j++) {
            // adding 1.5 * 2^23 leaves the nearest integer in the lowest bits
            const float moved = from[j] * by + 12582912.0f;
            to[j] = read<int32_t>(&moved) - 0x4b400000;
        }
        // where x holds something that is not a number, the products are not a number, either
        return finite ? largest / 32767 : NAN;
    }
};

// out[i] = the sum of the numbers in vectors[i], of which there are `count`, eight at most; added in the order of sum().
inline void sums(const floats *vectors, int64_t count, float *out) {
#if defined(__AVX512BW__)
    if (count == 8) {  // halves of two vectors beside each other, then of four, then of eight
        __m512 two[4], four[2], last = {};
        for (int i = 0; i < 4; i++) {
            const __m512 a = (__m512)vectors[2 * i], b = (__m512)vectors[2 * i + 1];
            two[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
        }
        for (int i = 0; i < 2; i++) {
            const __m512 a = two[2 * i], b = two[2 * i + 1];
            four[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
        }
        last = _mm512_shuffle_ps(four[0], four[1], 0x44) + _mm512_shuffle_ps(four[0], four[1], 0xee);
        last += _mm512_permute_ps(last, 0xb1);  // pairs: those of 0, 4, 1, 5, 2, 6, 3, 7
        const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(places, last)));
        return;
    }
#endif
    for (int64_t i = 0; i < count; i++) out[i] = sum<float>(vectors[i]);
}

// Where the compiler calls a function of the loop below instead of putting it in, sums go through memory: 1.8 times as long.
#define INLINE __attribute__((always_inline))

// f(0), f(1), .. f(N - 1), each as a constant of the compiler.
template <int N, int I = 0, class F> INLINE inline void each(F f) {
    if constexpr (I < N) {
        f(std::integral_constant<int, I>());
        each<N, I + 1>(f);
    }
}

// w[row] . x[b] for N rows of x from `first` on: the sum of the numbers in out[8 b]. The order of the sums does not depend
// on N.
template <int BITS, int N>
INLINE inline void tile(const Weight &w, const Rounded &x, int64_t row, int64_t first, floats *out) {
    constexpr int PLANES = planes_of(BITS), STEP = PLANES * SHORTS, CHUNKS = WIDE * BLOCK / STEP;
    const int64_t bytes = 2 * x.blocks * BLOCK / PLANES;  // of a row
    const uint8_t *codes = (const uint8_t *)w.data + row * bytes, *const end = codes + bytes;
    const int16_t *values = x.values + first * x.padded;
    floats total[N] = {};
    for (int64_t from = 0; from < x.blocks; from += WIDE) {
        // a scale and a zero point for each of WIDE blocks
        const int64_t group = x.group_of[from], groups = w.groups - group, at = row * w.groups + group;
        floats scale = load_some(w.scales + at, groups), zero = {};
        if constexpr (has_zeros(BITS)) zero = load_some(w.zeros + at, groups);
        if (w.group != BLOCK) {
            const ints places = load(x.group_of + from) - (int32_t)group;
            scale = pick(scale, places), zero = pick(zero, places);
        }
        floats factors[N];
        for (int b = 0; b < N; b++) {
            const int64_t of_x = (first + b) * x.stride + from;
            factors[b] = scale * load(x.scales + of_x);
            if constexpr (has_zeros(BITS)) total[b] -= scale * zero * load(x.sums + of_x);
        }
        // the codes of these blocks, a vector at a time; a constant number of times, so that `block` is a constant
        const int64_t left = end - codes;
        each<CHUNKS>([&](auto c) INLINE {
            if (c() * BYTES >= left) return;
            const ushorts here = load_codes(codes + c() * BYTES, left - c() * BYTES);
            ints sums[N] = {};
            each<PLANES>([&](auto p) INLINE {
                const shorts weights = plane<BITS, p()>(here, w.levels);
                for (int b = 0; b < N; b++)
                    sums[b] = multiply_add(sums[b], weights, load(values + b * x.padded + c() * STEP + p() * SHORTS));
            });
            const ints block = (counting() * (2 * PLANES) + c() * STEP) >> 5;  // of BLOCK inputs, for each place
            for (int b = 0; b < N; b++)
                total[b] = add_product(total[b], __builtin_convertvector(sums[b], floats), pick(factors[b], block));
        });
        codes += CHUNKS * BYTES, values += CHUNKS * STEP;
    }
    for (int b = 0; b < N; b++) out[8 * b] = total[b];
}

// out[b][r] = w[r] . x[b] for rows first <= r < last, and all rows b of x (batch); out (batch, rows).
template <int BITS>
__attribute__((noinline)) void rows_of(const Weight &weight, const Rounded &rounded, int64_t batch, int64_t first,
                                       int64_t last, int64_t rows, float *out) {
    const Weight w = weight;  // copies: the compiler knows that nothing written to `out` changes them
    const Rounded x = rounded;
    floats totals[4 * 8];  // of up to four rows of x, and eight of w
    for (int64_t from = first; from < last; from += 8) {  // few enough to stay in the nearest cache for all of x
        const int64_t count = std::min<int64_t>(8, last - from);
        int64_t b = 0;
        auto run = [&](auto width) INLINE {
            for (; b + width() <= batch; b += width()) {
                // row after row: two at once are slower from memory
                for (int64_t r = 0; r < count; r++) tile<BITS, width()>(w, x, from + r, b, totals + r);
                for (int i = 0; i < width(); i++) sums(totals + 8 * i, count, out + (b + i) * rows + from);
            }
        };
        run(std::integral_constant<int, 4>());
        run(std::integral_constant<int, 1>());
    }
}

// The same for any width of the codes.
inline void matmul(const Weight &w, const Rounded &x, int64_t batch, int64_t first, int64_t last, int64_t rows,
                   float *out) {
    auto run = w.bits == 2        ? rows_of<2>
               : w.bits == 4      ? rows_of<4>
               : w.bits == SIGNED ? rows_of<SIGNED>
               : w.bits == LEVELS ? rows_of<LEVELS>
                                  : rows_of<8>;
    run(w, x, batch, first, last, rows, out);
}

}  // namespace grouped
