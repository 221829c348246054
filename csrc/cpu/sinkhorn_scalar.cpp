// The compiler's own vectors: SSE2, or NEON on Arm.
#include "sinkhorn_kernel.h"

namespace cmr {
const SinkhornKernel sinkhorn_portable{sinkhorn_solve};
}
