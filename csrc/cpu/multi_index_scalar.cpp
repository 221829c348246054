// Any processor. On Arm the compiler's popcount is NEON's, so this is its kernel too.
#include "multi_index_kernel.h"

namespace cmr {

const MultiIndexKernel multi_index_scalar{"scalar", search<PlainFilter>};
#if defined(__aarch64__)
const MultiIndexKernel multi_index_neon{"neon", search<PlainFilter>};
#endif

}  // namespace cmr
