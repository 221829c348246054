// Every code within a radius that is known beforehand, without looking at all of them.
//
// Maths      Cut the code into m substrings with bounds t(j), the sum of t(j) + 1 being radius + 1. A code at distance
//            <= radius differs in some substring j by at most t(j) bits: were it more in each, it would be farther. So
//            for each table the substring and everything within t(j) flips of it is looked up. A candidate counts in
//            the first table that can have it, and there by the very flips in which it differs: no bitmap, and neither
//            collisions of the hash nor several flips that end in one bucket can count it twice.
// Layout     A substring is any set of bits, so that sure and unsure bits can be dealt out evenly, and is hashed: for
//            wide substrings a look-up finds next to nothing but what it looks for. A slot is the code's index; the
//            bits of its 32 that an index does not need hold more of the hash, so a code is fetched where bucket and
//            tag are right. That is 4 bytes a table and code, and 4 a bucket of 4 to 8 codes.
// Latency    Probes of one query and the next go through three steps a batch: offsets, slots and codes are each asked
//            for before any is read.
// Bound      Memory: two random lines a look-up, one a code that agrees in the substring.
// Tried      Direct-addressed tables of the bits in order, as the search for k has: 2^28 places for 28 bits, and one
//            bucket for everything where bits are dead.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "multi_index.h"
#include "multi_index_hash.h"
#include "multi_index_kernel.h"

namespace cmr {
namespace {

constexpr int kProbes = 64;       // in flight
constexpr int kCandidates = 128;  // codes in flight
constexpr int kMaxWords = 64;

inline int apart_in(const uint64_t* mask, const uint8_t* a, const uint8_t* b, int64_t nbytes) {
    int bits = 0;
    for (int64_t w = 0; w < words_of(nbytes); ++w)
        bits += __builtin_popcountll((word_at(a, nbytes, w) ^ word_at(b, nbytes, w)) & mask[w]);
    return bits;
}

inline void fetch(const uint8_t* code, int64_t nbytes) {
    for (int64_t line = 0; line < nbytes; line += 64) __builtin_prefetch(code + line);
}

struct Range {
    const RangeIndex& index;
    const RangeGroup& group;
    uint64_t* const hits;
    const int64_t capacity;
    int64_t* const counts;
    uint8_t* const done;
    const int64_t words;
    int64_t total = 0;
    const bool limited;
    double account;  // see multi_index_kernel.h
    int64_t settled = 0;
    double spent[kQueriesTogether];

    struct Probe {
        uint32_t bucket, tag;
        uint16_t flipped[kMaxReach];
        uint8_t flips, table;
        int32_t query;
    } probes[kProbes];
    int num_probes = 0;

    struct Candidate {
        uint32_t index;
        int32_t probe;
    } candidates[kCandidates];
    int num_candidates = 0;

    // of the query whose probes are being made
    uint64_t key[kMaxWords];
    uint16_t flipped[kMaxReach];

    Range(const RangeIndex& tables, const RangeGroup& queries, uint64_t* out, int64_t room, int64_t* count,
          uint8_t* ended)
        : index(tables),
          group(queries),
          hits(out),
          capacity(room),
          counts(count),
          done(ended),
          words(words_of(tables.nbytes)),
          limited(!std::isinf(queries.effort)),
          account(queries.effort * queries.scan_cost * static_cast<double>(queries.num_queries)) {}

    int64_t run() {
        for (int64_t i = 0; i < group.num_queries; ++i) {
            counts[i] = 0;
            spent[i] = done[i] ? kRangeCostQuery : 0;
        }
        for (int64_t i = 0; i < group.num_queries; ++i) {
            if (done[i] && limited && account < kRangeCostQuery) give_up(i);
            for (int j = 0; j < index.num_tables && done[i]; ++j)
                if (group.reach[j] >= 0) look_up(i, j);
        }
        flush();
        sort();
        return total;
    }

    void look_up(int64_t query, int table) {
        const uint8_t* code = group.queries + query * index.nbytes;
        const uint64_t* mask = index.tables[table].mask;
        uint64_t hash = 0;
        for (int64_t w = 0; w < words; ++w) {
            if (!mask[w]) continue;
            key[w] = word_at(code, index.nbytes, w) & mask[w];
            hash ^= hash_word(key[w], w);
        }
        flip(query, table, 0, 0, hash);
    }

