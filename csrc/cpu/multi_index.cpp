// Exact search by substring tables: who searches how much, and building the tables. See multi_index_kernel.h for the
// search itself.
#include "multi_index.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "isa.h"
#include "multi_index_hash.h"
#include "multi_index_kernel.h"
#include "parallel.h"

namespace cmr {
namespace {

constexpr int64_t kQueryGroup = 64;                  // queries that share an account, at most
constexpr int kPartitionBits = 8;                    // ranges of keys that a table is built by
constexpr int64_t kTogether = 1 << 20, kPasses = 4;  // of more codes, tables for a radius are built in so many passes

// The scan's cost in the nanoseconds of multi_index_kernel.h: per code and query, per 64-bit word of it, and per byte
// of the database once for all queries of a batch, from cache or from memory. AVX-512 is that of a Zen 4. On the low
// side: what is given up early is the worst that can happen then.
struct ScanCost {
    double code, word;
};
constexpr double kCostCachedByte = 0.012, kCostMemoryByte = 0.03;
constexpr double kCostSelect = 60;  // per result
constexpr int64_t kCacheBytes = 16 << 20;

ScanCost scan_cost(const std::string& isa) {
    if (isa == "avx512_vpopcntdq") return {0.02, 0.05};
    if (isa == "scalar") return {0.1, 0.95};
    return {0.04, 0.145};
}

const MultiIndexKernel& kernel_for(const std::string& isa) {
    if (!has_isa(isa)) throw std::invalid_argument("this processor or build has no instruction set " + isa);
#if defined(__x86_64__)
    if (isa == "avx512_vpopcntdq") return multi_index_avx512;
    if (isa == "avx512bw" || isa == "avx2") return multi_index_avx2;
#elif defined(__aarch64__)
    if (isa == "neon") return multi_index_neon;
#endif
    return multi_index_scalar;
}

}  // namespace

void Nearest::shrink() {
    if (count < k) return;
    std::nth_element(keys, keys + k - 1, keys + count);
    count = k;
    limit = keys[k - 1];
}

double multi_index_scan_cost(const std::string& isa, int64_t n, int64_t nbytes, int64_t num_queries, int64_t k) {
    const ScanCost scan = scan_cost(isa);
    const double words = nbytes <= 4 ? 0.5 : static_cast<double>((nbytes + 7) / 8);
    const double byte = (n * nbytes <= kCacheBytes ? kCostCachedByte : kCostMemoryByte) * static_cast<double>(nbytes);
    const double queries = static_cast<double>(std::max<int64_t>(1, std::min<int64_t>(num_queries, 256)));
    return static_cast<double>(n) * std::max(scan.code + words * scan.word, byte / queries) +
           static_cast<double>(std::min(k, n / 64)) * kCostSelect;
}

std::array<double, 5> multi_index_costs() { return {kCostQuery, kCostLookup, kCostBucket, kCostWord, kCostSurvivor}; }

namespace {

// Queries that share an account are a task.
struct SearchPlan {
    int64_t group, tasks, room;  // room: keys of one slot
    int64_t slots;

