#if defined(__aarch64__)
#include "triplet_kernel.h"

namespace cmr {
CMR_TRIPLET_KERNEL(triplet_neon, Portable)
}
#endif