    // The probe of this key and of all with up to so many more flips of places from `first` on.
    void flip(int64_t query, int table, int flips, int first, uint64_t hash) {
        push(query, table, flips, hash);
        if (flips >= std::min<int>(group.reach[table], kMaxReach)) return;
        const RangeTable& of = index.tables[table];
        for (int p = first; p < of.bits && done[query]; ++p) {
            const int word = of.places[p] / 64;
            const uint64_t old = key[word];
            key[word] ^= uint64_t{1} << of.places[p] % 64;
            flipped[flips] = of.places[p];
            flip(query, table, flips + 1, p + 1, hash ^ hash_word(old, word) ^ hash_word(key[word], word));
            key[word] = old;
        }
    }

    void push(int64_t query, int table, int flips, uint64_t hash) {
        const Place place(hash, index.bucket_bits, index.index_bits);
        __builtin_prefetch(index.tables[table].offsets + place.bucket);
        Probe& probe = probes[num_probes++];
        probe.bucket = place.bucket, probe.tag = place.tag;
        for (int i = 0; i < flips; ++i) probe.flipped[i] = flipped[i];
        probe.flips = static_cast<uint8_t>(flips), probe.table = static_cast<uint8_t>(table);
        probe.query = static_cast<int32_t>(query);
        if (num_probes == kProbes) flush();
    }

    void flush() {
        uint32_t begin[kProbes], end[kProbes];
        for (int i = 0; i < num_probes; ++i) {
            const RangeTable& table = index.tables[probes[i].table];
            begin[i] = table.offsets[probes[i].bucket], end[i] = table.offsets[probes[i].bucket + 1];
            if (begin[i] < end[i]) __builtin_prefetch(table.slots + begin[i]);
            spent[probes[i].query] += kRangeCostProbe;
        }
        const uint32_t of_index = static_cast<uint32_t>(low_bits(index.index_bits));
        for (int i = 0; i < num_probes; ++i) {
            const Probe& probe = probes[i];
            const RangeTable& table = index.tables[probe.table];
            const int64_t after = group.after < 0 ? -1 : group.after + probe.query;
            for (uint32_t at = begin[i]; at < end[i]; ++at) {
                const uint32_t slot = table.slots[at], number = slot & of_index;
                if ((slot & ~of_index) != probe.tag || static_cast<int64_t>(number) <= after) continue;
                if (group.allowed && !(group.allowed[number / 32] >> number % 32 & 1)) continue;
                fetch(index.codes + int64_t{number} * index.nbytes, index.nbytes);
                candidates[num_candidates++] = {number, i};
                if (num_candidates == kCandidates) {
                    compare();
                    if (!done[probe.query]) break;
                }
            }
        }
        compare();
        // queries before the last one have ended
        for (; num_probes && settled < probes[num_probes - 1].query; ++settled)
            account += (done[settled] ? group.scan_cost : 0) - spent[settled];
        num_probes = 0;
    }

    void compare() {
        for (int i = 0; i < num_candidates; ++i) {
            const Probe& probe = probes[candidates[i].probe];
            if (!done[probe.query]) continue;
            spent[probe.query] += kRangeCostCode;
            const uint8_t* code = index.codes + int64_t{candidates[i].index} * index.nbytes;
            const uint8_t* query = group.queries + int64_t{probe.query} * index.nbytes;
            const uint32_t distance = distance_of(query, code, index.nbytes);
            if (distance <= group.radius && met_here(probe, query, code))
                take(probe.query, candidates[i].index, distance);
            if (limited && spent[probe.query] > std::min(account, group.scan_cost)) give_up(probe.query);
        }
        num_candidates = 0;
    }

