// The Hamming scan, written once over a vector type V and compiled once per instruction set (hamming_<isa>.cpp).
//
// Maths      distance(q, x) = sum over words w of popcount(q[w] xor x[w]); the answer is the stable order by
//            (distance, index).
// Layout     Word planes of 8-, 16- (where the instruction set counts such lanes), 32- or 64-bit words: V::lanes codes
//            side by side, word 0 of all of them, then word 1, ... A register holds one word of V::lanes codes, so
//            there is no horizontal addition. Codes of exactly one word already lie so; others are transposed tile by
//            tile into scratch that stays in the first-level cache, once for all queries of the group.
// Loop       tile of the database > kQueries queries in registers > kBlocks vectors. Each query keeps the k-th
//            distance seen so far as its limit; the minimum over kBlocks vectors is compared with it once, and the
//            branch is taken only where something is nearer, which after the first few thousand codes is rare.
// Selection  Survivors are appended as (distance << 32 | index), in index order. When the buffer is full, distances
//            have only bits + 1 values: a histogram gives the new limit, and one pass keeps what lies below it and
//            the first ones at it. No heap, no sort of floats, ties exact.
// Bound      per code and word: xor + popcount + add (or minimum). One load feeds kQueries queries.
// Tried      limits compared vector by vector (8 % slower than the minimum over four); whole-database sweeps instead
//            of tiles (25 % slower); rows with horizontal adds (4 to 11 times slower).
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>

#include "hamming.h"
#include "isa.h"

namespace cmr {
namespace {

// gcc 12 may spill an AVX-512 mask with its own width and reload it with that of the integer it was converted to
inline unsigned in_register(unsigned x) {
#if defined(__GNUC__)
    asm("" : "+r"(x));
#endif
    return x;
}

constexpr int64_t kOften = 1024;  // k of more than n / kOften: hits come too often for a branch to be guessed right

template <class V, int W>
struct Scan {
    using reg = typename V::reg;
    using word = typename V::word;
    static constexpr int kBlocks = V::blocks(W);
    static constexpr int kQueries = V::queries(W);
    static constexpr int64_t kStep = kBlocks * V::lanes;
    static constexpr int64_t kFirst = std::max<int64_t>(kStep, 128);

    const HammingScan& job;
    const int64_t words;  // per code
    word* const query_words;
    word* const planes;
    const int64_t tile_codes;

    explicit Scan(const HammingScan& scan)
        : job(scan),
          words(W ? W : (scan.nbytes + sizeof(word) - 1) / static_cast<int64_t>(sizeof(word))),
          query_words(reinterpret_cast<word*>(scan.scratch)),
          planes(reinterpret_cast<word*>(scan.scratch + scan_query_bytes(scan.num_queries, scan.nbytes, sizeof(word)))),
          tile_codes(scan_tile_codes(scan.nbytes, sizeof(word), kStep)) {
        static_assert(kStep <= kMaxStep && kMaxStep % kStep == 0, "scan_scratch_bytes reckons with kMaxStep");
        std::memset(query_words, 0, job.num_queries * words * sizeof(word));
        for (int64_t i = 0; i < job.num_queries; ++i)
            std::memcpy(query_words + i * words, job.queries + i * job.nbytes, job.nbytes);
    }

    static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

