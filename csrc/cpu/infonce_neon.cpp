#if defined(__aarch64__)
#include "infonce_kernel.h"

namespace cmr {
CMR_INFONCE_KERNEL(infonce_neon)
}
#endif
