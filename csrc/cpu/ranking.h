// Ranking statistics of packed codes in one pass over the database per group of queries: distance, label relevance,
// histograms, precision sums and curves. See ranking_kernel.h for the maths, the layout and the bound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cmr {

enum class Cut : int {
    rank = 0,
    relevant = 1,
    hits = 2
};  // first k ranks; first min(k, R) ranks; first min(k, R) hits

struct RankingShape {
    int64_t num_queries, n, nbytes;  // n < 2^31
    int64_t label_bytes;             // multi-hot labels, packed
    bool classes;                    // int32 class ids instead; label_bytes is 4
    bool ordered;                    // ties by index: precision sums, first hits, curves
    bool curves;
    int64_t k;
    Cut cut;
    int threads;

    int64_t levels() const { return 8 * nbytes + 1; }
    int64_t label_words() const { return (label_bytes + 3) / 4; }
    int64_t ranked_words() const { return (n + 63) / 64; }
};

// All memory belongs to the caller.
struct RankingData {
    const uint8_t *q, *db;                // (num_queries, nbytes), (n, nbytes)
    const uint8_t *q_labels, *db_labels;  // (num_queries, label_bytes), (n, label_bytes)
    const int64_t* partners;              // (num_queries,) database rows, or null
    int64_t *items, *relevant;            // (num_queries, levels)
    double* sums;                         // (num_queries,) precisions at the hits inside the cut, summed ...
    int64_t* hits;                        // ... and how many they are
    int64_t* first;                       // (num_queries,) rank of the first hit, from 1; 0 where there is none
    int64_t* tied_before;                 // (num_queries,) items as near as the partner, with a lower index
    int64_t* hit_steps;                   // (n,) queries with a hit at each rank
    double* recall_steps;                 // (n,) their 1 / R, summed in the order of queries
};

constexpr int64_t kChunk =
    16384;                     // codes sorted at once: 16-bit values and two byte copies stay in the second-level cache
constexpr int64_t kPad = 128;  // what vector stores may write behind an array
constexpr int64_t kSubgroup = 4;   // queries that share a transposed tile of codes
constexpr int64_t kMaxGroup = 16;  // queries that share a chunk of the database while it is in cache

// Sizes that ranking.cpp allocates by and kernels step by.
static constexpr int64_t value_stride(int64_t chunk) { return chunk + kPad; }  // of a query's values
static constexpr int64_t bit_words(int64_t chunk, int64_t chunks) { return chunks * (chunk / 64) + 1; }  // of a query
static constexpr int64_t num_starts(int64_t levels) { return levels + 1; }              // of a chunk and a query
static constexpr int64_t num_counts(int64_t levels) { return 4 * 2 * levels; }          // four tables of a query
static constexpr int64_t sort_room(int64_t count) { return (count + kPad) / 64 * 64; }  // one of four parts
static constexpr int64_t sort_bytes(int64_t chunk) { return 4 * sort_room(chunk) + 2 * kPad; }

// What a kernel works in: one group of queries and its scratch, laid out by ranking.cpp.
struct RankingGroup {
    const RankingShape* shape;
    const RankingData* data;
    int64_t first_query, num_queries;
    int64_t chunk;  // codes, a multiple of 64
    int64_t chunks;
    uint8_t* scan;          // scan_scratch_bytes(kSubgroup, nbytes)
    int32_t* distances;     // (kSubgroup, tile)
    uint16_t* values;       // (kSubgroup, value_stride) 2 distance + relevant in index order, in bytes where they fit
    uint32_t* labels;       // (label_words, chunk) planes of the chunk's labels
    uint32_t* q_labels;     // (num_queries, label_words)
    uint8_t* sorting;       // sort_bytes(chunk)
    uint32_t* counts;       // (num_queries, 4, 2 levels) where not ordered, else (2, levels)
    uint64_t* bits;         // (num_queries, chunks * chunk / 64 + 1) relevance of each chunk, sorted by distance
    uint16_t* starts;       // (num_queries, chunks, levels + 1) where each distance begins in it
    uint64_t* ranked;       // relevance in rank order, ranked_words + 1 a query
    int64_t ranked_stride;  // 0: the queries of a group share one row
    int32_t* positions;     // kPositions
};

constexpr int64_t kTile = 2048;
constexpr int64_t kPositionWords = 64;
constexpr int64_t kPositions = kPositionWords * 64 + 32 + kPad;

struct RankingKernel {
    void (*group)(const RankingGroup&);
    // ranks [first, last) of the two curves, first a multiple of 64; weights (num_queries,) is 1 / R
    void (*curves)(const RankingShape&, const uint64_t* ranked, int64_t stride, const double* weights, int64_t first,
                   int64_t last, int64_t* hit_steps, double* recall_steps);
};

extern const RankingKernel ranking_scalar;
#if defined(__x86_64__)
extern const RankingKernel ranking_avx2;
extern const RankingKernel ranking_avx512bw;
extern const RankingKernel ranking_avx512;
#elif defined(__aarch64__)
extern const RankingKernel ranking_neon;
#endif

size_t ranking_workspace(const RankingShape&);
void ranking(const std::string& isa, const RankingShape&, const RankingData&, uint8_t* workspace);

}  // namespace cmr
