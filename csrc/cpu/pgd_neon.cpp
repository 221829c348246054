#if defined(__aarch64__)
#include "pgd_kernel.h"

namespace cmr {
const PgdKernel pgd_neon{PgdLoops::step, PgdLoops::noise};
}
#endif
