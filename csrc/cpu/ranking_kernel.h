// Ranking statistics, written once and compiled once per instruction set (ranking_<isa>.cpp).
//
// Maths      The order is (distance, index). With rel(i) = 1 where rank i is relevant, h(i) the hits up to rank i and
//            R all relevant items, average precision is sum_i rel(i) h(i) / i over a denominator that a convention
//            chooses. So all that is needed of a ranking is rel, one bit a rank, and the items and relevant items at
//            each distance.
// Layout     The database is cut into chunks. Of a chunk and a query, v = 2 distance + relevant, a byte where it fits,
//            is made in index order and sorted stably by distance; kept are one bit an item and where each distance
//            begins. When the database is through, distance after distance the runs of all chunks are joined to rel.
// Values     From a table of distances of 4 queries and a tile (hamming_kernel.h); up to 64 bits on AVX-512 from the
//            codes, 64 at a time: 8 x 8 (or 4 x 16) counts shifted together to bytes and put in order by one
//            permutation (2 times faster).
// Sort       AVX-512 VBMI2: least significant bit first, 64 values at a time: those with the bit 0 and those with
//            the bit 1 are compressed apart. 64 bits give about 6 passes, 10 cycles for 64 values each. Elsewhere a
//            counting sort; its two stores an item, to a counter and to a place, make about 2 cycles.
// Sums       32 hits at a time in 8 lanes, four fractions over one denominator, so one division serves 4 hits. The
//            order of the additions is fixed: every instruction set and number of threads gives the same bits. The
//            module is compiled without contraction to fused multiply-add.
// Bound      per pair and word of the code xor + popcount, and per label word and + test; see bench/.
// Tried      lists of relevance bytes by distance, filled item by item (2.3 times slower: two stores an item);
//            counters that hold hits and items and write the position of hits (2.6 times); shift registers of bits
//            by distance, logged when full (2.7 times); compressing halves of a register (the same); chunks of 8192
//            (10 % slower) and 32768 (the same); the curves in a pass of their own costs 0.07 of 0.6 ns a pair.
#pragma once

#include <algorithm>
#include <cstring>

#include "hamming.h"
#include "isa.h"
#include "ranking.h"

namespace cmr {
namespace {

struct Portable {
    // Whether values() makes v from the codes themselves; else combine() does from a table of distances.
    static bool reads_codes(const RankingShape&) { return false; }

    template <class Value>
    static void values(const uint8_t*, const uint8_t*, int64_t, const uint32_t*, int64_t, int64_t, bool,
                       const uint32_t*, int64_t, Value*, int&, int&) {}

    // v = 2 distance + relevant of `count` codes; [lo, hi], the range of v, is extended where sort() looks at it
    template <class Value>
    static void combine(const int32_t* distances, const uint32_t* labels, int64_t plane, int64_t words, bool classes,
                        const uint32_t* wanted, int64_t count, Value* v, int&, int&) {
        uint32_t shared[256];
        for (int64_t at = 0; at < count; at += 256) {
            const int64_t size = std::min<int64_t>(256, count - at);
            if (classes)
                for (int64_t i = 0; i < size; ++i) shared[i] = labels[at + i] == wanted[0];
            else
                for (int64_t i = 0; i < size; ++i) shared[i] = labels[at + i] & wanted[0];
            for (int64_t w = 1; w < words; ++w)
                for (int64_t i = 0; i < size; ++i) shared[i] |= labels[w * plane + at + i] & wanted[w];
            const int32_t* const d = distances + at;
            Value* const out = v + at;
            for (int64_t i = 0; i < size; ++i) out[i] = static_cast<Value>(2 * d[i] + (shared[i] != 0));
        }
    }

    // Sorts v stably by distance: relevance to `bits`, where each distance begins to `starts` (levels + 1).
    template <class Value>
    static void sort(const Value* v, int64_t count, int, int, int64_t levels, uint8_t* buffer, uint32_t* counts,
                     uint64_t* bits, uint16_t* starts) {
        std::fill(counts, counts + 2 * levels, 0);
        uint32_t* const other = counts + levels;  // two tables: equal neighbours do not wait for each other
        int64_t i = 0;
        for (; i + 2 <= count; i += 2) ++counts[v[i] >> 1], ++other[v[i + 1] >> 1];
        if (i < count) ++counts[v[i] >> 1];
        uint32_t total = 0;
        for (int64_t d = 0; d < levels; ++d) {
            starts[d] = static_cast<uint16_t>(total);
            const uint32_t size = counts[d] + other[d];
            counts[d] = total;
            total += size;
        }
        starts[levels] = static_cast<uint16_t>(total);
        for (i = 0; i < count; ++i) buffer[counts[v[i] >> 1]++] = static_cast<uint8_t>(v[i] & 1);
        std::memset(buffer + count, 0, 64);
        for (i = 0; i < count; i += 64) {
            uint64_t word = 0;
            for (int byte = 0; byte < 8; ++byte) {
                uint64_t eight;
                std::memcpy(&eight, buffer + i + 8 * byte, 8);
                word |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
            }
            bits[i / 64] = word;
        }
    }

