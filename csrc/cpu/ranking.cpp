// Groups of queries as tasks, their scratch, and the curves over all of them.
#include "ranking.h"

#include <algorithm>
#include <stdexcept>

#include "hamming.h"
#include "isa.h"
#include "parallel.h"

namespace cmr {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kGroupBytes = 8 << 20;  // what a task keeps of its queries until the database is through
constexpr int64_t kCurveRanks = 8192;     // ranks of one task of the curves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

const RankingKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
#if defined(__x86_64__)
    // all processors with the first but one, long gone, have the second
    if (isa == "avx512_vpopcntdq" && __builtin_cpu_supports("avx512vbmi2")) return ranking_avx512;
    if (isa == "avx512_vpopcntdq" || isa == "avx512bw") return ranking_avx512bw;
    if (isa == "avx2") return ranking_avx2;
#elif defined(__aarch64__)
    if (isa == "neon") return ranking_neon;
#endif
    return ranking_scalar;
}

struct Plan {
    int64_t chunk, chunks, group, groups;
    int64_t scan, distances, values, labels, q_labels, sorting, counts, bits, starts, ranked, positions;
    int64_t slot, shared, weights, total;
    int slots;

    explicit Plan(const RankingShape& s) {
        const int64_t levels = s.levels();
        chunk = std::min(kChunk, std::max<int64_t>(64, ceil_div(s.n, 64) * 64));
        chunks = ceil_div(s.n, chunk);
        const int64_t bits_bytes = bit_words(chunk, chunks) * 8, starts_bytes = chunks * num_starts(levels) * 2;
        const int64_t counts_bytes = num_counts(levels) * 4;
        const int64_t per_query = s.ordered ? bits_bytes + starts_bytes : counts_bytes;
        const int64_t fair = s.threads > 1 ? ceil_div(s.num_queries, 4 * s.threads) : s.num_queries;
        group = std::max<int64_t>(1, std::min({kMaxGroup, fair, kGroupBytes / per_query}));
        groups = ceil_div(s.num_queries, group);
        slots = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(s.threads, groups)));
        slot = 0;
        const auto place = [this](int64_t bytes) {
            const int64_t at = slot;
            slot += align(bytes);
            return at;
        };
        scan = place(scan_scratch_bytes(kSubgroup, s.nbytes));
        distances = place(kSubgroup * kTile * 4);
        values = place(kSubgroup * value_stride(chunk) * 2);
        labels = place((s.label_words() * chunk + kPad) * 4);
        q_labels = place(group * s.label_words() * 4);
        sorting = place(sort_bytes(chunk));
        counts = place(s.ordered ? 2 * levels * 4 : group * counts_bytes);
        bits = place(s.ordered ? group * bits_bytes : 0);
        starts = place(s.ordered ? group * starts_bytes : 0);
        const int64_t row = (s.ranked_words() + 1) * 8;
        ranked = place(s.ordered && !s.curves ? row : 0);
        positions = place(kPositions * 4);
        shared = s.ordered && s.curves ? align(s.num_queries * row) : 0;
        weights = s.ordered && s.curves ? align(s.num_queries * 8) : 0;
        total = slots * slot + shared + weights + kAlign;
    }
};

uint8_t* aligned(uint8_t* p) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + kAlign - 1) / kAlign * kAlign);
}

}  // namespace

size_t ranking_workspace(const RankingShape& s) { return static_cast<size_t>(Plan(s).total); }

void ranking(const std::string& isa, const RankingShape& s, const RankingData& data, uint8_t* workspace) {
    const RankingKernel& kernel = kernel_for(isa);
    const Plan plan(s);
    uint8_t* const base = aligned(workspace);
    uint64_t* const all_ranked = reinterpret_cast<uint64_t*>(base + plan.slots * plan.slot);
    double* const weights = reinterpret_cast<double*>(base + plan.slots * plan.slot + plan.shared);
    const int64_t stride = s.ranked_words() + 1;

    parallel_for(plan.groups, s.threads, [&](int64_t task, int slot) {
        uint8_t* const mine = base + slot * plan.slot;
        const int64_t first = task * plan.group;
        kernel.group({&s, &data, first, std::min(plan.group, s.num_queries - first), plan.chunk, plan.chunks,
                      mine + plan.scan, reinterpret_cast<int32_t*>(mine + plan.distances),
                      reinterpret_cast<uint16_t*>(mine + plan.values), reinterpret_cast<uint32_t*>(mine + plan.labels),
                      reinterpret_cast<uint32_t*>(mine + plan.q_labels), mine + plan.sorting,
                      reinterpret_cast<uint32_t*>(mine + plan.counts), reinterpret_cast<uint64_t*>(mine + plan.bits),
                      reinterpret_cast<uint16_t*>(mine + plan.starts),
                      s.curves ? all_ranked : reinterpret_cast<uint64_t*>(mine + plan.ranked), s.curves ? stride : 0,
                      reinterpret_cast<int32_t*>(mine + plan.positions)});
    });
    if (!s.ordered || !s.curves) return;
    for (int64_t i = 0; i < s.num_queries; ++i) {
        int64_t relevant = 0;
        for (int64_t d = 0; d < s.levels(); ++d) relevant += data.relevant[i * s.levels() + d];
        weights[i] = relevant ? 1.0 / static_cast<double>(relevant) : 0.0;
    }
    parallel_for(ceil_div(s.n, kCurveRanks), s.threads, [&](int64_t task, int) {
        kernel.curves(s, all_ranked, stride, weights, task * kCurveRanks, std::min(s.n, (task + 1) * kCurveRanks),
                      data.hit_steps, data.recall_steps);
    });
}

}  // namespace cmr
