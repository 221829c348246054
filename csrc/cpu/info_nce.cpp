#include "info_nce.h"

#include <stdexcept>

#include "isa.h"

namespace cmr {

const InfonceKernel& infonce_kernel(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
    set_last_isa(isa.c_str());
#if defined(__x86_64__)
    if (is_avx512(isa)) return infonce_avx512;
    if (isa == "avx2") return infonce_avx2;
#elif defined(__aarch64__)
    if (isa == "neon") return infonce_neon;
#endif
    return infonce_scalar;
}

}  // namespace cmr
