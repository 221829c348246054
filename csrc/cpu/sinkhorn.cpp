// Problems as tasks: each is solved by one thread in its own scratch, so threads change nothing.
#include "sinkhorn.h"

#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cmr {
namespace {

constexpr int64_t kAlign = 64;

const SinkhornKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
#if defined(__x86_64__)
    if (is_avx512(isa)) return sinkhorn_avx512;
    if (isa == "avx2") return sinkhorn_avx2;
#endif
    return sinkhorn_portable;  // NEON's instructions, on Arm
}

// Products below 1e-38 count as 0 for a while: most of a plan of small reg, and 2.5 times slower otherwise.
class NoSubnormals {
#if defined(__x86_64__)
public:
    NoSubnormals() { _mm_setcsr(before_ | 0x8040); }
    ~NoSubnormals() { _mm_setcsr(before_); }

private:
    const unsigned before_ = _mm_getcsr();
#else
public:
    NoSubnormals() {}
#endif
};

int64_t slots(const SinkhornShape& s) { return std::max<int64_t>(1, std::min<int64_t>(s.threads, s.problems)); }

}  // namespace

size_t sinkhorn_scratch(const SinkhornShape& s) { return static_cast<size_t>(SinkhornScratch().lay_out(s, 0)); }

size_t sinkhorn_workspace(const SinkhornShape& s) { return slots(s) * sinkhorn_scratch(s) + kAlign; }

void sinkhorn(const std::string& isa, const SinkhornShape& s, const SinkhornData& data, uint8_t* workspace) {
    const SinkhornKernel& kernel = kernel_for(isa);
    set_last_isa(isa.c_str());
    uint8_t* const base = workspace + (kAlign - reinterpret_cast<uintptr_t>(workspace) % kAlign) % kAlign;
    const int64_t scratch = static_cast<int64_t>(sinkhorn_scratch(s));
    parallel_for(s.problems, s.threads, [&](int64_t problem, int slot) {
        const NoSubnormals here;
        kernel.solve(s, data, problem, base + slot * scratch);
    });
}

}  // namespace cmr