    // Word planes of codes [first, first + count): in place where a code is one word, else through scratch.
    const word* tile(int64_t first, int64_t count) const {
        assert(count <= tile_codes);
        const uint8_t* rows = job.database + first * job.nbytes;
        if (W == 1 && job.nbytes == sizeof(word) && count % kStep == 0) return reinterpret_cast<const word*>(rows);
        const int64_t padded = round_up(count, kStep);
        std::memset(planes + (count / V::lanes) * V::lanes * words, 0,
                    (padded - count / V::lanes * V::lanes) * words * sizeof(word));
        if (job.nbytes == words * static_cast<int64_t>(sizeof(word))) {
            int64_t i = 0;
            if constexpr (V::has_transpose(W))
                for (; i + V::lanes <= count; i += V::lanes) {
                    // the next tile travels while this one is searched
                    for (int64_t line = 0; line < V::lanes * words * int64_t{sizeof(word)}; line += 64)
                        __builtin_prefetch(rows + i * job.nbytes + line + kTileBytes);
                    V::template transpose<W>(rows + i * job.nbytes, planes + i * words);
                }
            for (; i < count; ++i) {
                word* out = planes + i / V::lanes * V::lanes * words + i % V::lanes;
                for (int64_t w = 0; w < words; ++w)
                    std::memcpy(out + w * V::lanes, rows + i * job.nbytes + w * sizeof(word), sizeof(word));
            }
        } else if constexpr (sizeof(word) > 2) {  // shorter words are whole codes
            const int64_t whole = words - 1, rest = job.nbytes - whole * sizeof(word);
            for (int64_t i = 0; i < count; ++i) {
                word* out = planes + i / V::lanes * V::lanes * words + i % V::lanes;
                const uint8_t* row = rows + i * job.nbytes;
                for (int64_t w = 0; w < whole; ++w)
                    std::memcpy(out + w * V::lanes, row + w * sizeof(word), sizeof(word));
                word last = 0;
                std::memcpy(&last, row + whole * sizeof(word), rest);
                out[whole * V::lanes] = last;
            }
        }
        return planes;
    }

    reg distance(const word* q, const word* block) const {
        typename V::sum total = V::zero();
        reg done = V::splat(0);
        for (int64_t w = 0; w < (W ? W : words); ++w) {
            total = V::add_popcount(total, V::bit_xor(V::splat(q[w]), V::load(block + w * V::lanes)));
            if (W == 0 && w % V::max_words == V::max_words - 1) {
                done = V::add(done, V::finish(total));
                total = V::zero();
            }
        }
        return W == 0 ? V::add(done, V::finish(total)) : V::finish(total);
    }

    // Calls sink.emit for every code nearer than its query's limit; sink.limit(i) may tighten on the way. Where hits
    // are frequent (`often`), some codes may be emitted that lie beyond a limit that has just been tightened.
    template <class Sink>
    void run(Sink& sink, bool often = false) const {
        // limits tighten between tiles where hits are frequent, so the first ones grow from little
        for (int64_t first = 0, count; first < job.n; first += count)
            run_tile(sink, first, count = tile_from(first, often ? std::max(kFirst, first) : tile_codes), often);
    }

    // Codes of the tile from `first` on, `most` at most: whole steps, which are read in place where a code is one word;
    // then the rest. `most` is a step or more.
    int64_t tile_from(int64_t first, int64_t most) const {
        const int64_t count = std::min({tile_codes, most, job.n - first});
        return count > kStep ? count / kStep * kStep : count;
    }

    template <class Sink>
    void run_tile(Sink& sink, int64_t first, int64_t count, bool often = false) const {
        const word* codes = tile(first, count);
        int64_t i = 0;
        if (often && W) {
            for (; i + kQueries <= job.num_queries; i += kQueries) run_often<kQueries>(sink, codes, first, count, i);
            for (; i < job.num_queries; ++i) run_often<1>(sink, codes, first, count, i);
            return;
        }
        for (; i + kQueries <= job.num_queries; i += kQueries) run_queries<kQueries>(sink, codes, first, count, i);
        for (; i < job.num_queries; ++i) run_queries<1>(sink, codes, first, count, i);
    }

