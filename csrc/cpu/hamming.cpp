// Splitting a search into tasks, choosing the kernel, putting the parts together.
#include "hamming.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace cmr {
namespace {

constexpr int64_t kAlign = kScratchAlign;
constexpr int64_t kMaxBits = 4096;
constexpr int64_t kStateBytes = 8 << 20;         // top-k buffers of one task
constexpr int64_t kMinSplit = 1 << 16;           // codes, below which splitting the database costs more than it gives
constexpr int64_t kMaxSplit = int64_t{1} << 31;  // indices inside a split are 32 bits wide

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

const HammingKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
#if defined(__x86_64__)
    if (isa == "avx512_vpopcntdq") return hamming_avx512;
    if (isa == "avx512bw") return hamming_avx512bw;
    if (isa == "avx2") return hamming_avx2;
#elif defined(__aarch64__)
    if (isa == "neon") return hamming_neon;
#endif
    return hamming_scalar;
}

// Tasks are groups of queries times ranges of the database; tasks of one group differ in the range only.
struct Plan {
    int64_t group = 1, groups = 0, splits = 1, split = 0;

    Plan(const HammingShape& s, int64_t max_group) {
        const int64_t wanted = s.threads > 1 ? 4 * s.threads : 1;
        const int64_t small = s.threads > 1 ? std::max<int64_t>(32, ceil_div(s.num_queries, wanted)) : s.num_queries;
        group = std::max<int64_t>(1, std::min({max_group, small, s.num_queries}));
        groups = ceil_div(s.num_queries, group);
        splits = std::max<int64_t>(1, std::min(ceil_div(wanted, std::max<int64_t>(groups, 1)), s.n / kMinSplit));
        splits = std::max(splits, ceil_div(s.n, kMaxSplit));
        split = std::max<int64_t>(1, ceil_div(s.n, splits));
    }

    int64_t tasks() const { return groups * splits; }
};

HammingScan scan_of(const Plan& plan, const HammingShape& s, const uint8_t* q, const uint8_t* db, int64_t task,
                    uint8_t* scratch) {
    const int64_t first_query = task / plan.splits * plan.group, first = task % plan.splits * plan.split;
    return {q + first_query * s.nbytes,
            std::min(plan.group, s.num_queries - first_query),
            db + first * s.nbytes,
            std::max<int64_t>(0, std::min(plan.split, s.n - first)),
            s.nbytes,
            scratch};
}

int slots(const HammingShape& s, const Plan& plan) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(s.threads, plan.tasks())));
}

Plan topk_plan(const HammingShape& s) {
    const int64_t per_query = topk_capacity(s.n, s.k_or_radius) * static_cast<int64_t>(sizeof(uint64_t));
    return Plan(s, std::max<int64_t>(1, std::min<int64_t>(256, kStateBytes / per_query)));
}

struct TopKMemory {
    int64_t capacity, kept;  // keys of one query: while it scans, and of one range afterwards
    int64_t scratch, states, keys, slot, counts, partial, total;

    TopKMemory(const HammingShape& s, const Plan& plan) {
        capacity = topk_capacity(plan.split, s.k_or_radius);
        kept = std::min(s.k_or_radius, plan.split);
        scratch = align(scan_scratch_bytes(plan.group, s.nbytes));
        states = align(plan.group * static_cast<int64_t>(sizeof(TopK)));
        keys = align(plan.group * capacity * static_cast<int64_t>(sizeof(uint64_t)));
        slot = scratch + states + keys;
        const bool merge = plan.splits > 1;
        counts = merge ? align(s.num_queries * plan.splits * static_cast<int64_t>(sizeof(uint32_t))) : 0;
        partial = merge ? align(s.num_queries * plan.splits * kept * static_cast<int64_t>(sizeof(uint64_t))) : 0;
        total = slots(s, plan) * slot + counts + partial + kAlign;
    }
};

uint8_t* aligned(uint8_t* p) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + kAlign - 1) / kAlign * kAlign);
}

