#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include <immintrin.h>

#include "sinkhorn.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define CMR_VEC_AVX2
#include "sinkhorn_kernel.h"

namespace cmr {
const SinkhornKernel sinkhorn_avx2{sinkhorn_solve};
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