    // Whether this is the probe that counts a code: it differs by its very flips, and by too many in earlier tables.
    bool met_here(const Probe& probe, const uint8_t* query, const uint8_t* code) const {
        if (apart(probe.table, query, code) != probe.flips) return false;
        for (int i = 0; i < probe.flips; ++i) {
            const int place = probe.flipped[i];
            if (!((query[place / 8] ^ code[place / 8]) >> place % 8 & 1)) return false;
        }
        for (int j = 0; j < probe.table; ++j)
            if (apart(j, query, code) <= group.reach[j]) return false;
        return true;
    }

    int apart(int table, const uint8_t* query, const uint8_t* code) const {
        return apart_in(index.tables[table].mask, query, code, index.nbytes);
    }

    void take(int32_t query, uint32_t number, uint32_t distance) {
        if (total < capacity) hits[total] = uint64_t{number} << kDistanceBits | distance;
        ++total;
        ++counts[query];
    }

    // Its hits are the last, since queries come one after the other.
    void give_up(int64_t query) {
        done[query] = 0;
        total -= counts[query];
        counts[query] = 0;
    }

    void sort() const {
        if (total > capacity) return;
        uint64_t* from = hits;
        for (int64_t i = 0; i < group.num_queries; from += counts[i++]) std::sort(from, from + counts[i]);
    }
};

// A join reads each bucket once: codes are fetched where two of its slots have one tag.
struct Pairs {
    const RangeIndex& index;
    const PairJob& job;
    uint64_t* const keys;
    int32_t* const distances;
    const int64_t capacity;
    int64_t total = 0;
    uint32_t lower[kCandidates] = {}, higher[kCandidates] = {};
    int num_candidates = 0;

    int64_t run() {
        const RangeTable& table = index.tables[job.table];
        const uint32_t of_index = static_cast<uint32_t>(low_bits(index.index_bits));
        const uint32_t* end = table.offsets;  // of the bucket of `at`
        if (job.first < job.last)
            end = std::upper_bound(end, end + (int64_t{1} << index.bucket_bits), static_cast<uint32_t>(job.first));
        for (int64_t at = job.first; at < job.last; ++at) {
            while (*end <= at) ++end;
            const uint32_t slot = table.slots[at], a = slot & of_index;
            if (!takes_part(a)) continue;
            for (int64_t next = at + 1; next < *end; ++next) {
                if ((table.slots[next] ^ slot) & ~of_index) continue;
                const uint32_t b = table.slots[next] & of_index;
                if (takes_part(b)) push(a, b);
            }
        }
        compare();
        return total;
    }

    bool takes_part(uint32_t number) const { return !job.allowed || (job.allowed[number / 32] >> number % 32 & 1); }

    void push(uint32_t a, uint32_t b) {
        fetch(index.codes + int64_t{a} * index.nbytes, index.nbytes);
        fetch(index.codes + int64_t{b} * index.nbytes, index.nbytes);
        lower[num_candidates] = a, higher[num_candidates++] = b;
        if (num_candidates == kCandidates) compare();
    }

    void compare() {
        for (int i = 0; i < num_candidates; ++i) {
            const uint8_t *a = index.codes + int64_t{lower[i]} * index.nbytes,
                          *b = index.codes + int64_t{higher[i]} * index.nbytes;
            const uint32_t distance = distance_of(a, b, index.nbytes);
            if (distance > job.radius || apart_in(index.tables[job.table].mask, a, b, index.nbytes)) continue;
            bool met = false;
            for (int j = 0; j < job.table && !met; ++j) met = !apart_in(index.tables[j].mask, a, b, index.nbytes);
            if (met) continue;
            if (total < capacity) {
                keys[total] = uint64_t{lower[i]} << 32 | higher[i];
                distances[total] = static_cast<int32_t>(distance);
            }
            ++total;
        }
        num_candidates = 0;
    }
};

inline int64_t pairs(const RangeIndex& index, const PairJob& job, uint64_t* keys, int32_t* distances,
                     int64_t capacity) {
    Pairs join{index, job, keys, distances, capacity};
    return join.run();
}

int64_t range(const RangeIndex& index, const RangeGroup& group, uint64_t* hits, int64_t capacity, int64_t* counts,
              uint8_t* done) {
    return Range(index, group, hits, capacity, counts, done).run();
}

}  // namespace
}  // namespace cmr
