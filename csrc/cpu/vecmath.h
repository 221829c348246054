// Vectors of floats, and exp, log and log1p of them: included by the units that are compiled per instruction set.
//
// A unit defines CMR_VEC_AVX512 or CMR_VEC_AVX2 (and switches its compiler over) before it includes this; without
// either, Vec is four floats in the compiler's own vectors, which are SSE2 or NEON instructions where there are any.
//
// exp        x = n ln 2 + r, |r| <= ln 2 / 2: a polynomial of degree 7 (Cephes), times 2^n. 0 below -104, infinity
//            above 88.8.
// log1p_unit log1p on [0, 1]: x times a polynomial of degree 9 through the Chebyshev nodes.
// log        of positive numbers and 0 (minus infinity): x = 2^n m, m in [sqrt 1/2, sqrt 2]: degree 9 (Cephes).
// Each is within 2 units in the last place; a NaN stays one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(CMR_VEC_AVX512) || defined(CMR_VEC_AVX2)
#include <immintrin.h>
#endif

namespace cmr {
namespace {

#if defined(CMR_VEC_AVX512)

struct Vec {
    static constexpr int64_t lanes = 16;
    using mask = __mmask16;
    __m512 v;

    static Vec of(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
    static mask first(int64_t n) { return static_cast<mask>((1u << n) - 1); }

    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
    static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Vec select(mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
    static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    Vec abs() const { return {_mm512_abs_ps(v)}; }

    static mask equal(const int32_t* p, int64_t n, int32_t x) {
        return _mm512_mask_cmpeq_epi32_mask(first(n), _mm512_maskz_loadu_epi32(first(n), p), _mm512_set1_epi32(x));
    }
    static mask shares(const int32_t* p, int64_t n, int32_t x) {
        return _mm512_test_epi32_mask(_mm512_maskz_loadu_epi32(first(n), p), _mm512_set1_epi32(x));
    }
    static mask none() { return 0; }
    static mask either(mask a, mask b) { return static_cast<mask>(a | b); }
    static Vec bytes(const uint8_t* p, int64_t n) {  // 0 to 255 each
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
    }

    Vec scaled(Vec n) const { return {_mm512_scalef_ps(v, n.v)}; }  // times 2^n
    void split(Vec& exponent, Vec& mantissa) const {                // v = 2^exponent mantissa, mantissa in [1, 2)
        exponent.v = _mm512_getexp_ps(v);
        mantissa.v = _mm512_getmant_ps(v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    }
    float sum() const { return _mm512_reduce_add_ps(v); }
    static __m128 quarter(Vec a) {
        const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
        return _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    }
    // sums[i] = the sum of x[i], ratios[i] = mass[i] / sums[i], 0 where there is no mass: four at a time
    static void ratios4(const Vec (&x)[4], const float* mass, float* sums, float* ratios) {
        const __m128 s =
            _mm_hadd_ps(_mm_hadd_ps(quarter(x[0]), quarter(x[1])), _mm_hadd_ps(quarter(x[2]), quarter(x[3])));
        const __m128 of = _mm_loadu_ps(mass);
        _mm_storeu_ps(sums, s);
        _mm_storeu_ps(ratios, _mm_and_ps(_mm_div_ps(of, s), _mm_cmplt_ps(_mm_setzero_ps(), of)));
    }
    float largest() const { return _mm512_reduce_max_ps(v); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec::mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }

// Sums of floats in double, in a fixed order.
struct DoubleSum {
    __m512d low, high;
    static DoubleSum zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
    void add(Vec x) {
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
    }
    double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#elif defined(CMR_VEC_AVX2)

struct Vec {
    static constexpr int64_t lanes = 8;
    using mask = __m256;
    __m256 v;

    static Vec of(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
    static __m256i first(int64_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }

    static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    static Vec select(mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m)}; }
    static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }

    static __m256i words(const int32_t* p, int64_t n) { return _mm256_maskload_epi32(p, first(n)); }
    static mask equal(const int32_t* p, int64_t n, int32_t x) {
        return _mm256_castsi256_ps(_mm256_cmpeq_epi32(words(p, n), _mm256_set1_epi32(x)));
    }
    static mask shares(const int32_t* p, int64_t n, int32_t x) {
        const __m256i both = _mm256_and_si256(words(p, n), _mm256_set1_epi32(x));
        return _mm256_castsi256_ps(
            _mm256_xor_si256(_mm256_cmpeq_epi32(both, _mm256_setzero_si256()), _mm256_set1_epi32(-1)));
    }
    static mask none() { return _mm256_setzero_ps(); }
    static mask either(mask a, mask b) { return _mm256_or_ps(a, b); }
    static Vec bytes(const uint8_t* p, int64_t n) {
        uint64_t eight = 0;
        std::memcpy(&eight, p, static_cast<size_t>(n));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(eight))))};
    }

