// The portable loops, compiled for AVX-512.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512")
#endif

#define CMR_PGD_FLOATS 16
#include "pgd_kernel.h"

namespace cmr {
const PgdKernel pgd_avx512{PgdLoops::step, PgdLoops::noise};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
