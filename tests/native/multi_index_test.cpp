// Search tables against a naive loop, without Python: for sanitizers and for processors that are only emulated.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "hamming.h"
#include "isa.h"
#include "multi_index.h"

namespace {

struct Tables {
    std::vector<uint32_t> order, starts;
    std::vector<uint8_t> different;
    std::vector<std::vector<uint32_t>> offsets, groups;
    std::vector<std::vector<uint64_t>> words;
    std::vector<cmr::SubstringTable> tables;
    cmr::MultiIndex index{};

    Tables(const std::vector<uint8_t>& codes, int64_t n, int bits, int count, int threads)
        : order(n), starts(n + 1), different(codes.size()), offsets(count), groups(count), words(count) {
        const int64_t nbytes = (bits + 7) / 8;
        std::vector<uint8_t> entries(n * cmr::kEntryBytes);
        const auto length = [&](int j) { return bits / count + (j < bits % count); };
        offsets[0].resize((int64_t{1} << length(0)) + 2);
        cmr::multi_index_order(codes.data(), n, nbytes, bits, length(0), threads, offsets[0].data(), entries.data(),
                               order.data(), count == 1 ? nullptr : different.data());
        int64_t num_groups = 0;
        if (count > 1) num_groups = cmr::multi_index_groups(n, nbytes, different.data(), starts.data());
        for (int j = 0, first = 0; j < count; first += length(j++)) {
            if (count > 1) {
                offsets[j].resize((int64_t{1} << length(j)) + 2);
                groups[j].resize(num_groups), words[j].resize(num_groups);
                cmr::multi_index_table(different.data(), num_groups, nbytes, bits, first, length(j), threads,
                                       offsets[j].data(), entries.data(), j ? groups[j].data() : nullptr,
                                       words[j].data());
            }
            tables.push_back({first, length(j), offsets[j].data(), count > 1 && j ? groups[j].data() : nullptr,
                              count > 1 ? words[j].data() : nullptr});
        }
        index = {n,
                 nbytes,
                 bits,
                 order.data(),
                 count > 1 ? starts.data() : nullptr,
                 bits > 64 ? different.data() : nullptr,
                 tables.data(),
                 count};
    }
};

void check(const std::string& isa, int bits, int count, int64_t n, int64_t k, int values, int threads) {
    const int64_t nbytes = (bits + 7) / 8, nq = 20;
    std::vector<uint8_t> codes(n * nbytes), q(nq * nbytes);
    uint32_t random = static_cast<uint32_t>(bits * 7 + n);
    for (auto* x : {&codes, &q})
        for (size_t i = 0; i < x->size(); ++i) {
            const uint32_t byte = (random = random * 1664525u + 1013904223u) >> 24;
            const bool last = i % nbytes + 1 == static_cast<size_t>(nbytes);
            (*x)[i] = static_cast<uint8_t>(byte % values & (last && bits % 8 ? (1 << bits % 8) - 1 : 255));
        }
    const Tables tables(codes, n, bits, count, threads);
    std::vector<int32_t> distances(nq * k, -1);
    std::vector<int64_t> indices(nq * k, -1);
    std::vector<uint8_t> done(nq), workspace(cmr::multi_index_workspace(n, nq, k, threads));
    std::vector<double> cost(nq);
    cmr::multi_index_search(isa, tables.index, {q.data(), nq, k, threads, INFINITY}, distances.data(), indices.data(),
                            done.data(), cost.data(), workspace.data());
    for (int64_t i = 0; i < nq; ++i) {
        std::vector<std::pair<int, int64_t>> order;
        for (int64_t j = 0; j < n; ++j) {
            int d = 0;
            for (int64_t b = 0; b < nbytes; ++b) d += __builtin_popcount(q[i * nbytes + b] ^ codes[j * nbytes + b]);
            order.emplace_back(d, j);
        }
        std::sort(order.begin(), order.end());
        for (int64_t at = 0; at < k; ++at) {
            const auto expected = at < n ? order[at] : std::pair<int, int64_t>{-1, -1};
            if (done[i] && distances[i * k + at] == expected.first && indices[i * k + at] == expected.second) continue;
            std::printf("multi-index differs: %s, %d bits, %d tables, n = %lld, k = %lld\n", isa.c_str(), bits, count,
                        (long long)n, (long long)k);
            std::exit(1);
        }
    }
}

// Codes of which some are few bits from others, by `count` tables of every count-th bit.
struct RangeTables {
    std::vector<uint64_t> masks;
    std::vector<std::vector<uint16_t>> places;
    std::vector<std::vector<uint32_t>> offsets, slots;
    std::vector<cmr::RangeTable> tables;
    cmr::RangeIndex index{};