    template <int Q, class Sink>
    void run_queries(Sink& sink, const word* codes, int64_t first, int64_t count, int64_t i) const {
        if constexpr (W == 0) {
            run_queries_long<Q>(sink, codes, first, count, i);
            return;
        }
        constexpr int kWords = W ? W : 1;
        reg q[Q][kWords], limit[Q];
        for (int j = 0; j < Q; ++j)
            for (int w = 0; w < kWords; ++w) q[j][w] = V::splat(query_words[(i + j) * words + w]);
        load_limits<Q>(sink, i, limit);
        for (int64_t at = 0; at < count; at += kStep) {
            const word* block = codes + at * kWords;
            reg best[Q];
#pragma GCC unroll 8
            for (int u = 0; u < kBlocks; ++u) {
                reg x[kWords];
#pragma GCC unroll 8
                for (int w = 0; w < kWords; ++w) x[w] = V::load(block + (u * kWords + w) * V::lanes);
#pragma GCC unroll 8
                for (int j = 0; j < Q; ++j) {
                    typename V::sum total = V::zero();
#pragma GCC unroll 8
                    for (int w = 0; w < kWords; ++w) total = V::add_popcount(total, V::bit_xor(q[j][w], x[w]));
                    const reg d = V::finish(total);
                    best[j] = u == 0 ? d : V::min(best[j], d);
                }
            }
            typename V::mask near[Q], some = V::none();
#pragma GCC unroll 8
            for (int j = 0; j < Q; ++j) some = V::either(some, near[j] = V::less(best[j], limit[j]));
            if (__builtin_expect(V::any(some), 0)) {
                // which queries, as bits: a branch for each of them would be guessed wrong for each hit
                unsigned which = 0;
#pragma GCC unroll 8
                for (int j = 0; j < Q; ++j) which |= static_cast<unsigned>(V::any(near[j])) << j;
                for (; which; which &= which - 1) {
                    const int j = __builtin_ctz(which);
                    collect(sink, block, first + at, std::min<int64_t>(kStep, count - at), i + j);
                    limit[j] = V::splat(static_cast<word>(sink.limit(i + j)));
                }
            }
        }
    }

    // Which codes of the tile are near, as bits and without a branch; then the hits of one query after the other.
    template <int Q, class Sink>
    void run_often(Sink& sink, const word* codes, int64_t first, int64_t count, int64_t i) const {
        constexpr int kWords = W ? W : 1;
        constexpr int64_t kMasks = std::max<int64_t>(kTileBytes / (kWords * int64_t{sizeof(word)}), kStep) / 64 + 1;
        uint64_t masks[Q][kMasks] = {};
        reg q[Q][kWords], limit[Q];
        for (int j = 0; j < Q; ++j)
            for (int w = 0; w < kWords; ++w) q[j][w] = V::splat(query_words[(i + j) * words + w]);
        load_limits<Q>(sink, i, limit);
        for (int64_t at = 0; at < count; at += kStep) {
            const word* block = codes + at * kWords;
            uint64_t near[Q] = {};
#pragma GCC unroll 8
            for (int u = 0; u < kBlocks; ++u) {
                reg x[kWords];
#pragma GCC unroll 8
                for (int w = 0; w < kWords; ++w) x[w] = V::load(block + (u * kWords + w) * V::lanes);
#pragma GCC unroll 8
                for (int j = 0; j < Q; ++j) {
                    typename V::sum total = V::zero();
#pragma GCC unroll 8
                    for (int w = 0; w < kWords; ++w) total = V::add_popcount(total, V::bit_xor(q[j][w], x[w]));
                    near[j] |= static_cast<uint64_t>(V::bits(V::less(V::finish(total), limit[j]))) << u * V::lanes;
                }
            }
            for (int j = 0; j < Q; ++j) masks[j][at / 64] |= near[j] << at % 64;
        }
        if (count % 64) {
            for (int j = 0; j < Q; ++j) masks[j][count / 64] &= (uint64_t{1} << count % 64) - 1;
        }
        for (int j = 0; j < Q; ++j) {
            uint16_t some[kMasks];
            int found = 0;
            for (int64_t m = 0; m * 64 < count; ++m) {
                some[found] = static_cast<uint16_t>(m);
                found += masks[j][m] != 0;
            }
            for (int f = 0; f < found; ++f) {
                const int64_t at = some[f] * int64_t{64};
                emit_near(sink, codes + at * kWords, masks[j][some[f]], first + at, i + j);
            }
        }
    }

    template <class Sink>
    void emit_near(Sink& sink, const word* block, uint64_t near, int64_t index, int64_t i) const {
        const word* q = query_words + i * words;
        sink.emit(i, near, static_cast<uint32_t>(index), [&](int code) {
            const word* x = block + code / V::lanes * V::lanes * words + code % V::lanes;
            int bits = 0;
            for (int64_t w = 0; w < (W ? W : words); ++w) {
                word code_word;  // codes read in place may lie at any address
                std::memcpy(&code_word, x + w * V::lanes, sizeof code_word);
                bits += __builtin_popcountll(q[w] ^ code_word);
            }
            return static_cast<uint32_t>(bits);
        });
    }