// Keys of several ranges, each in index order -> the k nearest by (distance, index), by counting.
struct Part {
    const uint64_t* keys;
    uint32_t count;
    int64_t base;
};

// part(p) is asked for each of them twice.
template <class PartOf>
void write_sorted(int64_t num_parts, const PartOf& part, int64_t k, int64_t bits, int32_t* distances,
                  int64_t* indices) {
    int64_t place[kMaxBits + 2];
    std::fill(place, place + bits + 2, 0);
    for (int64_t p = 0; p < num_parts; ++p) {
        const Part from = part(p);
        for (uint32_t i = 0; i < from.count; ++i) ++place[(from.keys[i] >> 32) + 1];
    }
    for (int64_t d = 0; d <= bits; ++d) place[d + 1] += place[d];
    for (int64_t p = 0; p < num_parts; ++p) {
        const Part from = part(p);
        for (uint32_t i = 0; i < from.count; ++i) {
            const uint64_t key = from.keys[i];
            const int64_t at = place[key >> 32]++;
            if (at >= k) continue;
            distances[at] = static_cast<int32_t>(key >> 32);
            indices[at] = from.base + static_cast<int64_t>(key & 0xffffffffu);
        }
    }
}

// Large k: every distance of a query is written down and counted, then those up to the k-th go to their places. Two
// passes without a branch that depends on the codes cost less than keeping so many survivors.
constexpr int64_t kDenseShare = 4;        // from k = n / kDenseShare on
constexpr int64_t kDenseBlock = 4096;     // codes whose distances are made together
constexpr int64_t kDenseCodes = 1 << 26;  // of a query, at most: they take 2 bytes each
constexpr int kCounters = 4;              // histograms of a range, so that equal neighbours do not wait for each other
constexpr int64_t kDenseStep = 16;        // distances that are looked at together

bool is_dense(const HammingShape& s) {
    return s.n > 0 && s.n <= kDenseCodes && s.k_or_radius >= ceil_div(s.n, kDenseShare);
}

// Many queries: each is a task. Fewer than threads: each in turn, its codes split over the threads.
struct DenseMemory {
    int64_t splits, split, slots, scratch, block, counts, slot, rows, row, total;

    explicit DenseMemory(const HammingShape& s) {
        splits = s.num_queries >= s.threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(s.threads, s.n / kMinSplit));
        split = ceil_div(ceil_div(s.n, splits), kDenseStep) * kDenseStep;
        splits = ceil_div(s.n, split);
        rows = splits > 1 ? 1 : std::max<int64_t>(1, std::min<int64_t>(s.threads, s.num_queries));
        slots = std::max(rows, splits);
        scratch = align(scan_scratch_bytes(1, s.nbytes));
        block = align(kDenseBlock * static_cast<int64_t>(sizeof(int32_t)));
        counts = align(kCounters * (8 * s.nbytes + 1) * static_cast<int64_t>(sizeof(int64_t)));
        slot = scratch + block + counts;
        row = align((s.n + kDenseStep) * static_cast<int64_t>(sizeof(int16_t)));
        total = slots * slot + rows * row + kAlign;
    }
};

// Distances of codes [first, first + count) into `row`, and how many there are of each into counts[0 .. bits].
void write_down(const HammingKernel& kernel, const uint8_t* q, const uint8_t* db, const HammingShape& s, int64_t first,
                int64_t count, const DenseMemory& memory, uint8_t* mine, int16_t* row) {
    int32_t* const block = reinterpret_cast<int32_t*>(mine + memory.scratch);
    int64_t* const counts = reinterpret_cast<int64_t*>(mine + memory.scratch + memory.block);
    const int64_t values = 8 * s.nbytes + 1;
    std::fill(counts, counts + kCounters * values, 0);
    for (int64_t begin = first; begin < first + count; begin += kDenseBlock) {
        const int64_t size = std::min(kDenseBlock, first + count - begin);
        kernel.table({q, 1, db + begin * s.nbytes, size, s.nbytes, mine}, block, size);
        for (int64_t i = 0; i < size; ++i) row[begin + i] = static_cast<int16_t>(block[i]);
        int64_t i = 0;
        for (; i + kCounters <= size; i += kCounters)
            for (int c = 0; c < kCounters; ++c) ++counts[c * values + block[i + c]];
        for (; i < size; ++i) ++counts[block[i]];
    }
    for (int c = 1; c < kCounters; ++c)
        for (int64_t d = 0; d < values; ++d) counts[d] += counts[c * values + d];
}

