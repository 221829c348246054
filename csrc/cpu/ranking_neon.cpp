#if defined(__aarch64__)
#include "ranking_kernel.h"

namespace cmr {
CMR_RANKING_KERNEL(ranking_neon, hamming_neon, Portable)
}
#endif
