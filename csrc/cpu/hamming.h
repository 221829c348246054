// Exact packed-bit Hamming search on the CPU. See hamming_kernel.h for the maths, the layout and the bound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cmr {

// The scratch of a scan: the queries in words, then one tile of word planes. Kernels lay it out by these and callers
// allocate by scan_scratch_bytes. Each file has its own copy: none may take one compiled for another instruction set.
constexpr int64_t kScratchAlign = 64;
constexpr int64_t kTileBytes = 16384;  // of word planes, which stay in the first-level cache
constexpr int64_t kMaxStep = 64;       // codes that a kernel looks at in one step, at most; a tile has at least these

static constexpr int64_t scan_code_bytes(int64_t nbytes, int64_t word) { return (nbytes + word - 1) / word * word; }
static constexpr int64_t scan_query_bytes(int64_t num_queries, int64_t nbytes, int64_t word) {
    return (num_queries * scan_code_bytes(nbytes, word) + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
}
// Codes of a tile, for a kernel of `step` codes.
static constexpr int64_t scan_tile_codes(int64_t nbytes, int64_t word, int64_t step) {
    const int64_t codes = kTileBytes / scan_code_bytes(nbytes, word) / step * step;
    return codes < step ? step : codes;
}
static constexpr int64_t scan_plane_bytes(int64_t nbytes, int64_t word, int64_t step) {
    return scan_tile_codes(nbytes, word, step) * scan_code_bytes(nbytes, word);
}
// Enough for words of 1 to 8 bytes and steps of up to kMaxStep.
static constexpr int64_t scan_scratch_bytes(int64_t num_queries, int64_t nbytes) {
    const int64_t least = scan_plane_bytes(nbytes, 8, kMaxStep), planes = least < kTileBytes ? kTileBytes : least;
    return scan_query_bytes(num_queries, nbytes, 8) + planes;
}

// One query group against one range of the database. All memory belongs to the caller.
struct HammingScan {
    const uint8_t* queries;  // (num_queries, nbytes)
    int64_t num_queries;
    const uint8_t* database;  // (n, nbytes): the range only
    int64_t n;                // < 2^32
    int64_t nbytes;
    uint8_t* scratch;  // scan_scratch_bytes(num_queries, nbytes), 64-byte aligned
};

// What a top-k scan keeps of one query: keys (distance << 32 | index) in index order, room for `capacity` of them.
struct TopK {
    uint64_t* keys;
    uint32_t count;
    uint32_t limit;  // a code is kept where distance < limit
};

struct HammingKernel {
    const char* isa;
    // states[i].keys hold at least min(k, n) keys afterwards, at most k, in index order
    void (*topk)(const HammingScan&, int64_t k, int64_t capacity, TopK* states);
    void (*count)(const HammingScan&, uint32_t radius, int64_t* counts, int64_t stride);
    // query i writes from offsets[i * stride] on; indices get `base` added
    void (*fill)(const HammingScan&, uint32_t radius, const int64_t* offsets, int64_t stride, int64_t base,
                 int32_t* distances, int64_t* indices);
    void (*table)(const HammingScan&, int32_t* out, int64_t row_stride);
    // how many pairs were xor-ed, counted and added, with nothing else done: what a benchmark calls the limit
    int64_t (*arithmetic)(const HammingScan&, int64_t rounds, uint64_t* checksum);
};

extern const HammingKernel hamming_scalar;
#if defined(__x86_64__)
extern const HammingKernel hamming_avx2;
extern const HammingKernel hamming_avx512bw;
extern const HammingKernel hamming_avx512;
#elif defined(__aarch64__)
extern const HammingKernel hamming_neon;
#endif

constexpr int64_t kRangeGroup = 64;  // queries of one range task
constexpr int64_t kScanSlack = 64;   // keys that one step of a scan may append before it looks at the capacity

int64_t topk_capacity(int64_t n, int64_t k);
void topk_compact(TopK& state, int64_t k);

struct HammingShape {
    int64_t num_queries, n, nbytes;
    int64_t k_or_radius;
    int threads;
};

size_t hamming_topk_workspace(const HammingShape&);
void hamming_topk(const std::string& isa, const uint8_t* q, const uint8_t* db, const HammingShape&, int32_t* distances,
                  int64_t* indices, uint8_t* workspace);

// Range search in two passes: counts per (query, split), then, after a running sum over them, the hits themselves.
int64_t hamming_range_splits(const HammingShape&);
size_t hamming_range_workspace(const HammingShape&);
void hamming_range_count(const std::string& isa, const uint8_t* q, const uint8_t* db, const HammingShape&,
                         int64_t* offsets, uint8_t* workspace);
void hamming_range_fill(const std::string& isa, const uint8_t* q, const uint8_t* db, const HammingShape&,
                        const int64_t* offsets, int32_t* distances, int64_t* indices, uint8_t* workspace);

int64_t hamming_arithmetic(const std::string& isa, int64_t nbytes, int64_t rounds);

void hamming_distances(const std::string& isa, const uint8_t* q, const uint8_t* db, int64_t num_queries, int64_t n,
                       int64_t nbytes, int threads, int32_t* out);

}  // namespace cmr
