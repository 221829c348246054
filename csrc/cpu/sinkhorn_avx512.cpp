#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#if !defined(__clang__)
// gcc 12's own header warns about the deliberately undefined registers of its intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "sinkhorn.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define CMR_VEC_AVX512
#include "sinkhorn_kernel.h"

namespace cmr {
const SinkhornKernel sinkhorn_avx512{sinkhorn_solve};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
