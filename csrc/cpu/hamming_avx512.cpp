// AVX-512 with VPOPCNTDQ and BITALG: one instruction counts the bits of a whole register, lane by lane, of any width.
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
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vpopcntdq,avx512bitalg,avx2,popcnt,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vpopcntdq,avx512bitalg,avx2,popcnt,bmi,bmi2")
#endif

#include "hamming_kernel.h"

namespace cmr {
namespace {

struct Avx512 {
    using reg = __m512i;
    using sum = __m512i;
    static constexpr int64_t max_words = 64;

    static reg bit_xor(reg a, reg b) { return _mm512_xor_si512(a, b); }
    static sum zero() { return _mm512_setzero_si512(); }
    static reg finish(sum total) { return total; }
};

struct Avx512x64 : Avx512 {
    using word = uint64_t;
    using mask = __mmask8;
    static constexpr int lanes = 8;
    static constexpr int blocks(int words) { return words <= 1 ? 4 : 2; }
    static constexpr bool has_transpose(int words) { return words == 2 || words == 4; }

    // rows of 8 codes -> word 0 of the 8 codes, word 1 of them, ...
    template <int W>
    static void transpose(const uint8_t* rows, word* out) {
        const auto row = [&](int i) { return _mm512_loadu_si512(rows + 64 * i); };
        if constexpr (W == 2) {
            const __m512i x = row(0), y = row(1);
            _mm512_storeu_si512(out, _mm512_permutex2var_epi64(x, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), y));
            _mm512_storeu_si512(out + 8, _mm512_permutex2var_epi64(x, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), y));
        } else {
            const __m512i low = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13),
                          high = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
            const __m512i a = _mm512_permutex2var_epi64(row(0), low, row(1)),
                          b = _mm512_permutex2var_epi64(row(2), low, row(3));
            const __m512i c = _mm512_permutex2var_epi64(row(0), high, row(1)),
                          d = _mm512_permutex2var_epi64(row(2), high, row(3));
            _mm512_storeu_si512(out, _mm512_shuffle_i64x2(a, b, 0x44));
            _mm512_storeu_si512(out + 8, _mm512_shuffle_i64x2(a, b, 0xee));
            _mm512_storeu_si512(out + 16, _mm512_shuffle_i64x2(c, d, 0x44));
            _mm512_storeu_si512(out + 24, _mm512_shuffle_i64x2(c, d, 0xee));
        }
    }

    static constexpr int queries(int words) { return words == 1 ? 8 : words == 0 || words == 2 ? 4 : 2; }

    static reg load(const word* p) { return _mm512_loadu_si512(p); }
    static reg splat(word x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
    static sum add_popcount(sum total, reg x) { return _mm512_add_epi64(total, _mm512_popcnt_epi64(x)); }
    static reg add(reg a, reg b) { return _mm512_add_epi64(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_epu64(a, b); }
    static mask none() { return 0; }
    static mask less(reg a, reg b) { return _mm512_cmplt_epu64_mask(a, b); }
    static mask either(mask a, mask b) { return a | b; }
    static bool any(mask m) { return m != 0; }
    static unsigned bits(mask m) { return in_register(m); }
    static void store_int32(int32_t* p, reg d) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(d));
    }
};

struct Avx512x32 : Avx512 {
    using word = uint32_t;
    using mask = __mmask16;
    static constexpr int lanes = 16;
    static constexpr int blocks(int) { return 4; }
    static constexpr int queries(int) { return 8; }
    static constexpr bool has_transpose(int) { return false; }

    static reg load(const word* p) { return _mm512_loadu_si512(p); }
    static reg splat(word x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static sum add_popcount(sum total, reg x) { return _mm512_add_epi32(total, _mm512_popcnt_epi32(x)); }
    static reg add(reg a, reg b) { return _mm512_add_epi32(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_epu32(a, b); }
    static mask none() { return 0; }
    static mask less(reg a, reg b) { return _mm512_cmplt_epu32_mask(a, b); }
    static mask either(mask a, mask b) { return a | b; }
    static bool any(mask m) { return m != 0; }
    static unsigned bits(mask m) { return in_register(m); }
    static void store_int32(int32_t* p, reg d) { _mm512_storeu_si512(p, d); }
};

struct Avx512x16 : Avx512 {
    using word = uint16_t;
    using mask = __mmask32;
    static constexpr int lanes = 32;
    static constexpr int blocks(int) { return 2; }
    static constexpr int queries(int) { return 8; }
    static constexpr bool has_transpose(int) { return false; }

    static reg load(const word* p) { return _mm512_loadu_si512(p); }
    static reg splat(word x) { return _mm512_set1_epi16(static_cast<short>(x)); }
    static sum add_popcount(sum total, reg x) { return _mm512_add_epi16(total, _mm512_popcnt_epi16(x)); }
    static reg add(reg a, reg b) { return _mm512_add_epi16(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_epu16(a, b); }
    static mask none() { return 0; }
    static mask less(reg a, reg b) { return _mm512_cmplt_epu16_mask(a, b); }
    static mask either(mask a, mask b) { return a | b; }
    static bool any(mask m) { return m != 0; }
    static unsigned bits(mask m) { return in_register(m); }
    static void store_int32(int32_t* p, reg d) {
        _mm512_storeu_si512(p, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(d)));
        _mm512_storeu_si512(p + 16, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(d, 1)));
    }
};

struct Avx512x8 : Avx512 {
    using word = uint8_t;
    using mask = __mmask64;
    static constexpr int lanes = 64;
    static constexpr int blocks(int) { return 1; }
    static constexpr int queries(int) { return 8; }
    static constexpr bool has_transpose(int) { return false; }

    static reg load(const word* p) { return _mm512_loadu_si512(p); }
    static reg splat(word x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static sum add_popcount(sum total, reg x) { return _mm512_add_epi8(total, _mm512_popcnt_epi8(x)); }
    static reg add(reg a, reg b) { return _mm512_add_epi8(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_epu8(a, b); }
    static mask none() { return 0; }
    static mask less(reg a, reg b) { return _mm512_cmplt_epu8_mask(a, b); }
    static mask either(mask a, mask b) { return a | b; }
    static bool any(mask m) { return m != 0; }
    static uint64_t bits(mask m) { return m; }
    static void store_int32(int32_t* p, reg d) {
        alignas(64) word row[lanes];
        _mm512_store_si512(row, d);
        for (int lane = 0; lane < lanes; ++lane) p[lane] = row[lane];
    }
};

}  // namespace

CMR_HAMMING_KERNEL(hamming_avx512, "avx512_vpopcntdq", Avx512x8, Avx512x16, Avx512x32, Avx512x64)

}  // namespace cmr
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
