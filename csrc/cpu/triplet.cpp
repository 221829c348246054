// Rows as tasks, and their scratch.
#include "triplet.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "isa.h"
#include "parallel.h"

namespace cmr {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kTaskItems = 16384;  // candidates looked at by one task, about: less is not worth another thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

const TripletKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
    set_last_isa(isa.c_str());
#if defined(__x86_64__)
    if (is_avx512(isa)) return triplet_avx512;
    if (isa == "avx2") return triplet_avx2;
#elif defined(__aarch64__)
    if (isa == "neon") return triplet_neon;
#endif
    return triplet_scalar;
}

struct Layout {
    int64_t d, kind, weights, ranks, keys, other, tree, counts, slot = 0;

    explicit Layout(int64_t candidates) {
        const int64_t n = ceil_div(candidates, kLanes) * kLanes;
        const auto place = [this](int64_t bytes) {
            const int64_t at = slot;
            slot += align(bytes);
            return at;
        };
        d = place(4 * n), kind = place(4 * n), weights = place(4 * n), ranks = place(4 * n);
        keys = place(8 * n), other = place(8 * n), tree = place(8 * n + 64), counts = place(16 * (n + 1));
    }

    TripletScratch at(uint8_t* base) const {
        return {reinterpret_cast<float*>(base + d),       reinterpret_cast<int32_t*>(base + kind),
                reinterpret_cast<float*>(base + weights), reinterpret_cast<int32_t*>(base + ranks),
                reinterpret_cast<uint64_t*>(base + keys), reinterpret_cast<uint64_t*>(base + other),
                reinterpret_cast<float*>(base + tree),    reinterpret_cast<uint32_t*>(base + counts)};
    }
};

// Rows of one task, how many tasks, and how many of them at once.
struct Plan {
    int64_t step, tasks;
    int slots;

    Plan(int64_t rows, int64_t candidates, int threads)
        : step(std::max<int64_t>(1, kTaskItems / std::max<int64_t>(1, candidates))),
          tasks(ceil_div(rows, step)),
          slots(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)))) {}
};

// body(row, scratch) for every row of a block
template <class Body>
void for_rows(const TripletBlock& b, uint8_t* workspace, const Body& body) {
    const Layout layout(b.candidates);
    uint8_t* const base =
        reinterpret_cast<uint8_t*>(align(static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace))));
    const Plan plan(b.rows, b.candidates, b.threads);
    parallel_for(plan.tasks, b.threads, [&](int64_t task, int slot) {
        const TripletScratch scratch = layout.at(base + slot * layout.slot);
        for (int64_t row = task * plan.step; row < std::min(b.rows, (task + 1) * plan.step); ++row) body(row, scratch);
    });
}

}  // namespace

size_t triplet_workspace(int64_t rows, int64_t candidates, int threads) {
    return static_cast<size_t>(Plan(rows, candidates, threads).slots * Layout(candidates).slot + kAlign);
}

void triplet_margin(const std::string& isa, const TripletBlock& b, const TripletMargin& m, uint8_t* workspace) {
    const TripletKernel& kernel = kernel_for(isa);
    for_rows(b, workspace, [&](int64_t row, const TripletScratch& scratch) { kernel.margin(b, m, row, scratch); });
}

void triplet_acmr(const std::string& isa, const TripletBlock& b, const AcmrTerms& terms, uint8_t* workspace) {
    const TripletKernel& kernel = kernel_for(isa);
    for_rows(b, workspace, [&](int64_t row, const TripletScratch& scratch) { kernel.acmr(b, terms, row, scratch); });
}

void triplet_acmr_factors(const std::string& isa, const TripletLabels& labels, int64_t n, double weight, bool mean,
                          int threads, int64_t* counts, float* near, float* far) {
    const TripletKernel& kernel = kernel_for(isa);
    const int64_t step = std::max<int64_t>(1, kTaskItems / std::max<int64_t>(1, n));
    parallel_for(ceil_div(n, step), threads, [&](int64_t task, int) {
        for (int64_t row = task * step; row < std::min(n, (task + 1) * step); ++row)
            counts[row] = kernel.count_relevant(labels, row, n);
    });
    int64_t usable = 0;
    for (int64_t i = 0; i < n; ++i) usable += counts[i] > 0 && counts[i] < n;
    for (int64_t i = 0; i < n; ++i) {
        const double positives = static_cast<double>(counts[i]), negatives = static_cast<double>(n - counts[i]);
        if (!mean) {
            near[i] = static_cast<float>(negatives);
            far[i] = static_cast<float>(weight * positives);
        } else if (positives > 0 && negatives > 0) {
            near[i] = static_cast<float>(1 / (positives * static_cast<double>(usable)));
            far[i] = static_cast<float>(weight / (negatives * static_cast<double>(usable)));
        } else {
            near[i] = far[i] = 0;
        }
    }
}

bool triplet_origin(const float* x, int64_t n, const float* y, int64_t m, int64_t width, float* origin) {
    const float* rows[2 * kOriginRows];
    int64_t count = 0;
    for (const auto& [set, size] : {std::pair{x, n}, std::pair{y, m}}) {
        if (set == nullptr || size <= 0) continue;
        const int64_t step = ceil_div(size, kOriginRows);
        for (int64_t i = 0; i < size; i += step) rows[count++] = set + i * width;
    }
    const int64_t middle = count / 2;
    const auto below = [](float a, float b) { return a < b || (std::isnan(b) && !std::isnan(a)); };
    bool any = false;
    for (int64_t k = 0; k < width; ++k) {
        float values[2 * kOriginRows] = {};
        for (int64_t i = 0; i < count; ++i) values[i] = rows[i][k];
        std::nth_element(values, values + middle, values + count, below);
        const float median = values[middle], near = 0.5f * std::abs(median);
        int64_t inside = 0;
        for (int64_t i = 0; i < count; ++i) inside += std::abs(values[i] - median) < near;
        // as many rows as lie within the median deviation lie nearer to the median than half of it
        origin[k] = inside > middle ? median : 0;
        any |= inside > middle;
    }
    return any;
}

void triplet_symmetrise(const std::string& isa, int64_t n, int threads, float* e, float* row_sums) {
    const TripletKernel& kernel = kernel_for(isa);
    if (n * n <= kTaskItems) threads = 1;
    parallel_for(ceil_div(n, kTripletTile), threads, [&](int64_t task, int) { kernel.symmetrise(e, n, task); });
    parallel_for(ceil_div(n, kTripletTile), threads, [&](int64_t task, int) {
        for (int64_t row = task * kTripletTile; row < std::min(n, (task + 1) * kTripletTile); ++row)
            row_sums[row] = kernel.sum(e + row * n, n);
    });
}

}  // namespace cmr
