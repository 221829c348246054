// AVX2: the portable code, compiled for it.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,popcnt,bmi,bmi2")
#endif

#include "triplet_kernel.h"

namespace cmr {
CMR_TRIPLET_KERNEL(triplet_avx2, Portable)
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
