// The portable loops, compiled for AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define CMR_PGD_FLOATS 8
#include "pgd_kernel.h"

namespace cmr {
const PgdKernel pgd_avx2{PgdLoops::step, PgdLoops::noise};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
