// Exact search over substring tables. See multi_index.cpp for the maths, the layout and the cost model.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace cmr {

// Bits [first, first + bits) of every different code ("group"), bucketed by value.
struct SubstringTable {
    int first, bits;
    const uint32_t* offsets;  // (2^bits + 1) into groups and words
    const uint32_t* groups;   // null: the groups lie in this table's order
    const uint64_t* words;    // what a candidate is filtered by; null where the substring is the whole code
};

struct MultiIndex {
    int64_t n, nbytes;  // n < 2^31
    int bits;
    const uint32_t* order;     // (n) indices, equal codes together and in index order
    const uint32_t* starts;    // (groups + 1) into order; null: every code is different
    const uint8_t* different;  // (groups, nbytes) the codes of the groups; null up to 64 bits: words hold them
    const SubstringTable* tables;
    int num_tables;
};

// Building. `entries` is workspace, kEntryBytes for each code; `offsets` has a spare element: 2^key_bits + 2.
constexpr int64_t kEntryBytes = 16;
// order: indices by (value of the first key_bits bits, code, index); sorted: the codes in this order, or null
void multi_index_order(const uint8_t* codes, int64_t n, int64_t nbytes, int bits, int key_bits, int threads,
                       uint32_t* offsets, uint8_t* entries, uint32_t* order, uint8_t* sorted);
// Keeps the different ones of the sorted codes and returns how many; starts (n + 1): where each begins in `order`
int64_t multi_index_groups(int64_t n, int64_t nbytes, uint8_t* sorted, uint32_t* starts);
// groups may be null, see SubstringTable
void multi_index_table(const uint8_t* sorted, int64_t num_groups, int64_t nbytes, int bits, int first, int key_bits,
                       int threads, uint32_t* offsets, uint8_t* entries, uint32_t* groups, uint64_t* words);

// The k smallest keys (distance << 32 | index).
struct Nearest {
    uint64_t* keys;  // `capacity` of them
    int64_t k, capacity, count = 0;
    uint64_t limit = ~uint64_t{0};  // only smaller keys can still be among them

    static int64_t room(int64_t k) { return k + (k > 16 ? k : 16); }

    bool push(uint64_t key) {
        if (key >= limit) return false;
        keys[count++] = key;
        if (count == capacity) shrink();
        return true;
    }

    void shrink();

    // At least k codes are known to be this near, taken or not.
    void within(uint32_t distance) {
        const uint64_t beyond = (uint64_t{distance} + 1) << 32;
        if (beyond < limit) limit = beyond;
    }

    uint32_t farthest() const { return static_cast<uint32_t>((limit - 1) >> 32); }  // that could still be pushed
};

// A search whose radius is known beforehand asks tables of wide substrings, of any bits: see multi_index_range.h.
struct RangeTable {
    const uint64_t* mask;    // (words) the substring's bits
    const uint16_t* places;  // (bits) which they are
    int bits;
    const uint32_t* offsets;  // (2^bucket_bits + 1) into slots
    const uint32_t* slots;    // (n) more bits of the hash << index_bits | index, rising within a bucket
};

struct RangeIndex {
    const uint8_t* codes;  // (n, nbytes)
    int64_t n, nbytes;     // n < 2^31
    int bucket_bits, index_bits;
    const RangeTable* tables;
    int num_tables;
};

// A group of queries. Hits are (index << kDistanceBits | distance), query after query, by index in each.
struct RangeGroup {
    const uint8_t* queries;  // (num_queries, nbytes)
    int64_t num_queries;
    uint32_t radius;
    const int8_t* reach;      // (num_tables) how many bits may differ in each substring; negative: not asked
    const uint32_t* allowed;  // (ceil(n / 32)) a bit for each code that counts; null: all
    int64_t after;            // query i counts codes beyond after + i alone; negative: all
    double effort;            // what queries may spend without result, of scan_cost for all of them; infinite: no limit
    double scan_cost;         // of a query
};

