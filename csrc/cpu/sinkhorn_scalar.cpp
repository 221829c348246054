// The compiler's own vectors: SSE2, or NEON on Arm.
#include "sinkhorn_kernel.h"

namespace cmr {
#if defined(__aarch64__)
const SinkhornKernel sinkhorn_portable{"neon", sinkhorn_solve};
#else
const SinkhornKernel sinkhorn_portable{"scalar", sinkhorn_solve};
#endif
}
