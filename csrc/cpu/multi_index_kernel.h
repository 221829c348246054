// Exact k nearest codes without looking at all of them: multi-index hashing (Norouzi, Punjani, Fleet 2012).
//
// Maths      Cut the code into m substrings. A code at distance d <= s from the query differs in some substring j by at
//            most floor(s / m), and by at most floor(s / m) - 1 unless j <= s mod m. So step s probes, in the table of
//            substring s mod m, the buckets at distance exactly floor(s / m), and after it every code at distance <= s
//            has been seen. The search ends as soon as the k-th distance is <= s: ties at it have been seen too, and
//            the lower index wins. A candidate counts where it is met first, which its own substring distances tell:
//            no bitmap.
// Groups     Learned codes repeat. Equal codes are one group with its indices in order: tables hold groups.
// Layout     Per table, a bucket's groups lie side by side, with a word each: the whole code up to 64 bits, else the up
//            to 64 bits before the substring. A bucket is read as a stream, and only what its word does not exclude is
//            looked up. That is 12 bytes a table and code, and one cache miss a bucket instead of one a code. With one
//            table the substring is the whole code: a bucket is a group, and nothing needs comparing.
// Latency    Buckets are probed kBatch at a time: prefetch all offsets, then all first words, then compare.
// Cost       In nanoseconds of the machine it was calibrated on; only ratios matter. A query gives up when it has spent
//            what its group of queries may lose: the account begins at `effort` times the group's scan, a search that
//            ends adds what it saved, one that gives up takes what it spent. So all of it, and the scan of what was
//            given up, cost about 1 + effort times the scan of everything, whatever the codes.
// Bound      Memory: a random line a bucket (about 40 ns with kBatch in flight), then 8 bytes a code as a stream.
// Tried      Codes looked up by index for each candidate (a miss a code, 50 times the price of a streamed word); small
//            pages (1.5 to 3 times slower); taking whatever the first bucket holds (300 look-ups instead of 50).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "multi_index.h"

namespace cmr {
namespace {

constexpr int64_t kBatch = 64;
constexpr uint32_t kAhead = 64;  // lines of the next bucket that are asked for early
constexpr int kChunk = 256;      // words filtered before the limit is looked at again

// What things cost in nanoseconds, fitted to searches of 0.5 to 20 M codes of 64 bits, clustered and random, k = 10 and
// 100, by 3 to 5 tables: within a third of the time taken.
constexpr double kCostQuery = 1000;
constexpr double kCostLookup = 10;  // a bucket's place
constexpr double kCostBucket = 40;  // its first line, where it is not empty
constexpr double kCostWord = 0.75;
constexpr double kCostSurvivor = 65;  // a word that is near enough to look the code up
constexpr double kCostTaken = 8;      // an equal code after the first
constexpr double kCostSort = 1.5;     // per result and doubling of k

template <class T>
uint64_t load(const uint8_t* from) {
    T x;
    std::memcpy(&x, from, sizeof(T));
    return x;
}

// The first up to 8 of nbytes bytes, by loads of fixed size: the two halves may overlap.
inline uint64_t load_word(const uint8_t* code, int64_t nbytes) {
    if (nbytes >= 8) return load<uint64_t>(code);
    if (nbytes >= 4) return load<uint32_t>(code) | load<uint32_t>(code + nbytes - 4) << 8 * (nbytes - 4);
    if (nbytes >= 2) return load<uint16_t>(code) | load<uint16_t>(code + nbytes - 2) << 8 * (nbytes - 2);
    return nbytes ? *code : 0;
}

inline uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Bits [first, first + count) of a code, count <= 64; nothing beyond its last byte is read.
inline uint64_t bits_of(const uint8_t* code, int64_t nbytes, int first, int count) {
    const int64_t byte = first / 8;
    const int shift = first % 8;
    uint64_t x = load_word(code + byte, nbytes - byte) >> shift;
    if (shift && byte + 8 < nbytes) x |= static_cast<uint64_t>(code[byte + 8]) << (64 - shift);
    return x & low_bits(count);
}

// The bits of a code, from `begin` on and on from the first after the last, that candidates of a table are filtered by:
// all of them, or those before the substring, where the substrings lie that were probed before it.
struct Window {
    int begin, length;

    Window(int bits, int first, int count)
        : begin(bits <= 64 ? 0 : (first - std::min(64, bits - count) + bits) % bits),
          length(bits <= 64 ? bits : std::min(64, bits - count)) {}