    SearchPlan(int64_t n, int64_t num_queries, int64_t k, int threads) {
        const int64_t share = threads > 1 ? num_queries / (4 * threads) : num_queries;
        group = std::max<int64_t>(1, std::min(share, kQueryGroup));
        tasks = (num_queries + group - 1) / group;
        room = Nearest::room(std::min(k, n));
        slots = std::max<int64_t>(1, std::min<int64_t>(threads, tasks));
    }
};

}  // namespace

size_t multi_index_workspace(int64_t n, int64_t num_queries, int64_t k, int threads) {
    const SearchPlan plan(n, num_queries, k, threads);
    return static_cast<size_t>(plan.slots * plan.room) * sizeof(uint64_t);
}

void multi_index_search(const std::string& isa, const MultiIndex& index, const MultiIndexSearch& s, int32_t* distances,
                        int64_t* indices, uint8_t* done, double* cost, uint8_t* workspace) {
    const MultiIndexKernel& kernel = kernel_for(isa);
    set_last_isa(kernel.isa);
    const SearchPlan plan(index.n, s.num_queries, s.k, s.threads);
    const int64_t kept = std::min(s.k, index.n), group = plan.group, room = plan.room;
    const double scan = multi_index_scan_cost(isa, index.n, index.nbytes, s.num_queries, s.k);
    parallel_for(plan.tasks, s.threads, [&](int64_t task, int slot) {
        const int64_t first = task * group, last = std::min(first + group, s.num_queries);
        double account = s.effort * scan * static_cast<double>(last - first);
        for (int64_t i = first; i < last; ++i) {
            Nearest nearest{reinterpret_cast<uint64_t*>(workspace) + slot * room, kept, room};
            const double allowed = std::isinf(s.effort) ? s.effort : std::min(account, scan);
            cost[i] = 0;
            done[i] = kept == 0 || kernel.search(index, s.queries + i * index.nbytes, nearest, allowed, &cost[i]);
            account += (done[i] ? scan : 0) - cost[i];
            if (!done[i]) continue;
            std::sort(nearest.keys, nearest.keys + nearest.count);
            for (int64_t at = 0; at < nearest.count; ++at) {
                distances[i * s.k + at] = static_cast<int32_t>(nearest.keys[at] >> 32);
                indices[i * s.k + at] = static_cast<int64_t>(nearest.keys[at] & 0xffffffffu);
            }
        }
    });
}

namespace {

struct Entry {
    uint64_t word;
    uint32_t number, key;
};
static_assert(sizeof(Entry) == kEntryBytes);

struct Slot {
    uint32_t value, key;
};
static_assert(sizeof(Slot) == kSlotBytes);

// offsets[key + 1]: where the first of this key belongs. Placing all, one after the other at offsets[key + 1]++, turns
// them into the buckets' begins (offsets[key]) and ends.
template <class KeyOf>
void count_keys(int64_t n, int key_bits, uint32_t* offsets, const KeyOf& key_of) {
    const int64_t buckets = int64_t{1} << key_bits;
    std::fill(offsets, offsets + buckets + 2, 0u);
    for (int64_t i = 0; i < n; ++i) ++offsets[key_of(i) + 2];
    for (int64_t b = 2; b < buckets + 2; ++b) offsets[b] += offsets[b - 1];
}

// Entries 0 .. n-1 bucketed by key, stably, in two rounds so that both stay in cache: first into up to 2^kPartitionBits
// ranges of keys, then inside each. `entry_of(i)` is called once for each i, in order; finish(entries, begin, end) gets
// the entries of a range, in bucket order, that belong at [begin, end) of the result.
template <class KeyOf, class EntryOf, class Finish>
void bucket(int64_t n, int key_bits, int threads, uint32_t* offsets, Entry* entries, const KeyOf& key_of,
            const EntryOf& entry_of, const Finish& finish) {
    count_keys(n, key_bits, offsets, key_of);
    const int64_t buckets = int64_t{1} << key_bits;
    const int shift = std::max(0, key_bits - kPartitionBits);
    const int64_t partitions = buckets >> shift;
    std::vector<uint32_t> cursor(partitions + 1);
    for (int64_t p = 0; p <= partitions; ++p) cursor[p] = offsets[(p << shift) + 1];
    const std::vector<uint32_t> begin = cursor;
    for (int64_t i = 0; i < n; ++i) {
        const Entry entry = entry_of(i);
        entries[cursor[entry.key >> shift]++] = entry;
    }
    const auto end_of = [&](int64_t p) { return p + 1 < partitions ? begin[p + 1] : static_cast<uint32_t>(n); };
    int64_t largest = 0;
    for (int64_t p = 0; p < partitions; ++p) largest = std::max<int64_t>(largest, end_of(p) - begin[p]);
    // a copy for each thread, or for all ranges where that is less
    const int64_t slots = std::max<int64_t>(1, std::min<int64_t>(threads, partitions));
    const bool by_slot = slots * largest < n;
    const std::unique_ptr<Entry[]> copies(new Entry[by_slot ? slots * largest : n]);
    parallel_for(partitions, threads, [&](int64_t p, int slot) {
        const uint32_t first = begin[p], last = end_of(p);
        Entry* const sorted = copies.get() + (by_slot ? slot * largest : first);
        for (uint32_t i = first; i < last; ++i) sorted[offsets[entries[i].key + 1]++ - first] = entries[i];
        finish(sorted, first, last);
    });
}

}  // namespace

void multi_index_order(const uint8_t* codes, int64_t n, int64_t nbytes, int bits, int key_bits, int threads,
                       uint32_t* offsets, uint8_t* entries, uint32_t* order, uint8_t* sorted) {
    const auto code_at = [&](int64_t i) { return codes + i * nbytes; };
    const auto key_of = [&](int64_t i) { return bits_of(code_at(i), nbytes, 0, key_bits); };
    if (key_bits == bits) {  // equal keys are equal codes
        count_keys(n, key_bits, offsets, key_of);
        for (int64_t i = 0; i < n; ++i) order[offsets[key_of(i) + 1]++] = static_cast<uint32_t>(i);
        return;
    }
    const Window window(bits, 0, key_bits);
    const auto entry_of = [&](int64_t i) {
        return Entry{window.of(code_at(i), nbytes, bits), static_cast<uint32_t>(i), static_cast<uint32_t>(key_of(i))};
    };
    const bool whole = bits - key_bits <= 64;  // key and word are all of the code
    const auto less = [&](const Entry& a, const Entry& b) {
        if (a.word != b.word) return a.word < b.word;
        if (whole) return a.number < b.number;
        const int difference = std::memcmp(code_at(a.number), code_at(b.number), nbytes);
        return difference ? difference < 0 : a.number < b.number;
    };
    bucket(n, key_bits, threads, offsets, reinterpret_cast<Entry*>(entries), key_of, entry_of,
           [&](Entry* found, uint32_t begin, uint32_t end) {
               const uint32_t count = end - begin;
               for (uint32_t first = 0, last; first < count; first = last) {
                   for (last = first + 1; last < count && found[last].key == found[first].key;) ++last;
                   std::sort(found + first, found + last, less);
               }
               for (uint32_t i = 0; i < count; ++i) {
                   order[begin + i] = found[i].number;
                   if (sorted) std::memcpy(sorted + int64_t{begin + i} * nbytes, code_at(found[i].number), nbytes);
               }
           });
}

int64_t multi_index_groups(int64_t n, int64_t nbytes, uint8_t* sorted, uint32_t* starts) {
    int64_t groups = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint8_t* code = sorted + i * nbytes;
        if (groups && std::memcmp(sorted + (groups - 1) * nbytes, code, nbytes) == 0) continue;
        std::memmove(sorted + groups * nbytes, code, nbytes);
        starts[groups++] = static_cast<uint32_t>(i);
    }
    starts[groups] = static_cast<uint32_t>(n);
    return groups;
}

