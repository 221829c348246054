// AVX-512 with VPOPCNTDQ: eight words of a bucket at a time.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#if !defined(__clang__)
// gcc 12's own header warns about the deliberately undefined registers of its intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "multi_index.h"  // before the switch: what it defines is shared with the other units

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vpopcntdq,avx2,popcnt,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vpopcntdq,avx2,popcnt,bmi,bmi2")
#endif

#include "multi_index_kernel.h"
#include "multi_index_range.h"

namespace cmr {
namespace {

struct Avx512Filter {
    static int filter(const uint64_t* words, int count, uint64_t query, uint32_t limit, uint32_t* at) {
        const __m512i q = _mm512_set1_epi64(static_cast<long long>(query)), most = _mm512_set1_epi64(limit);
        int found = 0;
        for (int i = 0; i < count; i += 8) {
            const __mmask8 valid = count - i >= 8 ? 0xff : static_cast<__mmask8>((1u << (count - i)) - 1);
            const __m512i d = _mm512_popcnt_epi64(_mm512_xor_si512(q, _mm512_maskz_loadu_epi64(valid, words + i)));
            for (unsigned near = _mm512_mask_cmplt_epu64_mask(valid, d, most); near; near &= near - 1)
                at[found++] = static_cast<uint32_t>(i + __builtin_ctz(near));
        }
        return found;
    }
};

}  // namespace

const MultiIndexKernel multi_index_avx512{"avx512_vpopcntdq", search<Avx512Filter>, range, pairs};

}  // namespace cmr

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