    uint64_t of(const uint8_t* code, int64_t nbytes, int bits) const {
        if (bits <= 64) return load_word(code, nbytes);
        const int head = std::min(length, bits - begin);
        const uint64_t x = bits_of(code, nbytes, begin, head);
        return head == length ? x : x | bits_of(code, nbytes, 0, length - head) << head;
    }
};

inline uint32_t distance_of(const uint8_t* a, const uint8_t* b, int64_t nbytes) {
    uint32_t total = 0;
    for (int64_t at = 0; at < nbytes; at += 8)
        total += __builtin_popcountll(load_word(a + at, nbytes - at) ^ load_word(b + at, nbytes - at));
    return total;
}

template <class V>
struct Search {
    const MultiIndex& index;
    const uint8_t* query;
    Nearest& nearest;
    double cost, allowed;
    uint64_t word = 0;
    int num_seen = 0;
    struct {
        uint64_t mask;
        int shift, near;
    } seen[64];

    Search(const MultiIndex& multi_index, const uint8_t* q, Nearest& result, double allowance)
        : index(multi_index), query(q), nearest(result), allowed(allowance) {
        cost = kCostQuery + kCostSort * static_cast<double>(nearest.k) * std::log2(static_cast<double>(nearest.k) + 1);
    }

    // False: given up.
    bool run() {
        if (cost > allowed) {
            cost = 0;
            return false;
        }
        const int tables = index.num_tables;
        for (int step = 0;; ++step) {
            const SubstringTable& table = index.tables[step % tables];
            const int radius = step / tables;
            if (radius <= table.bits && !probe(step % tables, radius)) return false;
            nearest.shrink();
            if (nearest.count >= nearest.k && nearest.farthest() <= static_cast<uint32_t>(step)) return true;
            if (step >= index.bits) return true;
        }
    }

    bool probe(int number, int radius) {
        const SubstringTable& table = index.tables[number];
        double buckets = 1;
        for (int i = 0; i < radius; ++i) buckets *= static_cast<double>(table.bits - i) / (i + 1);
        if (cost + buckets * kCostLookup > allowed) return false;
        const uint64_t end = uint64_t{1} << table.bits;
        const uint64_t key = bits_of(query, index.nbytes, table.first, table.bits);
        if (table.words) look_through(number, radius);
        uint64_t mask = low_bits(radius);
        uint64_t bucket[kBatch];
        for (bool more = true; more;) {
            int count = 0;
            while (more && count < kBatch) {
                bucket[count] = key ^ mask;
                __builtin_prefetch(table.offsets + bucket[count++]);
                if (mask == 0) break;
                const uint64_t lowest = mask & -mask, carried = mask + lowest;  // the next mask of as many bits
                mask = (((carried ^ mask) >> 2) / lowest) | carried;
                more = mask < end;
            }
            if (radius == 0) more = false;
            cost += count * kCostLookup;
            visit(table, number, radius, bucket, count);
            if (cost > allowed) return false;
        }
        return true;
    }

    void visit(const SubstringTable& table, int number, int radius, const uint64_t* bucket, int count) {
        uint32_t begin[kBatch], end[kBatch];
        int spans = 0;
        for (int i = 0; i < count; ++i) {
            begin[spans] = table.offsets[bucket[i]], end[spans] = table.offsets[bucket[i] + 1];
            if (begin[spans] == end[spans]) continue;
            if (table.words) __builtin_prefetch(table.words + begin[spans]);
            else __builtin_prefetch(index.order + begin[spans]);
            ++spans;
        }
        for (int s = 0; s < spans; ++s) {
            if (!table.words) {
                take(begin[s], end[s], static_cast<uint32_t>(radius));
                continue;
            }
            // the next bucket travels while this one is compared
            if (s + 1 < spans)
                for (uint32_t at = begin[s + 1] + 8; at < std::min(end[s + 1], begin[s + 1] + 8 * kAhead); at += 8)
                    __builtin_prefetch(table.words + at);
            cost += kCostBucket + (end[s] - begin[s]) * kCostWord;
            compare(table, number, radius, begin[s], end[s]);
        }
    }

    void compare(const SubstringTable& table, int number, int radius, uint32_t begin, uint32_t end) {
        const bool whole = index.bits <= 64;
        const uint32_t known = whole ? 0 : static_cast<uint32_t>(radius);
        if (whole && nearest.count == 0) look_ahead(table, begin, end);
        uint32_t at[kChunk];
        for (uint32_t first = begin; first < end; first += kChunk) {
            const uint64_t limit = uint64_t{nearest.farthest()} + 1;
            if (limit <= known) return;
            const uint32_t nearer = static_cast<uint32_t>(std::min<uint64_t>(limit - known, 65));
            const int found = filter(table, first, end, nearer, at);
            cost += found * kCostSurvivor;
            int kept = 0;
            for (int i = 0; i < found; ++i) {
                const uint32_t place = first + at[i];
                if (met_before(table.words[place] ^ word)) continue;
                at[kept++] = place;
                if (table.groups) __builtin_prefetch(table.groups + place);
            }
            take_groups(table, number, radius, at, kept);
        }
    }