    template <int Q, class Sink>
    void run_queries_long(Sink& sink, const word* codes, int64_t first, int64_t count, int64_t i) const {
        reg limit[Q];
        load_limits<Q>(sink, i, limit);
        for (int64_t at = 0; at < count; at += kStep) {
            const word* block = codes + at * words;
            reg done[Q][kBlocks];
            typename V::sum total[Q][kBlocks];
            for (int j = 0; j < Q; ++j)
                for (int u = 0; u < kBlocks; ++u) done[j][u] = V::splat(0), total[j][u] = V::zero();
            for (int64_t begin = 0; begin < words; begin += V::max_words) {
                const int64_t end = std::min<int64_t>(words, begin + V::max_words);
                for (int64_t w = begin; w < end; ++w) {
#pragma GCC unroll 8
                    for (int u = 0; u < kBlocks; ++u) {
                        const reg x = V::load(block + (u * words + w) * V::lanes);
#pragma GCC unroll 8
                        for (int j = 0; j < Q; ++j)
                            total[j][u] =
                                V::add_popcount(total[j][u], V::bit_xor(V::splat(query_words[(i + j) * words + w]), x));
                    }
                }
                for (int j = 0; j < Q; ++j)
                    for (int u = 0; u < kBlocks; ++u) {
                        done[j][u] = V::add(done[j][u], V::finish(total[j][u]));
                        total[j][u] = V::zero();
                    }
            }
            for (int j = 0; j < Q; ++j) {
                typename V::mask near = V::none();
                for (int u = 0; u < kBlocks; ++u) near = V::either(near, V::less(done[j][u], limit[j]));
                if (__builtin_expect(V::any(near), 0)) {
                    collect(sink, block, first + at, std::min<int64_t>(kStep, count - at), i + j);
                    limit[j] = V::splat(static_cast<word>(sink.limit(i + j)));
                }
            }
        }
    }

    template <int Q, class Sink>
    void load_limits(const Sink& sink, int64_t i, reg* limit) const {
        for (int j = 0; j < Q; ++j) limit[j] = V::splat(static_cast<word>(sink.limit(i + j)));
    }

    // A step that holds something near: all of it in one mask, then hit by hit from the words of the code.
    template <class Sink>
    __attribute__((noinline)) void collect(Sink& sink, const word* block, int64_t index, int64_t valid,
                                           int64_t i) const {
        const word* const q = query_words + i * words;
        const reg limit = V::splat(static_cast<word>(sink.limit(i)));
        uint64_t near = 0;
#pragma GCC unroll 8
        for (int u = 0; u < kBlocks; ++u)
            near |= static_cast<uint64_t>(V::bits(V::less(distance(q, block + u * words * V::lanes), limit)))
                    << u * V::lanes;
        if (valid < kStep) near &= (uint64_t{1} << valid) - 1;
        emit_near(sink, block, near, index, i);
    }

    // The bound: xor, popcount and add alone, over one tile in the first-level cache. Returns a checksum.
    uint64_t arithmetic(int64_t rounds) const {
        constexpr int kWords = W ? W : 1;
        const int64_t count = std::min(tile_codes, job.n) / kStep * kStep;
        const word* codes = tile(0, count);
        reg q[kQueries][kWords], total[kQueries];
        for (int j = 0; j < kQueries; ++j) {
            total[j] = V::splat(0);
            for (int w = 0; w < kWords; ++w) q[j][w] = V::splat(query_words[j % job.num_queries * words + w]);
        }
        for (int64_t round = 0; round < rounds; ++round)
            for (int64_t at = 0; at < count; at += kStep)
                for (int64_t begin = 0; begin < words; begin += kWords)
#pragma GCC unroll 8
                    for (int u = 0; u < kBlocks; ++u) {
                        reg x[kWords];
#pragma GCC unroll 8
                        for (int w = 0; w < kWords; ++w)
                            x[w] = V::load(codes + (at + u * V::lanes) * words + (begin + w) * V::lanes);
#pragma GCC unroll 8
                        for (int j = 0; j < kQueries; ++j) {
                            typename V::sum bits = V::zero();
#pragma GCC unroll 8
                            for (int w = 0; w < kWords; ++w) bits = V::add_popcount(bits, V::bit_xor(q[j][w], x[w]));
                            total[j] = V::add(total[j], V::finish(bits));
                        }
                    }
        uint64_t checksum = 0;
        alignas(64) int32_t row[V::lanes];
        for (int j = 0; j < kQueries; ++j) {
            V::store_int32(row, total[j]);
            for (int lane = 0; lane < V::lanes; ++lane) checksum += static_cast<uint32_t>(row[lane]);
        }
        return checksum;
    }