    static int64_t positions(uint64_t word, int32_t base, int32_t* out) {
        int64_t count = 0;
        for (; word; word &= word - 1) out[count++] = base + __builtin_ctzll(word);
        return count;
    }

    static void add_at(uint64_t word, double weight, double* sums) {
        for (; word; word &= word - 1) sums[__builtin_ctzll(word)] += weight;
    }

    static void count_at(uint64_t word, uint8_t* counts) {
        for (; word; word &= word - 1) ++counts[__builtin_ctzll(word)];
    }
};

// Precisions at hits: adds 1-based hit number over rank, in a fixed order. Few are added to one sum before that goes to
// the sum of sums: at 10 million hits rounding stays below 1e-12.
struct PrecisionSum {
    double lanes[8] = {}, sums[8] = {};
    int64_t hits = 0;

    void fold() {
        for (int l = 0; l < 8; ++l) sums[l] += lanes[l], lanes[l] = 0;
    }

    void add32(const int32_t* rank, int64_t count) {  // count < 32 only at the end
        double h[4][8], p[4][8];
        for (int u = 0; u < 4; ++u)
            for (int l = 0; l < 8; ++l) {
                h[u][l] = static_cast<double>(static_cast<int32_t>(hits) + 8 * u + l + 1);
                p[u][l] = static_cast<double>(rank[8 * u + l]);
            }
        if (count < 32)
            for (int u = 0; u < 4; ++u)
                for (int l = 0; l < 8; ++l)
                    if (8 * u + l >= count) h[u][l] = 0, p[u][l] = 1;
        for (int l = 0; l < 8; ++l) {
            const double above = h[0][l] * p[1][l] + h[1][l] * p[0][l], below = p[0][l] * p[1][l];
            const double above2 = h[2][l] * p[3][l] + h[3][l] * p[2][l], below2 = p[2][l] * p[3][l];
            lanes[l] += (above * below2 + above2 * below) / (below * below2);
        }
        hits += count;
    }

    double total() const {
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
};

template <class Ops>
PrecisionSum sum_precisions(const uint64_t* ranked, int64_t ranks, int64_t max_hits, int32_t* positions) {
    PrecisionSum sum;
    const int64_t words = (ranks + 63) / 64;
    int64_t waiting = 0;
    for (int64_t begin = 0; begin < words && sum.hits + waiting < max_hits; begin += kPositionWords) {
        for (int64_t w = begin; w < std::min(words, begin + kPositionWords); ++w) {
            uint64_t word = ranked[w];
            if (w == words - 1 && ranks % 64) word &= (uint64_t{1} << ranks % 64) - 1;
            waiting += Ops::positions(word, static_cast<int32_t>(64 * w + 1), positions + waiting);
        }
        waiting = std::min(waiting, max_hits - sum.hits);
        int64_t done = 0;
        for (; done + 32 <= waiting; done += 32) sum.add32(positions + done, 32);
        waiting -= done;
        std::memmove(positions, positions + done, waiting * sizeof(int32_t));
        sum.fold();
    }
    if (waiting) sum.add32(positions, waiting);
    sum.fold();
    return sum;
}

// Bits [from, from + count) of `bits` to the end of `out`, whose next bit is `at`; returns how many are set.
inline int64_t append_bits(const uint64_t* bits, int64_t from, int64_t count, uint64_t* out, int64_t at) {
    int64_t set = 0;
    while (count > 0) {
        const int64_t take = std::min<int64_t>(64, count), shift = from % 64, room = at % 64;
        uint64_t word = bits[from / 64] >> shift;
        if (shift) word |= bits[from / 64 + 1] << (64 - shift);
        if (take < 64) word &= (uint64_t{1} << take) - 1;
        set += __builtin_popcountll(word);
        if (room) {
            out[at / 64] |= word << room;
            if (room + take > 64) out[at / 64 + 1] = word >> (64 - room);
        } else {
            out[at / 64] = word;
        }
        from += take, at += take, count -= take;
    }
    return set;
}

template <class Ops, class Value>
struct Ranker {
    const RankingGroup& g;
    const RankingShape& s;
    const RankingData& data;
    const int64_t levels, words, chunk_words;
    int64_t partner_before[kMaxGroup] = {};  // ties inside the partner's chunk
    int64_t partner_level[kMaxGroup] = {};

    explicit Ranker(const RankingGroup& group)
        : g(group),
          s(*group.shape),
          data(*group.data),
          levels(s.levels()),
          words(s.label_words()),
          chunk_words(group.chunk / 64) {}

