// Any processor. On Arm the compiler's popcount is NEON's, so this is its kernel too.
#include "multi_index_kernel.h"
#include "multi_index_range.h"

namespace cmr {

const MultiIndexKernel multi_index_scalar{"scalar", search<PlainFilter>, range, pairs};
#if defined(__aarch64__)
const MultiIndexKernel multi_index_neon{"neon", search<PlainFilter>, range, pairs};
#endif

}  // namespace cmr