    static __m256 two_to(__m256i n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    Vec scaled(Vec n) const {  // in two steps, so that a subnormal result is right
        const __m256i power = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(power, 1);
        return {_mm256_mul_ps(_mm256_mul_ps(v, two_to(half)), two_to(_mm256_sub_epi32(power, half)))};
    }
    void split(Vec& exponent, Vec& mantissa) const {
        const mask tiny = _mm256_cmp_ps(v, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);  // subnormal: times 2^23
        const __m256i bits =
            _mm256_castps_si256(_mm256_blendv_ps(v, _mm256_mul_ps(v, _mm256_set1_ps(8388608.0f)), tiny));
        const __m256i power = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
        exponent.v = _mm256_sub_ps(_mm256_cvtepi32_ps(power), _mm256_and_ps(tiny, _mm256_set1_ps(23)));
        mantissa.v = _mm256_castsi256_ps(
            _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)), _mm256_set1_epi32(0x3f800000)));
    }
    static __m128 quarter(Vec a) { return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)); }
    float sum() const {
        const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
        return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
    }
    // sums[i] = the sum of x[i], ratios[i] = mass[i] / sums[i], 0 where there is no mass: four at a time
    static void ratios4(const Vec (&x)[4], const float* mass, float* sums, float* ratios) {
        const __m128 s =
            _mm_hadd_ps(_mm_hadd_ps(quarter(x[0]), quarter(x[1])), _mm_hadd_ps(quarter(x[2]), quarter(x[3])));
        const __m128 of = _mm_loadu_ps(mass);
        _mm_storeu_ps(sums, s);
        _mm_storeu_ps(ratios, _mm_and_ps(_mm_div_ps(of, s), _mm_cmplt_ps(_mm_setzero_ps(), of)));
    }
    float largest() const {
        const __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
        return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec::mask operator<(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }

struct DoubleSum {
    __m256d low, high;
    static DoubleSum zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
    void add(Vec x) {
        low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
        high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
    }
    double total() const {
        alignas(32) double four[4];
        _mm256_store_pd(four, _mm256_add_pd(low, high));
        return (four[0] + four[1]) + (four[2] + four[3]);
    }
};

#else

struct Vec {
    static constexpr int64_t lanes = 4;
    typedef float reg __attribute__((vector_size(16)));
    typedef int32_t mask __attribute__((vector_size(16)));  // all bits of a lane or none
    reg v;

    static Vec of(float x) { return {reg{x, x, x, x}}; }
    static Vec load(const float* p) { return load(p, 4); }
    static Vec load(const float* p, int64_t n) {
        Vec out{reg{}};
        std::memcpy(&out.v, p, static_cast<size_t>(4 * n));
        return out;
    }
    void store(float* p) const { store(p, 4); }
    void store(float* p, int64_t n) const { std::memcpy(p, &v, static_cast<size_t>(4 * n)); }

    static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
    static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
    static Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
    static Vec select(mask m, Vec yes, Vec no) { return {m ? yes.v : no.v}; }
    static Vec round(Vec a) {  // |a| < 2^22: what does not fit behind the point is rounded off
        const reg big = reg{} + 12582912.0f;
        return {(a.v + big) - big};
    }
    Vec abs() const { return {(reg)((mask)v & 0x7fffffff)}; }

    static mask words(const int32_t* p, int64_t n) {
        mask out{};
        std::memcpy(&out, p, static_cast<size_t>(4 * n));
        return out;
    }
    static mask equal(const int32_t* p, int64_t n, int32_t x) { return words(p, n) == x; }
    static mask shares(const int32_t* p, int64_t n, int32_t x) { return (words(p, n) & x) != 0; }
    static mask none() { return mask{}; }
    static mask either(mask a, mask b) { return a | b; }
    static Vec bytes(const uint8_t* p, int64_t n) {
        Vec out{reg{}};
        for (int64_t i = 0; i < n; ++i) out.v[i] = static_cast<float>(p[i]);
        return out;
    }

    Vec scaled(Vec n) const {
        const mask power = __builtin_convertvector(n.v, mask), half = power >> 1;
        return {v * (reg)((half + 127) << 23) * (reg)((power - half + 127) << 23)};
    }
    void split(Vec& exponent, Vec& mantissa) const {
        const mask tiny = v < 1.17549435e-38f;
        const mask bits = (mask)(tiny ? v * 8388608.0f : v);
        exponent.v = __builtin_convertvector((bits >> 23) - 127 - (tiny & 23), reg);
        mantissa.v = (reg)((bits & 0x7fffff) | 0x3f800000);
    }
    float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
    static void ratios4(const Vec (&x)[4], const float* mass, float* sums, float* ratios) {
        for (int i = 0; i < 4; ++i) {
            sums[i] = x[i].sum();
            ratios[i] = mass[i] > 0 ? mass[i] / sums[i] : 0.0f;
        }
    }
    float largest() const {
        const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
        return a > b ? a : b;
    }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec::mask operator<(Vec a, Vec b) { return a.v < b.v; }

struct DoubleSum {
    double lanes[4];
    static DoubleSum zero() { return {}; }
    void add(Vec x) {
        for (int i = 0; i < 4; ++i) lanes[i] += x.v[i];
    }
    double total() const { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }
};

#endif

template <int n>
inline Vec polynomial(Vec x, const float (&c)[n]) {  // c[0] x^(n-1) + ... + c[n-1]
    Vec sum = Vec::of(c[0]);
    for (int i = 1; i < n; ++i) sum = Vec::fma(sum, x, Vec::of(c[i]));
    return sum;
}

inline Vec exp(Vec x) {
    static constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                  4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    x = Vec::min(Vec::of(89.0f), Vec::max(Vec::of(-110.0f), x));
    const Vec n = Vec::round(x * Vec::of(1.44269504f));
    const Vec r = Vec::fma(n, Vec::of(2.12194440e-4f), Vec::fma(n, Vec::of(-0.693359375f), x));
    return (Vec::fma(polynomial(r, c), r * r, r) + Vec::of(1)).scaled(n);
}

inline Vec log1p_unit(Vec x) {
    static constexpr float c[] = {-3.176057e-3f, 1.9542528e-2f,  -5.6373615e-2f, 1.05436236e-1f, -1.5269667e-1f,
                                  1.9663274e-1f, -2.4951616e-1f, 3.332971e-1f,   -4.9999893e-1f, 1.0f};
    return x * polynomial(x, c);
}

inline Vec log(Vec x) {
    static constexpr float c[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                  -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                  2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
    Vec n, m;
    x.split(n, m);
    const Vec::mask high = Vec::of(1.41421356f) < m;
    n = n + Vec::select(high, Vec::of(1), Vec::of(0));
    m = Vec::select(high, m * Vec::of(0.5f), m) - Vec::of(1);
    const Vec square = m * m;
    Vec y = Vec::fma(polynomial(m, c) * m, square, n * Vec::of(-2.12194440e-4f));
    y = m + Vec::fma(square, Vec::of(-0.5f), y);
    y = Vec::fma(n, Vec::of(0.693359375f), y);
    // x - x keeps a NaN; 0 < x holds for a subnormal only where the processor was not told to take it for 0
    return Vec::select(Vec::of(0) < x, y, Vec::of(-__builtin_inff())) + (x - x);
}

}  // namespace
}  // namespace cmr