void multi_index_table(const uint8_t* sorted, int64_t num_groups, int64_t nbytes, int bits, int first, int key_bits,
                       int threads, uint32_t* offsets, uint8_t* entries, uint32_t* groups, uint64_t* words) {
    const auto key_of = [&](int64_t g) { return bits_of(sorted + g * nbytes, nbytes, first, key_bits); };
    const Window window(bits, first, key_bits);
    const auto entry_of = [&](int64_t g) {
        return Entry{window.of(sorted + g * nbytes, nbytes, bits), static_cast<uint32_t>(g),
                     static_cast<uint32_t>(key_of(g))};
    };
    bucket(num_groups, key_bits, threads, offsets, reinterpret_cast<Entry*>(entries), key_of, entry_of,
           [&](const Entry* found, uint32_t begin, uint32_t end) {
               for (uint32_t i = 0; i < end - begin; ++i) {
                   if (groups) groups[begin + i] = found[i].number;
                   words[begin + i] = found[i].word;
               }
           });
}

// First into ranges of buckets, a chunk of the codes for each thread, then inside each range: all writes stay in cache.
// Of many codes some ranges at a time, so that no more than their part of slots_by_bucket is ever touched.
void range_table(const uint8_t* codes, int64_t n, int64_t nbytes, const uint64_t* mask, int bucket_bits, int index_bits,
                 int threads, uint32_t* offsets, uint8_t* slots_by_bucket, uint32_t* slots) {
    Slot* const found = reinterpret_cast<Slot*>(slots_by_bucket);
    const int shift = std::max(0, bucket_bits - kPartitionBits);
    const int64_t partitions = int64_t{1} << (bucket_bits - shift), buckets = int64_t{1} << shift;
    const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(threads, n >> 16)), chunk = (n + chunks - 1) / chunks;
    std::vector<uint32_t> cursors(chunks * partitions);  // first counts, then places
    const auto each = [&](int64_t c, const auto& body) {
        for (int64_t i = c * chunk; i < std::min(n, (c + 1) * chunk); ++i)
            body(i, Place(hash_code(codes + i * nbytes, nbytes, mask), bucket_bits, index_bits));
    };
    parallel_for(chunks, threads, [&](int64_t c, int) {
        each(c, [&](int64_t, const Place& place) { ++cursors[c * partitions + (place.bucket >> shift)]; });
    });
    std::vector<uint32_t> begin(partitions + 1);
    uint32_t total = 0;
    for (int64_t p = 0; p < partitions; ++p) {
        begin[p] = total;
        for (int64_t c = 0; c < chunks; ++c) {
            const uint32_t count = cursors[c * partitions + p];
            cursors[c * partitions + p] = total;
            total += count;
        }
    }
    begin[partitions] = total;
    const uint32_t most = static_cast<uint32_t>(n > kTogether ? n / kPasses : n);
    for (int64_t from = 0, to; from < partitions; from = to) {
        const uint32_t base = begin[from];
        for (to = from + 1; to < partitions && begin[to + 1] - base <= most;) ++to;
        parallel_for(chunks, threads, [&](int64_t c, int) {
            each(c, [&](int64_t i, const Place& place) {
                const int64_t p = place.bucket >> shift;
                if (p < from || p >= to) return;
                found[cursors[c * partitions + p]++ - base] = {place.tag | static_cast<uint32_t>(i), place.bucket};
            });
        });
        parallel_for(to - from, threads, [&](int64_t range, int) {
            const int64_t p = from + range;
            const Slot *const here = found + (begin[p] - base), *const end = found + (begin[p + 1] - base);
            uint32_t* const first = offsets + p * buckets;
            std::fill(first, first + buckets, 0u);
            for (const Slot* slot = here; slot < end; ++slot) ++offsets[slot->key];
            uint32_t at = begin[p];
            for (int64_t b = 0; b < buckets; ++b) at += std::exchange(first[b], at);
            for (const Slot* slot = here; slot < end; ++slot) slots[offsets[slot->key]++] = slot->value;
            std::memmove(first + 1, first, (buckets - 1) * sizeof(uint32_t));  // ends to begins
            *first = begin[p];
        });
    }
    offsets[partitions * buckets] = total;
}

