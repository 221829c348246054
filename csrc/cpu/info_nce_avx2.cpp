// AVX2: the portable vectors, compiled for it.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define CMR_VECTOR_BYTES 32
#include "info_nce_kernel.h"

namespace cmr {
CMR_INFONCE_KERNEL(infonce_avx2)
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
