#if defined(__x86_64__)
#include <cstdint>
#include <cstring>
#include <string>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define CMR_VEC_AVX2
#include "pairwise_kernel.h"

namespace cmr {
const PairwiseKernel pairwise_avx2{"avx2", pairwise_rows};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
