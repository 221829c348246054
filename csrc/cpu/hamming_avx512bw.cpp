// AVX-512 without VPOPCNTDQ (Skylake to Cooper Lake): popcount by two table look-ups a byte, over 64 bytes at a time,
// bytes summed over words before the horizontal step.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#if !defined(__clang__)
// gcc 12's own header warns about the deliberately undefined registers of its intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx2,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx2,popcnt,bmi,bmi2")
#endif

#include "hamming_kernel.h"

namespace cmr {
namespace {

struct Avx512bw {
    using reg = __m512i;
    using sum = __m512i;  // a byte count in every byte: room for 31 words
    static constexpr int64_t max_words = 31;
    static constexpr bool has_transpose(int) { return false; }
    static constexpr int blocks(int) { return 4; }

    static reg bit_xor(reg a, reg b) { return _mm512_xor_si512(a, b); }
    static sum zero() { return _mm512_setzero_si512(); }
    static sum add_popcount(sum total, reg x) {
        const reg table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
        const reg low = _mm512_set1_epi8(15);
        const reg a = _mm512_shuffle_epi8(table, _mm512_and_si512(x, low));
        const reg b = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
        return _mm512_add_epi8(total, _mm512_add_epi8(a, b));
    }
    static reg load(const void* p) { return _mm512_loadu_si512(p); }
    static bool any(unsigned m) { return m != 0; }
    static unsigned none() { return 0; }
    static unsigned either(unsigned a, unsigned b) { return a | b; }
    static unsigned bits(unsigned m) { return in_register(m); }
};

struct Avx512bwx32 : Avx512bw {
    using word = uint32_t;
    using mask = unsigned;
    static constexpr int lanes = 16;
    static constexpr int queries(int) { return 4; }

    static reg splat(word x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static reg finish(sum total) {
        return _mm512_madd_epi16(_mm512_maddubs_epi16(total, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
    }
    static reg add(reg a, reg b) { return _mm512_add_epi32(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_epu32(a, b); }
    static mask less(reg a, reg b) { return _mm512_cmplt_epu32_mask(a, b); }
    static void store_int32(int32_t* p, reg d) { _mm512_storeu_si512(p, d); }
};

struct Avx512bwx64 : Avx512bw {
    using word = uint64_t;
    using mask = unsigned;
    static constexpr int lanes = 8;
    static constexpr int queries(int words) { return words <= 1 ? 4 : 2; }

    static reg splat(word x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
    static reg finish(sum total) { return _mm512_sad_epu8(total, _mm512_setzero_si512()); }
    static reg add(reg a, reg b) { return _mm512_add_epi64(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_epu64(a, b); }
    static mask less(reg a, reg b) { return _mm512_cmplt_epu64_mask(a, b); }
    static void store_int32(int32_t* p, reg d) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(d));
    }
};

}  // namespace

CMR_HAMMING_KERNEL(hamming_avx512bw, "avx512bw", Avx512bwx32, Avx512bwx32, Avx512bwx32, Avx512bwx64)

}  // namespace cmr
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
