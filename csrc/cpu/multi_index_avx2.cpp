// Processors with AVX2 count the bits of a word in one instruction: as fast as buckets come from memory.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "multi_index.h"  // before the switch: what it defines is shared with the other units

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,popcnt,bmi,bmi2")
#endif

#include "multi_index_kernel.h"
#include "multi_index_range.h"

namespace cmr {

const MultiIndexKernel multi_index_avx2{"avx2", search<PlainFilter>, range, pairs};

}  // namespace cmr

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
