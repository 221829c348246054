#if defined(__aarch64__)
#include "pgd_kernel.h"

namespace cmr {
const PgdKernel pgd_neon{"neon", PgdLoops::step, PgdLoops::noise};
}
#endif
