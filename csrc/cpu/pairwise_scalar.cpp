// The compiler's own vectors: SSE2, or NEON on Arm.
#include "pairwise_kernel.h"

namespace cmr {
#if defined(__aarch64__)
const PairwiseKernel pairwise_portable{"neon", pairwise_rows};
#else
const PairwiseKernel pairwise_portable{"scalar", pairwise_rows};
#endif
}