// The codes of a range at distance <= cut, in index order, each to the next place of its distance.
void to_places(const int16_t* row, int64_t first, int64_t count, int64_t k, int16_t cut, int64_t* place,
               int32_t* distances, int64_t* indices) {
    uint8_t near[kDenseStep];
    for (int64_t begin = first; begin < first + count; begin += kDenseStep) {
        const int64_t size = std::min(kDenseStep, first + count - begin);
        const int16_t* const step = row + begin;
        if (size == kDenseStep) {
            int16_t least = step[0];
            for (int64_t i = 0; i < kDenseStep; ++i) least = step[i] < least ? step[i] : least;
            if (least > cut) continue;
        }
        int64_t found = 0;
        for (int64_t i = 0; i < size; ++i) {
            near[found] = static_cast<uint8_t>(i);
            found += step[i] <= cut;
        }
        for (int64_t i = 0; i < found; ++i) {
            const int16_t d = step[near[i]];
            const int64_t at = place[d]++;
            if (at >= k) continue;
            distances[at] = d;
            indices[at] = begin + near[i];
        }
    }
}

void topk_dense(const HammingKernel& kernel, const uint8_t* q, const uint8_t* db, const HammingShape& s,
                int32_t* distances, int64_t* indices, uint8_t* workspace) {
    const DenseMemory memory(s);
    const int64_t k = s.k_or_radius, values = 8 * s.nbytes + 1;
    uint8_t* const base = aligned(workspace);
    const auto slot_of = [&](int64_t slot) { return base + slot * memory.slot; };
    const auto row_of = [&](int64_t slot) {
        return reinterpret_cast<int16_t*>(slot_of(memory.slots) + slot * memory.row);
    };
    const auto counts_of = [&](int64_t slot) {
        return reinterpret_cast<int64_t*>(slot_of(slot) + memory.scratch + memory.block);
    };
    // `count` slots with counts of each distance -> the places of the first of each; the distance of the k-th
    const auto to_starts = [&](int64_t first, int64_t count) {
        int64_t before = 0;
        int16_t cut = static_cast<int16_t>(values - 1);
        bool passed = false;
        for (int64_t d = 0; d < values; ++d) {
            for (int64_t slot = first; slot < first + count; ++slot) {
                const int64_t here = counts_of(slot)[d];
                counts_of(slot)[d] = before;
                before += here;
            }
            if (!passed && before >= k) cut = static_cast<int16_t>(d), passed = true;
        }
        return cut;
    };
    if (memory.splits == 1) {
        parallel_for(s.num_queries, s.threads, [&](int64_t query, int slot) {
            write_down(kernel, q + query * s.nbytes, db, s, 0, s.n, memory, slot_of(slot), row_of(slot));
            const int16_t cut = to_starts(slot, 1);
            to_places(row_of(slot), 0, s.n, k, cut, counts_of(slot), distances + query * k, indices + query * k);
        });
        return;
    }
    const auto size_of = [&](int64_t split) { return std::min(memory.split, s.n - split * memory.split); };
    for (int64_t query = 0; query < s.num_queries; ++query) {
        // the split's number says the memory, for both passes: whichever thread takes it
        parallel_for(memory.splits, s.threads, [&](int64_t split, int) {
            write_down(kernel, q + query * s.nbytes, db, s, split * memory.split, size_of(split), memory,
                       slot_of(split), row_of(0));
        });
        const int16_t cut = to_starts(0, memory.splits);
        parallel_for(memory.splits, s.threads, [&](int64_t split, int) {
            to_places(row_of(0), split * memory.split, size_of(split), k, cut, counts_of(split), distances + query * k,
                      indices + query * k);
        });
    }
}