std::array<double, 3> range_costs() { return {kRangeCostQuery, kRangeCostProbe, kRangeCostCode}; }

namespace {

constexpr int64_t kGroupHits = kQueriesTogether * kHitsKept;

int64_t range_groups(int64_t num_queries) { return (num_queries + kQueriesTogether - 1) / kQueriesTogether; }

RangeGroup group_of(const RangeGroup& all, int64_t nbytes, int64_t group) {
    RangeGroup part = all;
    const int64_t first = group * kQueriesTogether;
    part.queries += first * nbytes;
    part.num_queries = std::min(kQueriesTogether, all.num_queries - first);
    if (part.after >= 0) part.after += first;
    return part;
}

}  // namespace

// For each group: how many hits there are, then room for kGroupHits of them.
size_t range_workspace(int64_t num_queries) {
    return static_cast<size_t>(range_groups(num_queries)) * (kGroupHits + 1) * sizeof(uint64_t);
}

void range_count(const std::string& isa, const RangeIndex& index, const RangeSearch& s, int64_t* counts, uint8_t* done,
                 uint8_t* workspace) {
    const MultiIndexKernel& kernel = kernel_for(isa);
    set_last_isa(kernel.isa);
    uint64_t* const kept = reinterpret_cast<uint64_t*>(workspace);
    parallel_for(range_groups(s.all.num_queries), s.threads, [&](int64_t group, int) {
        const int64_t first = group * kQueriesTogether;
        uint64_t* const mine = kept + group * (kGroupHits + 1);
        mine[0] = static_cast<uint64_t>(kernel.range(index, group_of(s.all, index.nbytes, group), mine + 1, kGroupHits,
                                                     counts + first, done + first));
    });
}

