#if defined(__aarch64__)
#include "info_nce_kernel.h"

namespace cmr {
CMR_INFONCE_KERNEL(infonce_neon)
}
#endif
