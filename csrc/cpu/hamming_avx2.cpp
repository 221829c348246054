// AVX2: popcount by two table look-ups a byte, bytes summed over words before the horizontal step.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,popcnt,bmi,bmi2")
#endif

#include "hamming_kernel.h"

namespace cmr {
namespace {

struct Avx2 {
    using reg = __m256i;
    using sum = __m256i;  // a byte count in every byte: room for 31 words
    using mask = __m256i;
    static constexpr int64_t max_words = 31;
    static constexpr bool has_transpose(int) { return false; }

    static reg bit_xor(reg a, reg b) { return _mm256_xor_si256(a, b); }
    static sum zero() { return _mm256_setzero_si256(); }
    static sum add_popcount(sum total, reg x) {
        const reg table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
        const reg low = _mm256_set1_epi8(15);
        const reg a = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
        const reg b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
        return _mm256_add_epi8(total, _mm256_add_epi8(a, b));
    }
    // distances fit in 31 bits, so 32-bit minimum and compare serve both lane widths
    static reg add(reg a, reg b) { return _mm256_add_epi32(a, b); }
    static reg min(reg a, reg b) { return _mm256_min_epu32(a, b); }
    static mask none() { return _mm256_setzero_si256(); }
    static mask less(reg a, reg b) { return _mm256_cmpgt_epi32(b, a); }
    static mask either(mask a, mask b) { return _mm256_or_si256(a, b); }
    static bool any(mask m) { return !_mm256_testz_si256(m, m); }
};

struct Avx2x32 : Avx2 {
    using word = uint32_t;
    static constexpr int lanes = 8;
    static constexpr int blocks(int) { return 4; }
    static constexpr int queries(int) { return 2; }

    static reg load(const word* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static reg splat(word x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static reg finish(sum total) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(total, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
    }
    static unsigned bits(mask m) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
    static void store_int32(int32_t* p, reg d) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), d); }
};

struct Avx2x64 : Avx2 {
    using word = uint64_t;
    static constexpr int lanes = 4;
    static constexpr int blocks(int) { return 4; }
    static constexpr int queries(int words) { return words <= 1 ? 4 : 2; }

    static reg load(const word* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static reg splat(word x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
    static reg finish(sum total) { return _mm256_sad_epu8(total, _mm256_setzero_si256()); }
    static unsigned bits(mask m) {
        // the upper half of a lane is 0 in both operands of less(), so only the lower half can say yes
        return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_slli_epi64(m, 32))));
    }
    static void store_int32(int32_t* p, reg d) {
        const reg packed = _mm256_permutevar8x32_epi32(d, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
};

}  // namespace

CMR_HAMMING_KERNEL(hamming_avx2, "avx2", Avx2x32, Avx2x32, Avx2x32, Avx2x64)

}  // namespace cmr
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
