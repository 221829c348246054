// Which kernel runs, and on how many samples at a time.
#include "pgd.h"

#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace cmr {
namespace {

constexpr int64_t kTask = 32768;  // elements: long enough to be worth a thread's waking

const PgdKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
#if defined(__x86_64__)
    if (is_avx512(isa)) return pgd_avx512;
    if (isa == "avx2") return pgd_avx2;
#elif defined(__aarch64__)
    if (isa == "neon") return pgd_neon;
#endif
    return pgd_scalar;
}

template <class Body>
void over_samples(int64_t samples, int64_t elements, int threads, const Body& body) {
    const int64_t each = std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements));
    parallel_for((samples + each - 1) / each, threads,
                 [&](int64_t task, int) { body(task * each, std::min(samples, (task + 1) * each)); });
}

}  // namespace

void pgd_step(const std::string& isa, const PgdStep& step) {
    const PgdKernel& kernel = kernel_for(isa);
    set_last_isa(isa.c_str());
    over_samples(step.samples, step.channels * step.inner, step.threads,
                 [&](int64_t first, int64_t last) { kernel.step(step, first, last); });
}

void pgd_noise(const std::string& isa, const PgdNoise& noise) {
    const PgdKernel& kernel = kernel_for(isa);
    set_last_isa(isa.c_str());
    over_samples(noise.samples, noise.count, noise.threads,
                 [&](int64_t first, int64_t last) { kernel.noise(noise, first, last); });
}

}  // namespace cmr