    int64_t arithmetic_pairs(int64_t rounds) const {
        return kQueries * (std::min(tile_codes, job.n) / kStep * kStep) * rounds;
    }

    void table(int32_t* out, int64_t row_stride) const {
        alignas(64) int32_t row[V::lanes];
        for (int64_t first = 0, count; first < job.n; first += count) {
            count = tile_from(first, tile_codes);
            const word* codes = tile(first, count);
            for (int64_t i = 0; i < job.num_queries; ++i) {
                int32_t* to = out + i * row_stride + first;
                for (int64_t at = 0; at < count; at += V::lanes) {
                    const reg d = distance(query_words + i * words, codes + at * words);
                    if (count - at >= V::lanes) {
                        V::store_int32(to + at, d);
                    } else {
                        V::store_int32(row, d);
                        for (int64_t lane = 0; lane < count - at; ++lane) to[at + lane] = row[lane];
                    }
                }
            }
        }
    }
};

struct TopKSink {
    TopK* states;
    int64_t k, capacity;

    uint32_t limit(int64_t i) const { return states[i].limit; }

    template <class Distance>
    void emit(int64_t i, uint64_t near, uint32_t index, const Distance& distance) {
        TopK& state = states[i];
        uint64_t* to = state.keys + state.count;
        for (; near; near &= near - 1) {
            const int code = __builtin_ctzll(near);
            *to++ = static_cast<uint64_t>(distance(code)) << 32 | (index + code);
        }
        state.count = static_cast<uint32_t>(to - state.keys);
        if (state.count > capacity - kScanSlack) topk_compact(state, k);
    }
};

struct CountSink {
    uint32_t radius;
    int64_t* counts;
    int64_t stride;

    uint32_t limit(int64_t) const { return radius + 1; }

    template <class Distance>
    void emit(int64_t i, uint64_t near, uint32_t, const Distance&) {
        counts[i * stride] += __builtin_popcountll(near);
    }
};

struct FillSink {
    uint32_t radius;
    int64_t* at;  // next free place of each query
    int64_t base;
    int32_t* distances;
    int64_t* indices;

    uint32_t limit(int64_t) const { return radius + 1; }

