// Products with weights of 2, 4 or 8 bits (decoding/cpu_weights.py), read where they lie. Included by cpu_step.cpp.
//
// weight ~ scale * (code - zero), with a scale and a zero point for each group of inputs of a row; or scale * level[code].
// x is rounded to 16-bit integers, so that all products are of integers, which are exact: 16 bits of x are far more than
// the 2 to 8 of a weight. Where a method rounds x to 8 bits itself, it is rounded so. A block is a part of a group: its
// sum fits in 32 bits, and its x share a scale.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The same fields in the same order stand in cpu_weights.py.
struct Weight {
    const void *data;  // (rows, inputs) numbers; or (rows, groups * group * bits / 8) bytes, codes from the lowest bit on
    const float *scales;    // (rows, groups)
    const uint8_t *zeros;   // (rows, groups); null: 0
    const int16_t *levels;  // (16), for LEVELS
    int64_t bits;           // 2, 4 or 8, SIGNED or LEVELS, or 0 for a weight that is not quantized
    int64_t group, groups;  // group: a multiple of 32
    int64_t inputs;         // how x is rounded: BLOCKS_16, TOKEN_8 or TOKEN_8_BITNET
};  // groups * group may exceed the inputs: the codes beyond them count for nothing

namespace grouped {

constexpr int SIGNED = 9;  // 8 bits with a sign
constexpr int LEVELS = 5;  // 4 bits that name a level, the first of a pair in the high half of a byte
constexpr int BLOCKS_16 = 0, TOKEN_8 = 1, TOKEN_8_BITNET = 2;
constexpr int CHUNK = 32;  // inputs whose codes are unpacked at once: the 16 of even number, then the 16 of odd number

typedef int16_t short16 __attribute__((vector_size(32)));
typedef uint16_t ushort16 __attribute__((vector_size(32)));
typedef int32_t int8 __attribute__((vector_size(32)));
typedef float float8 __attribute__((vector_size(32)));

template <class T> inline T read(const void *p) {
    T out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

// sum + a b, where neighbours are added: 16 products in 8 sums.
inline int8 multiply_add(int8 sum, short16 a, short16 b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (int8)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVXVNNI__)
    return (int8)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return sum + (int8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < 16; i++) sum[i / 2] += (int32_t)a[i] * b[i];
    return sum;
#endif
}

inline float total(float8 v) {
    float out[8];
    std::memcpy(out, &v, sizeof v);
    return ((out[0] + out[4]) + (out[2] + out[6])) + ((out[1] + out[5]) + (out[3] + out[7]));
}

constexpr int bytes_of(int bits) { return bits == SIGNED ? 32 : bits == LEVELS ? 16 : 4 * bits; }  // of 32 codes

// level[code] of 16 codes, a byte each.
typedef uint8_t byte16 __attribute__((vector_size(16)));
inline short16 look_up(byte16 codes, const int16_t *levels) {
#if defined(__AVX2__)  // low and high bytes of the levels apart
    const __m256i both = _mm256_loadu_si256((const __m256i *)levels), mask = _mm256_set1_epi16(255);
    const __m256i low = _mm256_and_si256(both, mask), high = _mm256_srli_epi16(both, 8);
    const __m128i lows = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    const __m128i highs = _mm_packus_epi16(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    const __m128i a = _mm_shuffle_epi8(lows, (__m128i)codes), b = _mm_shuffle_epi8(highs, (__m128i)codes);
    return (short16)_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
#else
    short16 out;
    for (int i = 0; i < 16; i++) out[i] = levels[codes[i]];
    return out;
#endif
}

// The codes of 32 inputs, from bytes_of(BITS) bytes.
template <int BITS> inline void unpack(const uint8_t *codes, const int16_t *levels, short16 &even, short16 &odd) {
    if constexpr (BITS == 2) {
        typedef uint8_t byte8 __attribute__((vector_size(8)));
        typedef uint32_t quad8 __attribute__((vector_size(32)));
#if defined(__AVX2__)  // one instruction, which the compiler does not find
        quad8 quads = (quad8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
#else
        quad8 quads = __builtin_convertvector(read<byte8>(codes), quad8);
#endif
        quads |= quads << 12;  // a byte in each half of 16 bits: as it is, and 4 bits lower
        even = (short16)(quads & 0x30003), odd = (short16)(quads >> 2 & 0x30003);
    } else if constexpr (BITS == LEVELS) {
        const byte16 pairs = read<byte16>(codes);
        even = look_up(pairs >> 4, levels), odd = look_up(pairs & 15, levels);
    } else if constexpr (BITS == SIGNED) {
        const short16 pairs = read<short16>(codes);
        even = (short16)((ushort16)pairs << 8) >> 8, odd = pairs >> 8;
    } else if constexpr (BITS == 4) {
#if defined(__AVX2__)  // one instruction, which the compiler does not find
        ushort16 pairs = (ushort16)_mm256_cvtepu8_epi16((__m128i)read<byte16>(codes));
#else
        ushort16 pairs = __builtin_convertvector(read<byte16>(codes), ushort16);
#endif
        even = (short16)(pairs & 15), odd = (short16)(pairs >> 4);
    } else {
        ushort16 pairs = read<ushort16>(codes);
        even = (short16)(pairs & 255), odd = (short16)(pairs >> 8);
    }
}

inline int64_t block_of(int64_t group) { return group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32; }

// x (batch, inputs) as integers, padded with zeros: x ~ scale * integer, with a scale for each block.
class Rounded {
  public:
    int64_t block = 0, blocks = 0;  // inputs in a block; blocks in a row
    int64_t way = 0;                // how x was rounded
    int16_t *values = nullptr;      // (batch, blocks * block), in the order of `unpack`
    int64_t stride = 0;             // blocks, rounded up to whole vectors
    float *scales = nullptr;        // (batch, stride), 0 beyond the blocks
    float *sums = nullptr;          // (batch, stride): of the integers of a block

    // `memory`: Rounded::bytes, at the beginning of a cache line.
    explicit Rounded(void *memory) : values((int16_t *)memory) {}

    static int64_t bytes(const Weight &w, int64_t batch) {
        const int64_t n = w.groups * w.group;
        return batch * (2 * n + 8 * (n / CHUNK + 8));
    }

    // Forget x, which changes.
    void forget() { blocks = 0; }

    // Round x for weights in groups of `group`, unless it is so already.
    void round(const float *x, int64_t batch, int64_t inputs, const Weight &w) {
        const int64_t size = block_of(w.group), count = w.groups * w.group / size;
        if (blocks == count && block == size && way == w.inputs) return;
        block = size, blocks = count, way = w.inputs, stride = (count + 7) / 8 * 8;
        scales = (float *)(values + batch * blocks * block), sums = scales + batch * stride;
        std::fill_n(scales, 2 * batch * stride, 0.0f);
        for (int64_t b = 0; b < batch; b++) {
            const float scale = way == BLOCKS_16 ? 0 : scale_of_token(x + b * inputs, inputs);
            for (int64_t i = 0; i < blocks; i++) {
                const int64_t here = std::clamp<int64_t>(inputs - i * block, 0, block);
                const float *from = x + b * inputs + i * block;
                int16_t *to = values + (b * blocks + i) * block;
                float padded[128] = {};
                if (here < block) from = std::copy(from, from + here, padded) - here;
                if (way == BLOCKS_16)
                    round_block(from, to, scales[b * stride + i], sums[b * stride + i]);
                else
                    round_to_8_bits(from, to, scale, scales[b * stride + i], sums[b * stride + i]);
            }
        }
    }

  private:
    // What the integers of a token are multiplied by (TOKEN_8, quant/int8.py) or divided by (TOKEN_8_BITNET, bitnet.py).
    float scale_of_token(const float *x, int64_t inputs) {
        int32_t largest_bits = 0;
        for (int64_t i = 0; i < inputs; i++) largest_bits = std::max(largest_bits, read<int32_t>(x + i) & 0x7fffffff);
        const float largest = read<float>(&largest_bits);
        if (largest_bits >= 0x7f800000) return NAN;
        if (way == TOKEN_8_BITNET) return 127 / std::max(largest, 1e-5f);
        return largest > 0 ? largest / 127.5f : 1;
    }

    // 8 bits of a token; the roundings are those of the layer in PyTorch.
    void round_to_8_bits(const float *from, int16_t *to, float scale, float &out, float &of_integers) {
        const bool divided = way == TOKEN_8, finite = std::isfinite(scale);
        int32_t sum = 0;
        for (int64_t i = 0; i < block; i += CHUNK, to += CHUNK) {
            int32_t whole[CHUNK];
            for (int64_t j = 0; j < CHUNK; j++) {
                const float moved = (divided ? from[i + j] / scale : from[i + j] * scale) + 12582912.0f;
                whole[j] = std::min(127, std::max(-128, read<int32_t>(&moved) - 0x4b400000));
            }
            for (int64_t j = 0; j < CHUNK; j++) sum += whole[j];
            for (int64_t j = 0; j < 16; j++) to[j] = whole[2 * j], to[16 + j] = whole[2 * j + 1];
        }
        of_integers = sum, out = !finite ? NAN : divided ? scale : 1 / scale;
    }

    void round_block(const float *from, int16_t *to, float &scale, float &of_integers) {
        int32_t largest_bits = 0;  // numbers above 0 are ordered as their bits are
        for (int64_t i = 0; i < block; i++) largest_bits = std::max(largest_bits, read<int32_t>(from + i) & 0x7fffffff);
        const float largest = read<float>(&largest_bits);
        const bool finite = largest_bits < 0x7f800000;
        // where x holds something that is not a number, the products are not a number, either
        scale = finite ? largest / 32767 : NAN;
        const float by = finite && largest > 1e-30f ? 32767 / largest : 0;  // else 32767 / largest may be infinite
        const short16 ones = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        int8 sum = {};
        for (int64_t i = 0; i < block; i += CHUNK, to += CHUNK) {
            int32_t rounded[CHUNK];
            // adding 1.5 * 2^23 leaves the nearest integer in the lowest bits
            for (int64_t j = 0; j < CHUNK; j++) {
                const float moved = from[i + j] * by + 12582912.0f;
                rounded[j] = read<int32_t>(&moved) - 0x4b400000;
            }
            for (int64_t j = 0; j < 16; j++) to[j] = rounded[2 * j], to[16 + j] = rounded[2 * j + 1];
            sum = multiply_add(multiply_add(sum, read<short16>(to), ones), read<short16>(to + 16), ones);
        }
        of_integers = total(__builtin_convertvector(sum, float8));  // below 2^23: exact
    }
};

// out[b][row] = w[row] . x[b] for N rows of x from `first` on. The order of the sums does not depend on N.
template <int BITS, int BLOCK, int N>
inline void dot(const Weight &w, const Rounded &x, int64_t row, int64_t first, float *out, int64_t out_stride) {
    const int64_t n = BLOCK * x.blocks, per_group = w.group / BLOCK;
    const uint8_t *codes = (const uint8_t *)w.data + row * n / CHUNK * bytes_of(BITS);
    const float *scales = w.scales + row * w.groups;
    const uint8_t *zeros = w.zeros ? w.zeros + row * w.groups : nullptr;
    float8 result[N] = {}, of_zeros[N] = {};
    for (int64_t from = 0; from < x.blocks; from += 8) {
        const int64_t count = std::min<int64_t>(8, x.blocks - from);
        // scale and zero point of eight blocks
        float8 scale = {}, zero = {};
        if (count == 8 && per_group == 1) {
            typedef uint8_t byte8 __attribute__((vector_size(8)));
            scale = read<float8>(scales + from);
            if (zeros) zero = __builtin_convertvector(read<byte8>(zeros + from), float8);
        } else {
            for (int64_t i = 0; i < count; i++) {
                const int64_t g = (from + i) / per_group;
                scale[i] = scales[g], zero[i] = zeros ? zeros[g] : 0;
            }
        }
        float factors[N][8];
        for (int b = 0; b < N; b++) {
            const int64_t at = (first + b) * x.stride + from;
            const float8 factor = scale * read<float8>(x.scales + at);
            of_zeros[b] += factor * zero * read<float8>(x.sums + at);
            std::memcpy(factors[b], &factor, sizeof factor);
        }
        const int16_t *at = x.values + first * n + from * BLOCK;
        for (int64_t i = 0; i < count; i++) {
            int8 sums[N] = {};
            for (int64_t j = 0; j < BLOCK; j += CHUNK, codes += bytes_of(BITS), at += CHUNK) {
                short16 even, odd;
                unpack<BITS>(codes, w.levels, even, odd);
                __builtin_prefetch(codes + 2048);
                for (int b = 0; b < N; b++) {
                    sums[b] = multiply_add(sums[b], even, read<short16>(at + b * n));
                    sums[b] = multiply_add(sums[b], odd, read<short16>(at + b * n + 16));
                }
            }
            for (int b = 0; b < N; b++) result[b] += __builtin_convertvector(sums[b], float8) * factors[b][i];
        }
    }
    for (int b = 0; b < N; b++) out[(first + b) * out_stride + row] = total(result[b] - of_zeros[b]);
}

// out[b][r] = w[r] . x[b] for rows first <= r < last, and all rows b of x (batch); out (batch, rows).
template <int BITS, int BLOCK>
__attribute__((noinline)) void rows_of(const Weight &w, const Rounded &x, int64_t batch, int64_t first, int64_t last,
                                       int64_t rows, float *out) {
    for (int64_t from = first; from < last; from += 8) {  // few enough to stay in the nearest cache for all of x
        const int64_t to = std::min(last, from + 8);
        int64_t b = 0;
        for (; b + 4 <= batch; b += 4)
            for (int64_t r = from; r < to; r++) dot<BITS, BLOCK, 4>(w, x, r, b, out, rows);
        for (; b < batch; b++)
            for (int64_t r = from; r < to; r++) dot<BITS, BLOCK, 1>(w, x, r, b, out, rows);
    }
}

template <int BITS>
inline void any_block(const Weight &w, const Rounded &x, int64_t batch, int64_t first, int64_t last, int64_t rows,
                      float *out) {
    auto run = x.block == 128 ? rows_of<BITS, 128> : x.block == 64 ? rows_of<BITS, 64> : rows_of<BITS, 32>;
    run(w, x, batch, first, last, rows, out);
}

// The same for any width of the codes and any block.
inline void matmul(const Weight &w, const Rounded &x, int64_t batch, int64_t first, int64_t last, int64_t rows,
                   float *out) {
    auto run = w.bits == 2        ? any_block<2>
               : w.bits == 4      ? any_block<4>
               : w.bits == SIGNED ? any_block<SIGNED>
               : w.bits == LEVELS ? rows_of<LEVELS, 64>  // the only block that bitsandbytes makes
                                  : any_block<8>;
    run(w, x, batch, first, last, rows, out);
}

}  // namespace grouped
