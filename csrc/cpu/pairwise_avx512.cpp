#if defined(__x86_64__)
#include <cstdint>
#include <cstring>
#include <string>

#if !defined(__clang__)
// gcc 12's own header warns about the deliberately undefined registers of its intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "pairwise.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define CMR_VEC_AVX512
#include "pairwise_kernel.h"

namespace cmr {
const PairwiseKernel pairwise_avx512{pairwise_rows};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