// Pairs of codes that agree in a table's substring: of the code of each slot in [first, last) and those of later slots
// of its bucket. A pair counts in the first table in which it agrees.
struct PairJob {
    int table;
    int64_t first, last;
    uint32_t radius;
    const uint32_t* allowed;  // as in RangeGroup
};

struct MultiIndexKernel {
    const char* isa;
    // one query; false: given up, because it would cost more than `allowed`
    bool (*search)(const MultiIndex&, const uint8_t* query, Nearest&, double allowed, double* cost);
    // counts[i]: hits of query i, also of those beyond `capacity`, which are not kept. Queries of done[i] = 0 are left
    // out; those given up get it. Returns how many hits there are.
    int64_t (*range)(const RangeIndex&, const RangeGroup&, uint64_t* hits, int64_t capacity, int64_t* counts,
                     uint8_t* done);
    // keys: lower index << 32 | higher index. Returns how many pairs there are, also of those beyond `capacity`.
    int64_t (*pairs)(const RangeIndex&, const PairJob&, uint64_t* keys, int32_t* distances, int64_t capacity);
};

extern const MultiIndexKernel multi_index_scalar;
#if defined(__x86_64__)
extern const MultiIndexKernel multi_index_avx2;
extern const MultiIndexKernel multi_index_avx512;
#elif defined(__aarch64__)
extern const MultiIndexKernel multi_index_neon;
#endif

struct MultiIndexSearch {
    const uint8_t* queries;
    int64_t num_queries, k;
    int threads;
    double effort;  // how much a group of queries may spend without result, as a share of its scan; infinite: no limit
};

// The cost of scanning, per query of a batch of num_queries, in the model's nanoseconds.
double multi_index_scan_cost(const std::string& isa, int64_t n, int64_t nbytes, int64_t num_queries, int64_t k);
std::array<double, 5> multi_index_costs();
size_t multi_index_workspace(int64_t n, int64_t num_queries, int64_t k, int threads);
// done[i] = 1: row i of distances and indices is final. 0: given up, the row is untouched. cost[i]: what it spent.
void multi_index_search(const std::string& isa, const MultiIndex&, const MultiIndexSearch&, int32_t* distances,
                        int64_t* indices, uint8_t* done, double* cost, uint8_t* workspace);

// Of tables for a known radius. `slots_by_bucket` is workspace, kSlotBytes for each code.
constexpr int64_t kSlotBytes = 8;
void range_table(const uint8_t* codes, int64_t n, int64_t nbytes, const uint64_t* mask, int bucket_bits, int index_bits,
                 int threads, uint32_t* offsets, uint8_t* slots_by_bucket, uint32_t* slots);

constexpr int kDistanceBits = 16;
constexpr int kMaxReach = 4;              // bits of a substring that may differ
constexpr int64_t kQueriesTogether = 64;  // a group
constexpr int64_t kHitsKept = 32;         // of a query of a group, on average; beyond, it is searched again

struct RangeSearch {
    RangeGroup all;  // every query
    int threads;
};

std::array<double, 3> range_costs();
size_t range_workspace(int64_t num_queries);
// counts[i]: hits of query i. done[i] = 0: given up, counts[i] is 0.
void range_count(const std::string& isa, const RangeIndex&, const RangeSearch&, int64_t* counts, uint8_t* done,
                 uint8_t* workspace);
// After range_count with the same workspace: the hits of query i from lims[i] on, of those that are done.
void range_fill(const std::string& isa, const RangeIndex&, const RangeSearch&, const int64_t* lims, const uint8_t* done,
                int32_t* distances, int64_t* indices, uint8_t* workspace);

// A job in `tasks` parts: part t has counts[t] pairs, of which up to `capacity` stand from t * capacity on.
void range_pairs(const std::string& isa, const RangeIndex&, const PairJob&, int64_t tasks, int threads, uint64_t* keys,
                 int32_t* distances, int64_t capacity, int64_t* counts);

}  // namespace cmr