    template <class Distance>
    void emit(int64_t i, uint64_t near, uint32_t index, const Distance& distance) {
        for (; near; near &= near - 1) {
            const int code = __builtin_ctzll(near);
            distances[at[i]] = static_cast<int32_t>(distance(code));
            indices[at[i]++] = base + index + code;
        }
    }
};

// Runs `body` with the scan specialised for the code length: one word of 8, 16 or 32 bits, then 64-bit words.
template <class V8, class V16, class V32, class V64, class Body>
void specialise(const HammingScan& job, const char* isa, Body&& body) {
    set_last_isa(isa);
    const int64_t words = (job.nbytes + 7) / 8;
    if (job.nbytes == 1) body(Scan<V8, 1>(job));
    else if (job.nbytes == 2) body(Scan<V16, 1>(job));
    else if (job.nbytes <= 4) body(Scan<V32, 1>(job));
    else if (words == 1) body(Scan<V64, 1>(job));
    else if (words == 2) body(Scan<V64, 2>(job));
    else if (words == 3) body(Scan<V64, 3>(job));
    else if (words == 4) body(Scan<V64, 4>(job));
    else body(Scan<V64, 0>(job));
}

// Limits from a sample of every 32nd stretch: the distance that the k nearest of all codes very likely reach. Were it
// too small for some query, search() notices and scans again for that query without it.
template <class S>
void seed_limits(const S& scan, int64_t k, int64_t capacity, TopK* states) {
    constexpr int64_t kPeriod = 32;
    const HammingScan& job = scan.job;
    const int64_t chunk = std::min(4 * S::kStep, scan.tile_codes), stride = kPeriod * chunk;
    if (k < 24 || job.n < 16 * stride || job.n < 2 * k) return;
    const double expected = static_cast<double>(k) / kPeriod;
    const int64_t rank = static_cast<int64_t>(expected + 3 * std::sqrt(expected) + 4);
    const int64_t few = std::min(capacity, 3 * rank + kScanSlack);
    if (rank + kScanSlack > few) return;
    TopKSink sink{states, rank, few};
    // a stretch of its own in each period, so that an order of the database does not fool the sample
    uint64_t random = 0x9e3779b97f4a7c15u;
    for (int64_t first = 0; first + stride <= job.n; first += stride) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        scan.run_tile(sink, first + static_cast<int64_t>(random % kPeriod) * chunk, chunk);
    }
    for (int64_t i = 0; i < job.num_queries; ++i) {
        const uint32_t widest = states[i].limit;
        topk_compact(states[i], rank);
        states[i].limit = states[i].count < rank ? widest : states[i].limit + 1;
        states[i].count = 0;
    }
}

template <class S>
void search(const S& scan, int64_t k, int64_t capacity, TopK* states) {
    const HammingScan& job = scan.job;
    seed_limits(scan, k, capacity, states);
    TopKSink sink{states, k, capacity};
    const bool often = kOften * k > job.n;
    scan.run(sink, often);
    bool again = false;
    for (int64_t i = 0; i < job.num_queries; ++i) {
        const bool short_of = states[i].count < std::min(k, job.n);
        states[i].limit = short_of ? static_cast<uint32_t>(8 * job.nbytes + 1) : 0;
        if (short_of) states[i].count = 0;
        again |= short_of;
    }
    if (again) scan.run(sink, often);
    for (int64_t i = 0; i < job.num_queries; ++i) topk_compact(states[i], k);
}

#define CMR_HAMMING_KERNEL(NAME, ISA, V8, V16, V32, V64)                                                       \
    namespace {                                                                                                \
    void topk(const HammingScan& job, int64_t k, int64_t capacity, TopK* states) {                             \
        specialise<V8, V16, V32, V64>(job, ISA, [&](const auto& scan) { search(scan, k, capacity, states); }); \
    }                                                                                                          \
    void count(const HammingScan& job, uint32_t radius, int64_t* counts, int64_t stride) {                     \
        specialise<V8, V16, V32, V64>(job, ISA, [&](const auto& scan) {                                        \
            CountSink sink{radius, counts, stride};                                                            \
            scan.run(sink);                                                                                    \
        });                                                                                                    \
    }                                                                                                          \
    void fill(const HammingScan& job, uint32_t radius, const int64_t* offsets, int64_t stride, int64_t base,   \
              int32_t* distances, int64_t* indices) {                                                          \
        int64_t at[kRangeGroup];                                                                               \
        for (int64_t i = 0; i < job.num_queries; ++i) at[i] = offsets[i * stride];                             \
        specialise<V8, V16, V32, V64>(job, ISA, [&](const auto& scan) {                                        \
            FillSink sink{radius, at, base, distances, indices};                                               \
            scan.run(sink);                                                                                    \
        });                                                                                                    \
    }                                                                                                          \
    int64_t arithmetic(const HammingScan& job, int64_t rounds, uint64_t* checksum) {                           \
        int64_t pairs = 0;                                                                                     \
        specialise<V8, V16, V32, V64>(job, ISA, [&](const auto& scan) {                                        \
            *checksum += scan.arithmetic(rounds);                                                              \
            pairs = scan.arithmetic_pairs(rounds);                                                             \
        });                                                                                                    \
        return pairs;                                                                                          \
    }                                                                                                          \
    void table(const HammingScan& job, int32_t* out, int64_t row_stride) {                                     \
        specialise<V8, V16, V32, V64>(job, ISA, [&](const auto& scan) { scan.table(out, row_stride); });       \
    }                                                                                                          \
    }                                                                                                          \
    const HammingKernel NAME{ISA, topk, count, fill, table, arithmetic};

}  // namespace
}  // namespace cmr