    RangeTables(const std::vector<uint8_t>& codes, int64_t n, int64_t nbytes, int count, int bucket_bits, int threads)
        : masks(count * ((nbytes + 7) / 8)), places(count), offsets(count), slots(count) {
        const int64_t words = (nbytes + 7) / 8;
        for (int b = 0; b < 8 * nbytes; ++b) {
            masks[b % count * words + b / 64] |= uint64_t{1} << b % 64;
            places[b % count].push_back(static_cast<uint16_t>(b));
        }
        int index_bits = 1;
        while (int64_t{1} << index_bits < n) ++index_bits;
        std::vector<uint8_t> spare(n * cmr::kSlotBytes);
        for (int j = 0; j < count; ++j) {
            offsets[j].resize((int64_t{1} << bucket_bits) + 1), slots[j].resize(n);
            cmr::range_table(codes.data(), n, nbytes, &masks[j * words], bucket_bits, index_bits, threads,
                             offsets[j].data(), spare.data(), slots[j].data());
            tables.push_back({&masks[j * words], places[j].data(), static_cast<int>(places[j].size()),
                              offsets[j].data(), slots[j].data()});
        }
        index = {codes.data(), n, nbytes, bucket_bits, index_bits, tables.data(), count};
    }
};

struct RangeCase {
    int64_t nbytes;
    int radius, count;
    int64_t n, nq;
    int copies, threads;
    bool filtered;
    double effort;
};

void check_range(const std::string& isa, const RangeCase& c) {
    const auto [nbytes, radius, count, n, nq, copies, threads, filtered, effort] = c;
    std::vector<uint8_t> codes(n * nbytes), q(nq * nbytes);
    uint32_t random = static_cast<uint32_t>(nbytes * 31 + n + radius);
    const auto next = [&] { return (random = random * 1664525u + 1013904223u) >> 8; };
    for (int64_t i = 0; i < n; ++i)
        for (int64_t b = 0; b < nbytes; ++b)
            codes[i * nbytes + b] =
                i % copies ? codes[(i - i % copies) * nbytes + b] : static_cast<uint8_t>(next() >> 8);
    for (int64_t i = 0; i < n; ++i)
        if (i % copies) codes[i * nbytes + next() % nbytes] ^= static_cast<uint8_t>(1u << next() % 8);
    for (int64_t i = 0; i < nq; ++i)
        for (int64_t b = 0; b < nbytes; ++b)
            q[i * nbytes + b] = n ? codes[i * 7 % n * nbytes + b] : static_cast<uint8_t>(next());
    const RangeTables tables(codes, n, nbytes, count, 3, threads);
    std::vector<int8_t> reach(count);
    int left = radius - count + 1;
    for (int j = 0; j < count; ++j) {  // as evenly as it goes, the last ones more; fewer tables for a small radius
        reach[j] = static_cast<int8_t>(radius >= count - 1 ? left / (count - j) : (j <= radius ? 0 : -1));
        if (radius >= count - 1) left -= reach[j];
    }
    std::vector<uint32_t> allowed((n + 31) / 32);
    for (uint32_t& word : allowed) word = next() << 8 ^ next();
    const int64_t after = filtered ? 2 : -1;
    const cmr::RangeSearch search{{q.data(), nq, static_cast<uint32_t>(radius), reach.data(),
                                   filtered ? allowed.data() : nullptr, after, effort, 1000},
                                  threads};
    std::vector<int64_t> counts(nq), lims(nq + 1);
    std::vector<uint8_t> done(nq, 1), workspace(cmr::range_workspace(nq));
    cmr::range_count(isa, tables.index, search, counts.data(), done.data(), workspace.data());
    for (int64_t i = 0; i < nq; ++i) lims[i + 1] = lims[i] + (done[i] ? counts[i] : i % 3);  // gaps for the others
    std::vector<int32_t> distances(lims[nq], -1);
    std::vector<int64_t> indices(lims[nq], -1);
    cmr::range_fill(isa, tables.index, search, lims.data(), done.data(), distances.data(), indices.data(),
                    workspace.data());
    for (int64_t i = 0; i < nq; ++i) {
        int64_t at = lims[i];
        bool same = done[i] || std::isfinite(effort);
        for (int64_t j = 0; j < n && done[i]; ++j) {
            int d = 0;
            for (int64_t b = 0; b < nbytes; ++b) d += __builtin_popcount(q[i * nbytes + b] ^ codes[j * nbytes + b]);
            if (d > radius || (filtered && (j <= after + i || !(allowed[j / 32] >> j % 32 & 1)))) continue;
            same = same && at < lims[i + 1] && distances[at] == d && indices[at] == j;
            ++at;
        }
        if (same && (!done[i] || at == lims[i + 1])) continue;
        std::printf("range differs: %s, %lld bytes, %d tables, n = %lld, radius %d\n", isa.c_str(), (long long)nbytes,
                    count, (long long)n, radius);
        std::exit(1);
    }
}

void check_pairs(const std::string& isa, int64_t nbytes, int radius, int64_t n, int64_t tasks, bool filtered) {
    std::vector<uint8_t> codes(n * nbytes);
    uint32_t random = static_cast<uint32_t>(nbytes + n);
    const auto next = [&] { return (random = random * 1664525u + 1013904223u) >> 8; };
    for (int64_t i = 0; i < n; ++i)
        for (int64_t b = 0; b < nbytes; ++b)
            codes[i * nbytes + b] = i >= 5 ? codes[(i - 5) * nbytes + b] : static_cast<uint8_t>(next() >> 8);
    for (int64_t i = 0; i < n; ++i) codes[i * nbytes + next() % nbytes] ^= static_cast<uint8_t>(1u << next() % 8);
    const RangeTables tables(codes, n, nbytes, radius + 1, 3, 2);
    std::vector<uint32_t> allowed((n + 31) / 32);
    for (uint32_t& word : allowed) word = next() << 8 ^ next();
    const auto counts_in = [&](int64_t i) { return !filtered || (allowed[i / 32] >> i % 32 & 1); };
    std::vector<std::pair<uint64_t, int32_t>> found, expected;
    for (int table = 0; table <= radius; ++table) {
        const cmr::PairJob job{table, 0, n, static_cast<uint32_t>(radius), filtered ? allowed.data() : nullptr};
        std::vector<int64_t> counts(tasks);
        cmr::range_pairs(isa, tables.index, job, tasks, 2, nullptr, nullptr, 0, counts.data());  // counted alone
        const int64_t room = *std::max_element(counts.begin(), counts.end());
        std::vector<uint64_t> keys(tasks * room);
        std::vector<int32_t> distances(tasks * room);
        cmr::range_pairs(isa, tables.index, job, tasks, 2, keys.data(), distances.data(), room, counts.data());
        for (int64_t t = 0; t < tasks; ++t)
            for (int64_t at = t * room; at < t * room + counts[t]; ++at) found.emplace_back(keys[at], distances[at]);
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i + 1; j < n; ++j) {
            int d = 0;
            for (int64_t b = 0; b < nbytes; ++b) d += __builtin_popcount(codes[i * nbytes + b] ^ codes[j * nbytes + b]);
            if (d <= radius && counts_in(i) && counts_in(j)) expected.emplace_back(uint64_t(i) << 32 | uint64_t(j), d);
        }
    std::sort(found.begin(), found.end());
    if (found == expected) return;
    std::printf("pairs differ: %s, %lld bytes, n = %lld, radius %d\n", isa.c_str(), (long long)nbytes, (long long)n,
                radius);
    std::exit(1);
}

}  // namespace