Plan range_plan(const HammingShape& s) { return Plan(s, kRangeGroup); }

uint32_t clamp_radius(const HammingShape& s) {
    return static_cast<uint32_t>(std::min<int64_t>(s.k_or_radius, 8 * s.nbytes));
}

}  // namespace

int64_t topk_capacity(int64_t n, int64_t k) { return std::min(n, k + std::max<int64_t>(k, 64)) + kScanSlack; }

void topk_compact(TopK& state, int64_t k) {
    if (state.count < k) return;
    uint32_t histogram[kMaxBits + 1];
    uint32_t widest = 0;
    for (uint32_t i = 0; i < state.count; ++i) widest = std::max(widest, static_cast<uint32_t>(state.keys[i] >> 32));
    std::fill(histogram, histogram + widest + 1, 0);
    for (uint32_t i = 0; i < state.count; ++i) ++histogram[state.keys[i] >> 32];
    uint32_t cut = 0;
    int64_t below = 0;
    while (below + histogram[cut] < k) below += histogram[cut++];
    int64_t at_cut = k - below;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < state.count; ++i) {  // a branch would be guessed wrong for every other key
        const uint64_t key = state.keys[i];
        const uint32_t d = static_cast<uint32_t>(key >> 32);
        const bool tied = d == cut;
        state.keys[kept] = key;
        kept += (d < cut) | (tied & (at_cut > 0));
        at_cut -= tied;
    }
    state.count = kept;
    state.limit = cut;
}

size_t hamming_topk_workspace(const HammingShape& s) {
    return is_dense(s) ? DenseMemory(s).total : TopKMemory(s, topk_plan(s)).total;
}

void hamming_topk(const std::string& isa, const uint8_t* q, const uint8_t* db, const HammingShape& s,
                  int32_t* distances, int64_t* indices, uint8_t* workspace) {
    const HammingKernel& kernel = kernel_for(isa);
    if (is_dense(s)) {
        topk_dense(kernel, q, db, s, distances, indices, workspace);
        return;
    }
    const Plan plan = topk_plan(s);
    const TopKMemory memory(s, plan);
    const int64_t k = s.k_or_radius, bits = 8 * s.nbytes;
    const int64_t capacity = memory.capacity, kept = memory.kept;
    uint8_t* const base = aligned(workspace);
    uint32_t* const counts = reinterpret_cast<uint32_t*>(base + slots(s, plan) * memory.slot);
    uint64_t* const partial = reinterpret_cast<uint64_t*>(base + slots(s, plan) * memory.slot + memory.counts);

    parallel_for(plan.tasks(), s.threads, [&](int64_t task, int slot) {
        uint8_t* const mine = base + slot * memory.slot;
        const HammingScan job = scan_of(plan, s, q, db, task, mine);
        TopK* const states = reinterpret_cast<TopK*>(mine + memory.scratch);
        uint64_t* const keys = reinterpret_cast<uint64_t*>(mine + memory.scratch + memory.states);
        for (int64_t i = 0; i < job.num_queries; ++i)
            states[i] = {keys + i * capacity, 0, static_cast<uint32_t>(bits + 1)};
        kernel.topk(job, k, capacity, states);
        const int64_t first_query = task / plan.splits * plan.group, split = task % plan.splits;
        for (int64_t i = 0; i < job.num_queries; ++i) {
            const int64_t query = first_query + i;
            if (plan.splits == 1) {
                const auto whole = [&](int64_t) { return Part{states[i].keys, states[i].count, 0}; };
                write_sorted(1, whole, k, bits, distances + query * k, indices + query * k);
            } else {
                counts[query * plan.splits + split] = states[i].count;
                std::memcpy(partial + (query * plan.splits + split) * kept, states[i].keys,
                            states[i].count * sizeof(uint64_t));
            }
        }
    });
    if (plan.splits == 1) return;
    parallel_for(s.num_queries, s.threads, [&](int64_t query, int) {
        const auto part = [&](int64_t p) {
            const int64_t at = query * plan.splits + p;
            return Part{partial + at * kept, counts[at], p * plan.split};
        };
        write_sorted(plan.splits, part, k, bits, distances + query * k, indices + query * k);
    });
}