void range_fill(const std::string& isa, const RangeIndex& index, const RangeSearch& s, const int64_t* lims,
                const uint8_t* done, int32_t* distances, int64_t* indices, uint8_t* workspace) {
    const MultiIndexKernel& kernel = kernel_for(isa);
    const uint64_t* const kept = reinterpret_cast<uint64_t*>(workspace);
    parallel_for(range_groups(s.all.num_queries), s.threads, [&](int64_t group, int) {
        RangeGroup part = group_of(s.all, index.nbytes, group);
        const int64_t first = group * kQueriesTogether, last = first + part.num_queries;
        const uint64_t* hits = kept + group * (kGroupHits + 1);
        const int64_t total = static_cast<int64_t>(*hits++);
        if (total > kGroupHits) {  // once more, now that there is room: at the begin of where they go
            part.effort = INFINITY;
            int64_t counts[kQueriesTogether];
            uint8_t again[kQueriesTogether];
            std::copy(done + first, done + last, again);
            kernel.range(index, part, reinterpret_cast<uint64_t*>(indices + lims[first]), total, counts, again);
            hits = reinterpret_cast<const uint64_t*>(indices + lims[first]);
        }
        // backwards: no hit is written over before it is read, since queries that were given up only leave gaps
        int64_t at = total;
        for (int64_t query = last - 1; query >= first; --query) {
            if (!done[query]) continue;
            for (int64_t to = lims[query + 1] - 1; to >= lims[query]; --to) {
                const uint64_t hit = hits[--at];
                distances[to] = static_cast<int32_t>(hit & ((1u << kDistanceBits) - 1));
                indices[to] = static_cast<int64_t>(hit >> kDistanceBits);
            }
        }
    });
}

void range_pairs(const std::string& isa, const RangeIndex& index, const PairJob& job, int64_t tasks, int threads,
                 uint64_t* keys, int32_t* distances, int64_t capacity, int64_t* counts) {
    const MultiIndexKernel& kernel = kernel_for(isa);
    set_last_isa(kernel.isa);
    const int64_t share = (job.last - job.first + tasks - 1) / tasks;
    parallel_for(tasks, threads, [&](int64_t task, int) {
        PairJob part = job;
        part.first = std::min(job.last, job.first + task * share);
        part.last = std::min(job.last, part.first + share);
        counts[task] = kernel.pairs(index, part, keys + task * capacity, distances + task * capacity, capacity);
    });
}

}  // namespace cmr