    uint64_t* bits(int64_t i) const { return g.bits + i * bit_words(g.chunk, g.chunks); }
    uint16_t* starts(int64_t i, int64_t chunk) const { return g.starts + (i * g.chunks + chunk) * num_starts(levels); }
    uint32_t* histogram(int64_t i) const { return g.counts + i * num_counts(levels); }

    void run(decltype(HammingKernel::table) table) {
        for (int64_t i = 0; i < g.num_queries; ++i) {
            uint32_t* const wanted = g.q_labels + i * words;
            std::memset(wanted, 0, words * sizeof(uint32_t));
            std::memcpy(wanted, data.q_labels + (g.first_query + i) * s.label_bytes, s.label_bytes);
            if (!s.ordered) std::fill(histogram(i), histogram(i) + num_counts(levels), 0);
        }
        for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
            const int64_t first = chunk * g.chunk, count = std::min(g.chunk, s.n - first);
            load_labels(first, count);
            for (int64_t i = 0; i < g.num_queries; i += kSubgroup)
                rank_chunk(table, chunk, first, count, i, std::min(kSubgroup, g.num_queries - i));
        }
        for (int64_t i = 0; i < g.num_queries; ++i) s.ordered ? finish_ordered(i) : finish_histogram(i);
    }

    void load_labels(int64_t first, int64_t count) const {
        const uint8_t* rows = data.db_labels + first * s.label_bytes;
        if (s.label_bytes == 4) {
            std::memcpy(g.labels, rows, 4 * count);
            return;
        }
        const int64_t rest = s.label_bytes - 4 * (words - 1);
        for (int64_t w = 0; w < words; ++w) {
            const int64_t size = w < words - 1 ? 4 : rest;
            const uint8_t* from = rows + 4 * w;
            uint32_t* const plane = g.labels + w * g.chunk;
            for (int64_t i = 0; i < count; ++i, from += s.label_bytes) {
                uint32_t word = from[0];
                if (size > 1) word |= uint32_t{from[1]} << 8;
                if (size > 2) word |= uint32_t{from[2]} << 16;
                if (size > 3) word |= uint32_t{from[3]} << 24;
                plane[i] = word;
            }
        }
    }

    void rank_chunk(decltype(HammingKernel::table) table, int64_t chunk, int64_t first, int64_t count, int64_t begin,
                    int64_t size) {
        int lo[kSubgroup], hi[kSubgroup];
        std::fill(lo, lo + kSubgroup, 1 << 30);
        std::fill(hi, hi + kSubgroup, 0);
        Value* const v = reinterpret_cast<Value*>(g.values);
        for (int64_t at = 0; at < count; at += kTile) {
            const int64_t tile = std::min(kTile, count - at);
            const uint8_t* const q = data.q + (g.first_query + begin) * s.nbytes;
            const uint8_t* const codes = data.db + (first + at) * s.nbytes;
            const bool direct = Ops::reads_codes(s);
            if (!direct) table({q, size, codes, tile, s.nbytes, g.scan}, g.distances, kTile);
            for (int64_t j = 0; j < size; ++j) {
                Value* const to = v + j * value_stride(g.chunk) + at;
                const uint32_t* const wanted = g.q_labels + (begin + j) * words;
                if (direct)
                    Ops::values(q + j * s.nbytes, codes, s.nbytes, g.labels + at, g.chunk, words, s.classes, wanted,
                                tile, to, lo[j], hi[j]);
                else
                    Ops::combine(g.distances + j * kTile, g.labels + at, g.chunk, words, s.classes, wanted, tile, to,
                                 lo[j], hi[j]);
            }
        }
        for (int64_t j = 0; j < size; ++j) {
            const int64_t i = begin + j;
            const Value* const mine = v + j * value_stride(g.chunk);
            if (data.partners) meet_partner(i, mine, first, count);
            if (s.ordered)
                Ops::sort(mine, count, lo[j], hi[j], levels, g.sorting, g.counts, bits(i) + chunk * chunk_words,
                          starts(i, chunk));
            else count_values(mine, count, histogram(i));
        }
    }

    void count_values(const Value* v, int64_t count, uint32_t* h) const {
        uint32_t* const t[4] = {h, h + 2 * levels, h + 4 * levels, h + 6 * levels};
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) ++t[0][v[i]], ++t[1][v[i + 1]], ++t[2][v[i + 2]], ++t[3][v[i + 3]];
        for (; i < count; ++i) ++t[0][v[i]];
    }

    // The partner's distance, and how many before it in this chunk, or in an earlier one, are as near.
    void meet_partner(int64_t i, const Value* v, int64_t first, int64_t count) {
        const int64_t partner = data.partners[g.first_query + i] - first;
        if (partner < 0 || partner >= count) return;
        const int level = v[partner] >> 1;
        int64_t before = 0;
        for (int64_t p = 0; p < partner; ++p) before += v[p] >> 1 == level;
        partner_level[i] = level;
        partner_before[i] = before;
    }

