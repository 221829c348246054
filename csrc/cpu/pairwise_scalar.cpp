// The compiler's own vectors: SSE2, or NEON on Arm.
#include "pairwise_kernel.h"

namespace cmr {
const PairwiseKernel pairwise_portable{pairwise_rows};
}
