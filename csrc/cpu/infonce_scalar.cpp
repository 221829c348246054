#include "infonce_kernel.h"

namespace cmr {
CMR_INFONCE_KERNEL(infonce_scalar)
}
