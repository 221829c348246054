// AVX-512: keys are compressed 16 at a time, ranks are searched for 16 distances at a time.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#if !defined(__clang__)
// gcc 12's own header warns about the deliberately undefined registers of its intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,bmi2,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,bmi2,prefer-vector-width=512")
#endif

#include "triplet_kernel.h"

namespace cmr {
namespace {

struct Avx512 : Portable {
    static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff); }

    template <bool equal>
    static __mmask16 passed(__m512 key, __m512 d) {
        return _mm512_cmp_ps_mask(key, d, equal ? _CMP_LE_OQ : _CMP_LT_OQ);
    }

    template <bool equal>
    static void rank(const float* sorted, int levels, const float* d, int64_t n, int32_t* ranks) {
        const int inside = std::min(levels, 5), outside = levels - inside;
        // every 2^outside-th limit: 2^inside - 1 of them
        alignas(64) float table[32];
        std::fill(table, table + 32, std::numeric_limits<float>::infinity());
        for (int i = 0; i < (1 << inside) - 1; ++i) table[i] = sorted[((i + 1) << outside) - 1];
        const __m512 low = _mm512_load_ps(table), high = _mm512_load_ps(table + 16);
        for (int64_t j = 0; j < n; j += 16) {
            const __mmask16 lanes = first(n - j);
            const __m512 value = _mm512_maskz_loadu_ps(lanes, d + j);
            __m512i at = _mm512_setzero_si512();
            for (int step = 1 << inside >> 1; step; step >>= 1) {
                const __m512i ahead = _mm512_add_epi32(at, _mm512_set1_epi32(step));
                const __m512 key = _mm512_permutex2var_ps(low, _mm512_sub_epi32(ahead, _mm512_set1_epi32(1)), high);
                at = _mm512_mask_mov_epi32(at, passed<equal>(key, value), ahead);
            }
            at = _mm512_sllv_epi32(at, _mm512_set1_epi32(outside));
            for (int step = 1 << outside >> 1; step; step >>= 1) {
                const __m512i ahead = _mm512_add_epi32(at, _mm512_set1_epi32(step));
                const __m512 key = _mm512_i32gather_ps(ahead, sorted - 1, 4);
                at = _mm512_mask_mov_epi32(at, passed<equal>(key, value), ahead);
            }
            _mm512_mask_storeu_epi32(ranks + j, lanes, at);
        }
    }

    static int64_t relevant_keys(const float* d, const int32_t* kind, int64_t n, float margin, uint64_t* keys) {
        const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
        __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        int64_t count = 0;
        for (int64_t j = 0; j < n; j += 16, index = _mm512_add_epi32(index, _mm512_set1_epi32(16))) {
            const __mmask16 lanes = first(n - j);
            const __mmask16 taken =
                _mm512_mask_cmpeq_epi32_mask(lanes, _mm512_maskz_loadu_epi32(lanes, kind + j), _mm512_set1_epi32(1));
            const __m512i bits =
                _mm512_castps_si512(_mm512_add_ps(_mm512_maskz_loadu_ps(lanes, d + j), _mm512_set1_ps(margin)));
            const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign);
            const __m512i limits = _mm512_maskz_compress_epi32(taken, _mm512_xor_si512(bits, flip));
            const __m512i indices = _mm512_maskz_compress_epi32(taken, index);
            const int size = __builtin_popcount(taken);
            const auto store = [&](__m256i limit, __m256i at, int from) {
                const __m512i key =
                    _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(limit), 32), _mm512_cvtepu32_epi64(at));
                _mm512_mask_storeu_epi64(keys + count + from, static_cast<__mmask8>(first(std::max(0, size - from))), key);
            };
            store(_mm512_castsi512_si256(limits), _mm512_castsi512_si256(indices), 0);
            if (size > 8) store(_mm512_extracti64x4_epi64(limits, 1), _mm512_extracti64x4_epi64(indices, 1), 8);
            count += size;
        }
        return count;
    }
};

}  // namespace
CMR_TRIPLET_KERNEL(triplet_avx512, Avx512)
}  // namespace cmr
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
