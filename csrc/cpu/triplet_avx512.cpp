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
#pragma clang attribute push(                                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,bmi2,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,bmi2,prefer-vector-width=512")
#endif

#include "triplet_kernel.h"

namespace cmr {
namespace {

struct Avx512 : Portable {
    static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff); }

    // table[at], table a multiple of 16 registers' lanes; only the bits of `at` inside the table count
    template <int registers>
    static __m512 look_up(const float* table, __m512i at) {
        if constexpr (registers == 1) return _mm512_permutexvar_ps(at, _mm512_loadu_ps(table));
        else if constexpr (registers == 2)
            return _mm512_permutex2var_ps(_mm512_loadu_ps(table), at, _mm512_loadu_ps(table + 16));
        else {
            constexpr int half = 8 * registers;
            const __mmask16 upper = _mm512_test_epi32_mask(at, _mm512_set1_epi32(half));
            return _mm512_mask_blend_ps(upper, look_up<registers / 2>(table, at),
                                        look_up<registers / 2>(table + half, at));
        }
    }

    template <bool equal>
    static __m512i descend(__m512i node, __m512 key, __m512 d) {
        const __mmask16 passed = _mm512_cmp_ps_mask(key, d, equal ? _CMP_LE_OQ : _CMP_LT_OQ);
        const __m512i child = _mm512_add_epi32(node, node);
        return _mm512_mask_add_epi32(child, passed, child, _mm512_set1_epi32(1));
    }

    template <bool equal, int levels>
    static void rank_in(const float* tree, int all_levels, const float* d, int64_t n, int32_t* ranks) {
        for (int64_t j = 0; j < n; j += 16) {
            const __mmask16 lanes = first(n - j);
            const __m512 value = _mm512_maskz_loadu_ps(lanes, d + j);
            __m512i node = _mm512_set1_epi32(1);
            const auto step = [&](__m512 key) { node = descend<equal>(node, key, value); };
            if constexpr (levels > 0) step(look_up<1>(tree, node));
            if constexpr (levels > 1) step(look_up<1>(tree, node));
            if constexpr (levels > 2) step(look_up<1>(tree, node));
            if constexpr (levels > 3) step(look_up<1>(tree, node));
            if constexpr (levels > 4) step(look_up<1>(tree + 16, node));
            if constexpr (levels > 5) step(look_up<2>(tree + 32, node));
            if constexpr (levels > 6) step(look_up<4>(tree + 64, node));
            if constexpr (levels > 7) step(look_up<8>(tree + 128, node));
            if constexpr (levels > 8) step(look_up<16>(tree + 256, node));
            for (int level = levels; level < all_levels; ++level) step(_mm512_i32gather_ps(node, tree, 4));
            node = _mm512_sub_epi32(node, _mm512_set1_epi32(1 << all_levels));
            _mm512_mask_storeu_epi32(ranks + j, lanes, node);
        }
    }

    template <bool equal>
    static void rank(const float* tree, int levels, const float* d, int64_t n, int32_t* ranks) {
        switch (levels) {
            case 0: return rank_in<equal, 0>(tree, levels, d, n, ranks);
            case 1: return rank_in<equal, 1>(tree, levels, d, n, ranks);
            case 2: return rank_in<equal, 2>(tree, levels, d, n, ranks);
            case 3: return rank_in<equal, 3>(tree, levels, d, n, ranks);
            case 4: return rank_in<equal, 4>(tree, levels, d, n, ranks);
            case 5: return rank_in<equal, 5>(tree, levels, d, n, ranks);
            case 6: return rank_in<equal, 6>(tree, levels, d, n, ranks);
            case 7: return rank_in<equal, 7>(tree, levels, d, n, ranks);
            case 8: return rank_in<equal, 8>(tree, levels, d, n, ranks);
            default: return rank_in<equal, 9>(tree, levels, d, n, ranks);
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
                _mm512_mask_storeu_epi64(keys + count + from, static_cast<__mmask8>(first(std::max(0, size - from))),
                                         key);
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
