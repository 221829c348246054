// Rows of a tile as tasks, and their sums in order.
#include "pairwise.h"

#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace cmr {
namespace {

constexpr int64_t kTaskElements = 1 << 14;  // about 10 microseconds

const PairwiseKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
#if defined(__x86_64__)
    if (is_avx512(isa)) return pairwise_avx512;
    if (isa == "avx2") return pairwise_avx2;
#endif
    return pairwise_portable;  // NEON's instructions, on Arm
}

}  // namespace

void pairwise(const std::string& isa, const PairwiseTile& tile, int threads) {
    const PairwiseKernel& kernel = kernel_for(isa);
    set_last_isa(isa.c_str());
    const int64_t rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, tile.columns));
    parallel_for((tile.rows + rows - 1) / rows, threads,
                 [&](int64_t task, int) { kernel.rows(tile, task * rows, std::min(tile.rows, (task + 1) * rows)); });
    for (int64_t i = 0; i < tile.rows; ++i) *tile.total += tile.row_sums[i];
}

}  // namespace cmr
