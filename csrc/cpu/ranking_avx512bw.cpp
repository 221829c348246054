// AVX-512BW: the portable code, compiled for it.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <string>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx2,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx2,popcnt,bmi,bmi2")
#endif

#include "ranking_kernel.h"

namespace cmr {
CMR_RANKING_KERNEL(ranking_avx512bw, hamming_avx512bw, Portable)
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
