#include "ranking_kernel.h"

namespace cmr {
CMR_RANKING_KERNEL(ranking_scalar, hamming_scalar, Portable)
}
