// The hash of a substring of any bits, by which tables for a known radius are built and searched, and what these cost.
#pragma once

#include <cstdint>

#include "multi_index_kernel.h"

namespace cmr {
namespace {

// Nanoseconds, as those of multi_index_kernel.h: fitted to 1 and 20 M codes of 64 to 512 bits.
constexpr double kRangeCostQuery = 100;
constexpr double kRangeCostProbe = 40;
constexpr double kRangeCostCode = 50;

// The hash of a substring is the xor of its words' hashes: a flipped bit changes one of them.
inline uint64_t hash_word(uint64_t x, int64_t word) {
    const uint64_t odd = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(2 * word + 1);
    __extension__ using wide = unsigned __int128;
    const wide product = static_cast<wide>(x ^ 0x8ebc6af09c88c6e3u) * odd;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline int64_t words_of(int64_t nbytes) { return (nbytes + 7) / 8; }

inline uint64_t word_at(const uint8_t* code, int64_t nbytes, int64_t word) {
    return load_word(code + 8 * word, nbytes - 8 * word);
}

inline uint64_t hash_code(const uint8_t* code, int64_t nbytes, const uint64_t* mask) {
    uint64_t hash = 0;
    for (int64_t w = 0; w < words_of(nbytes); ++w)
        if (mask[w]) hash ^= hash_word(word_at(code, nbytes, w) & mask[w], w);
    return hash;
}

// Where a hash belongs, and what its slots have above their indices.
struct Place {
    uint32_t bucket, tag;

    Place(uint64_t hash, int bucket_bits, int index_bits)
        : bucket(static_cast<uint32_t>(hash >> (64 - bucket_bits))),
          tag(static_cast<uint32_t>(hash >> (32 - bucket_bits)) & ~static_cast<uint32_t>(low_bits(index_bits))) {}
};

}  // namespace
}  // namespace cmr