    void finish_histogram(int64_t i) const {
        const uint32_t* const h = histogram(i);
        int64_t* const items = data.items + (g.first_query + i) * levels;
        int64_t* const relevant = data.relevant + (g.first_query + i) * levels;
        for (int64_t d = 0; d < levels; ++d) {
            int64_t counted[2] = {};
            for (int t = 0; t < 4; ++t)
                for (int r = 0; r < 2; ++r) counted[r] += h[2 * levels * t + 2 * d + r];
            items[d] = counted[0] + counted[1];
            relevant[d] = counted[1];
        }
    }

    void finish_ordered(int64_t i) const {
        const int64_t query = g.first_query + i;
        int64_t* const items = data.items + query * levels;
        int64_t* const relevant = data.relevant + query * levels;
        uint64_t* const ranked = g.ranked + (g.ranked_stride ? query * g.ranked_stride : 0);
        std::memset(ranked, 0, (s.ranked_words() + 1) * sizeof(uint64_t));
        int64_t at = 0, all_relevant = 0;
        for (int64_t d = 0; d < levels; ++d) {
            const int64_t begin = at;
            int64_t set = 0;
            for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
                const uint16_t* const start = starts(i, chunk) + d;
                const int64_t count = start[1] - start[0];
                if (!count) continue;
                set += append_bits(bits(i) + chunk * chunk_words, start[0], count, ranked, at);
                at += count;
            }
            items[d] = at - begin;
            relevant[d] = set;
            all_relevant += set;
        }
        if (data.partners) {
            int64_t before = partner_before[i];
            for (int64_t chunk = 0; chunk < data.partners[query] / g.chunk; ++chunk) {
                const uint16_t* const start = starts(i, chunk) + partner_level[i];
                before += start[1] - start[0];
            }
            data.tied_before[query] = before;
        }
        const int64_t capped = std::min(s.k, all_relevant);
        const int64_t ranks = s.cut == Cut::rank ? std::min(s.k, s.n) : s.cut == Cut::relevant ? capped : s.n;
        const PrecisionSum sum =
            sum_precisions<Ops>(ranked, ranks, s.cut == Cut::hits ? capped : all_relevant, g.positions);
        data.sums[query] = sum.total();
        data.hits[query] = sum.hits;
        data.first[query] = 0;
        for (int64_t w = 0; w < s.ranked_words(); ++w)
            if (ranked[w]) {
                data.first[query] = 64 * w + __builtin_ctzll(ranked[w]) + 1;
                break;
            }
    }
};

// A block of ranks at a time, so that the sums stay in cache while the queries pass by.
template <class Ops>
void sum_curves(const RankingShape& s, const uint64_t* ranked, int64_t stride, const double* weights, int64_t first,
                int64_t last, int64_t* hit_steps, double* recall_steps) {
    constexpr int64_t kBlock = 8;
    for (int64_t begin = first / 64; begin < (last + 63) / 64; begin += kBlock) {
        double sums[64 * kBlock] = {};
        int64_t hits[64 * kBlock] = {};
        uint8_t counts[64 * kBlock] = {};
        const int64_t size = std::min(kBlock, (last + 63) / 64 - begin);
        for (int64_t q = 0; q < s.num_queries; ++q) {
            const uint64_t* const row = ranked + q * stride + begin;
            if (q + 4 < s.num_queries) __builtin_prefetch(row + 4 * stride);
            for (int64_t w = 0; w < size; ++w) {
                Ops::add_at(row[w], weights[q], sums + 64 * w);
                Ops::count_at(row[w], counts + 64 * w);
            }
            if (q % 255 == 254 || q == s.num_queries - 1)
                for (int64_t r = 0; r < 64 * kBlock; ++r) hits[r] += counts[r], counts[r] = 0;
        }
        for (int64_t r = 0; r < std::min(64 * size, last - 64 * begin); ++r) {
            hit_steps[64 * begin + r] = hits[r];
            recall_steps[64 * begin + r] = sums[r];
        }
    }
}

template <class Ops>
void rank_group(const RankingGroup& group, decltype(HammingKernel::table) table) {
    if (group.shape->levels() <= 128) Ranker<Ops, uint8_t>(group).run(table);
    else Ranker<Ops, uint16_t>(group).run(table);
}

#define CMR_RANKING_KERNEL(NAME, HAMMING, OPS) \
    namespace {                                \
    void group(const RankingGroup& g) {        \
        set_last_isa(HAMMING.isa);             \
        rank_group<OPS>(g, HAMMING.table);     \
    }                                          \
    }                                          \
    const RankingKernel NAME{group, sum_curves<OPS>};

}  // namespace
}  // namespace cmr