int64_t hamming_range_splits(const HammingShape& s) { return range_plan(s).splits; }

size_t hamming_range_workspace(const HammingShape& s) {
    const Plan plan = range_plan(s);
    return slots(s, plan) * align(scan_scratch_bytes(plan.group, s.nbytes)) + kAlign;
}

void hamming_range_count(const std::string& isa, const uint8_t* q, const uint8_t* db, const HammingShape& s,
                         int64_t* offsets, uint8_t* workspace) {
    const HammingKernel& kernel = kernel_for(isa);
    const Plan plan = range_plan(s);
    const int64_t slot_bytes = align(scan_scratch_bytes(plan.group, s.nbytes));
    parallel_for(plan.tasks(), s.threads, [&](int64_t task, int slot) {
        const HammingScan job = scan_of(plan, s, q, db, task, aligned(workspace) + slot * slot_bytes);
        const int64_t first_query = task / plan.splits * plan.group, split = task % plan.splits;
        kernel.count(job, clamp_radius(s), offsets + 1 + first_query * plan.splits + split, plan.splits);
    });
}

void hamming_range_fill(const std::string& isa, const uint8_t* q, const uint8_t* db, const HammingShape& s,
                        const int64_t* offsets, int32_t* distances, int64_t* indices, uint8_t* workspace) {
    const HammingKernel& kernel = kernel_for(isa);
    const Plan plan = range_plan(s);
    const int64_t slot_bytes = align(scan_scratch_bytes(plan.group, s.nbytes));
    parallel_for(plan.tasks(), s.threads, [&](int64_t task, int slot) {
        const HammingScan job = scan_of(plan, s, q, db, task, aligned(workspace) + slot * slot_bytes);
        const int64_t first_query = task / plan.splits * plan.group, split = task % plan.splits;
        kernel.fill(job, clamp_radius(s), offsets + first_query * plan.splits + split, plan.splits, split * plan.split,
                    distances, indices);
    });
}

int64_t hamming_arithmetic(const std::string& isa, int64_t nbytes, int64_t rounds) {
    constexpr int64_t kQueries = 8, kCodes = 4096;
    std::vector<uint8_t> q(kQueries * nbytes), db(kCodes * nbytes);
    uint32_t random = 1;
    for (auto* v : {&q, &db})
        for (uint8_t& byte : *v) byte = static_cast<uint8_t>((random = random * 1664525u + 1013904223u) >> 24);
    std::vector<uint8_t> scratch(align(scan_scratch_bytes(kQueries, nbytes)) + kAlign);
    uint64_t checksum = 0;
    const HammingScan job{q.data(), kQueries, db.data(), kCodes, nbytes, aligned(scratch.data())};
    const int64_t pairs = kernel_for(isa).arithmetic(job, rounds, &checksum);
    return checksum ? pairs : 0;
}

void hamming_distances(const std::string& isa, const uint8_t* q, const uint8_t* db, int64_t num_queries, int64_t n,
                       int64_t nbytes, int threads, int32_t* out) {
    const HammingKernel& kernel = kernel_for(isa);
    const HammingShape s{num_queries, n, nbytes, 0, threads};
    const Plan plan = range_plan(s);
    const int64_t slot_bytes = align(scan_scratch_bytes(plan.group, nbytes));
    std::vector<uint8_t> scratch(slots(s, plan) * slot_bytes + kAlign);
    parallel_for(plan.tasks(), threads, [&](int64_t task, int slot) {
        const HammingScan job = scan_of(plan, s, q, db, task, aligned(scratch.data()) + slot * slot_bytes);
        kernel.table(job, out + task / plan.splits * plan.group * n + task % plan.splits * plan.split, n);
    });
}

}  // namespace cmr
