// Vectors as wide as the registers of the processor that the code is compiled for. Included by cpu_step.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

using std::int64_t;

struct bf16 {
    uint16_t bits;
};

// Size of a vector, and the number of registers for sums; the others hold the operands. Where registers are smaller than
// 32 bytes, the compiler makes a vector of two.
#if defined(__AVX512BW__)
constexpr int BYTES = 64, SUMS = 16;
#else
constexpr int BYTES = 32, SUMS = 8;
#endif

template <class A, int LANES> struct Vector {
    typedef A type __attribute__((vector_size(LANES * sizeof(A))));
    // in memory, without alignment
    typedef A anywhere __attribute__((vector_size(LANES * sizeof(A)), aligned(alignof(A)), may_alias));
};
template <class A> constexpr int LANES = BYTES / sizeof(A);
template <class A> using V = typename Vector<A, LANES<A>>::type;

template <class A> inline V<A> load(const A *p) { return *(const typename Vector<A, LANES<A>>::anywhere *)p; }

inline V<float> load(const bf16 *p) {  // a bfloat16 is the upper half of a float
    auto half = *(const typename Vector<uint16_t, LANES<float>>::anywhere *)p;
    return (V<float>)(__builtin_convertvector(half, typename Vector<uint32_t, LANES<float>>::type) << 16);
}

template <class A> inline V<A> all(A x) { return x - V<A>{}; }  // x in every place

template <class A> inline void store(A *p, V<A> v) { *(typename Vector<A, LANES<A>>::anywhere *)p = v; }

// sum + a * b, rounded once where the processor can. The compiler would do so in some loops and not in others (it is told
// not to, by -ffp-contract=off), so that a result would depend on the number of rows and threads.
inline float add_product(float sum, float a, float b) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}
inline double add_product(double sum, double a, double b) {
#ifdef __FMA__
    return __builtin_fma(a, b, sum);
#else
    return sum + a * b;
#endif
}
inline V<float> add_product(V<float> sum, V<float> a, V<float> b) {
#if defined(__AVX512BW__)
    return (V<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (V<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}
inline V<double> add_product(V<double> sum, V<double> a, V<double> b) {
#if defined(__AVX512BW__)
    return (V<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__FMA__)
    return (V<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
    return sum + a * b;
#endif
}

// Sum of the N numbers of a vector: the halves are added until two numbers are left.
template <class A, int N = LANES<A>> inline A sum(typename Vector<A, N>::type v) {
    if constexpr (N == 2) {
        return v[0] + v[1];
    } else {
        // Adding zeros makes another vector: one whose address is taken would lie in memory from its first use on.
        typename Vector<A, N>::type copy = N == LANES<A> ? v + decltype(v){} : v;
        typename Vector<A, N / 2>::type half[2];
        std::memcpy(half, &copy, sizeof copy);
        return sum<A, N / 2>(half[0] + half[1]);
    }
}

inline float value(float x) { return x; }
inline double value(double x) { return x; }
inline float value(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void round_to(float &to, float x) { to = x; }
inline void round_to(double &to, double x) { to = x; }
inline void round_to(bf16 &to, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// e^x to within two units of the last place, the same bits alone and in a vector. The compiler makes vectors of loops
// over it; std::exp took a tenth of the time of a step. Beyond the range of floats, the nearest in range.
inline float exponential(float x) {
    x = x > 88 ? 88.0f : x < -87 ? -87.0f : x;
    // x = k ln 2 + r: adding 1.5 * 2^23 leaves the nearest integer in the lowest bits
    const float moved = add_product(12582912.0f, x, 1.44269504f), k = moved - 12582912.0f;
    const float r = add_product(add_product(x, k, -0.693359375f), k, 2.12194440e-4f);
    float power = add_product(1.0f / 720, 1.0f / 5040, r);  // Taylor: |r| <= 0.35
    power = add_product(1.0f / 24, add_product(1.0f / 120, power, r), r);
    power = add_product(0.5f, add_product(1.0f / 6, power, r), r);
    power = add_product(1.0f, add_product(1.0f, power, r), r);
    uint32_t bits;
    std::memcpy(&bits, &moved, sizeof bits);
    bits = (bits << 23) + 0x3f800000;  // 2^k
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}
inline double exponential(double x) { return std::exp(x); }
