#include "pgd_kernel.h"

namespace cmr {
const PgdKernel pgd_scalar{PgdLoops::step, PgdLoops::noise};
}
