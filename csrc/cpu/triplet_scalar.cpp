#include "triplet_kernel.h"

namespace cmr {
CMR_TRIPLET_KERNEL(triplet_scalar, Portable)
}