int main() {
    for (const std::string& isa : cmr::available_isas()) {
        for (int values : {256, 3})
            for (int64_t n : {0, 1, 40, 500})
                for (int64_t k : {int64_t{1}, int64_t{10}, std::min<int64_t>(n + 2, 50)}) {
                    for (int bits : {1, 7, 8, 13, 16}) check(isa, bits, 1, n, k, values, 1);
                    for (auto [bits, count] : {std::pair{17, 2},
                                               {20, 2},
                                               {33, 4},
                                               {63, 7},
                                               {64, 8},
                                               {65, 8},
                                               {72, 9},
                                               {100, 12},
                                               {128, 16},
                                               {130, 13}})
                        check(isa, bits, count, n, k, values, 2);
                }
        // the widest codes, and the most threads
        check(isa, 4096, 256, 300, 302, 256, 64);
        check(isa, 4095, 273, 300, 1, 256, 64);
        check(isa, 16, 1, 3000, 2999, 256, 4096);
        for (int64_t nbytes : {1, 3, 8, 11, 32, 512})
            for (auto [radius, count] : {std::pair{0, 1}, {0, 3}, {1, 2}, {3, 2}, {4, 5}, {5, 3}})
                for (int64_t n : {0, 1, 50, 400})
                    for (bool filtered : {false, true})
                        if (nbytes < 32 || radius < count)
                            check_range(isa,
                                        {nbytes, radius, count, n, n ? 70 : 3, 9, 1 + radius % 2, filtered, INFINITY});
        // given up, more hits than are kept, the most tables, the most flips, the most threads, chunks of a table
        check_range(isa, {8, 2, 2, 700, 130, 9, 2, false, 0.5});
        check_range(isa, {8, 2, 2, 6000, 100, 3000, 2, false, INFINITY});
        check_range(isa, {512, 127, 128, 300, 20, 4, 2, false, INFINITY});
        check_range(isa, {2, 4, 1, 500, 20, 5, 64, true, INFINITY});
        check_range(isa, {8, 2, 3, 140000, 5, 3, 2, false, INFINITY});
        for (int64_t nbytes : {1, 3, 8, 32, 512})
            for (int radius : {0, 1, 3, 7})
                for (int64_t n : {0, 1, 60, 300})
                    for (int64_t tasks : {1, 7}) check_pairs(isa, nbytes, radius, n, tasks, radius % 2 == 1);
        // buckets come from memory: wider registers without a popcount add nothing
        if (cmr::last_isa() != (isa == "avx512bw" ? "avx2" : isa)) {
            std::printf("%s was asked for, %s ran\n", isa.c_str(), cmr::last_isa());
            return 1;
        }
        std::printf("%s ok\n", isa.c_str());
    }
}