    int filter(const SubstringTable& table, uint32_t first, uint32_t end, uint32_t limit, uint32_t* at) const {
        const int count = static_cast<int>(std::min<uint32_t>(kChunk, end - first));
        return V::filter(table.words + first, count, word, limit, at);
    }

    // Each loop asks for what the next one reads.
    void take_groups(const SubstringTable& table, int number, int radius, const uint32_t* place, int count) {
        uint32_t group[kChunk], distance[kChunk];
        for (int i = 0; i < count; ++i) {
            group[i] = table.groups ? table.groups[place[i]] : place[i];
            if (index.different) __builtin_prefetch(index.different + int64_t{group[i]} * index.nbytes);
            else __builtin_prefetch((index.starts ? index.starts : index.order) + group[i]);
        }
        int kept = 0;
        for (int i = 0; i < count; ++i) {
            if (index.different) {
                const uint8_t* code = index.different + int64_t{group[i]} * index.nbytes;
                distance[kept] = distance_of(query, code, index.nbytes);
                if (distance[kept] > nearest.farthest() || met_before(number, radius, code)) continue;
                __builtin_prefetch((index.starts ? index.starts : index.order) + group[i]);
            } else {
                distance[kept] = static_cast<uint32_t>(__builtin_popcountll(table.words[place[i]] ^ word));
            }
            group[kept++] = group[i];
        }
        if (index.starts)
            for (int i = 0; i < kept; ++i) __builtin_prefetch(index.order + index.starts[group[i]]);
        for (int i = 0; i < kept; ++i) {
            if (index.starts) take(index.starts[group[i]], index.starts[group[i] + 1], distance[i]);
            else take(group[i], group[i] + 1, distance[i]);
        }
    }

    // The distance that k codes of the first bucket reach: without it the first few hundred codes would all be taken.
    void look_ahead(const SubstringTable& table, uint32_t begin, uint32_t end) {
        if (end - begin < nearest.k) return;
        end = std::min(end, begin + 16 * kChunk);
        uint32_t at[kChunk];
        for (uint32_t distance = 0;; ++distance) {
            int64_t found = 0;
            for (uint32_t first = begin; first < end && found < nearest.k; first += kChunk)
                found += filter(table, first, end, distance + 1, at);
            if (found < nearest.k && distance < 64) continue;
            if (found >= nearest.k) nearest.within(distance);
            return;
        }
    }

    // The query's word for a table, and the substrings inside it by which a candidate can have been met before.
    void look_through(int number, int radius) {
        const SubstringTable& table = index.tables[number];
        const Window window(index.bits, table.first, table.bits);
        word = window.of(query, index.nbytes, index.bits);
        num_seen = 0;
        for (int j = 0; j < index.num_tables; ++j) {
            const int shift = (index.tables[j].first - window.begin + index.bits) % index.bits;
            const int near = radius - (j > number);
            if (j == number || near < 0 || shift + index.tables[j].bits > window.length) continue;
            seen[num_seen++] = {low_bits(index.tables[j].bits), shift, near};
        }
    }

    bool met_before(uint64_t difference) const {
        for (int i = 0; i < num_seen; ++i)
            if (__builtin_popcountll(difference >> seen[i].shift & seen[i].mask) <= seen[i].near) return true;
        return false;
    }

    bool met_before(int number, int radius, const uint8_t* code) const {
        for (int j = 0; j < index.num_tables; ++j) {
            const SubstringTable& table = index.tables[j];
            const int distance = __builtin_popcountll(bits_of(code, index.nbytes, table.first, table.bits) ^
                                                      bits_of(query, index.nbytes, table.first, table.bits));
            if (j != number && distance <= radius - (j > number)) return true;
        }
        return false;
    }

    void take(uint32_t begin, uint32_t end, uint32_t distance) {
        const uint64_t high = uint64_t{distance} << 32;
        end = static_cast<uint32_t>(std::min<int64_t>(end, begin + nearest.k));
        uint32_t at = begin;
        while (at < end && nearest.push(high | index.order[at])) ++at;
        if (at > begin + 1) cost += (at - begin - 1) * kCostTaken;
    }
};

template <class V>
bool search(const MultiIndex& index, const uint8_t* query, Nearest& nearest, double allowed, double* cost) {
    Search<V> one(index, query, nearest, allowed);
    const bool ended = one.run();
    *cost = one.cost;
    return ended;
}

struct PlainFilter {
    static int filter(const uint64_t* words, int count, uint64_t query, uint32_t limit, uint32_t* at) {
        int found = 0;
        for (int i = 0; i < count; ++i) {
            at[found] = static_cast<uint32_t>(i);
            found += static_cast<uint32_t>(__builtin_popcountll(words[i] ^ query)) < limit;
        }
        return found;
    }
};

}  // namespace
}  // namespace cmr
