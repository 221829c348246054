// Margin losses over triplets, written once and compiled once per instruction set (triplet_<isa>.cpp).
//
// Maths      L_a = sum over positives p and negatives n of max(0, d_p + m - d_n). With c_p = #{n : d_n < d_p + m} and
//            g_n = #{p : d_p + m > d_n}, L_a = sum_p c_p (d_p + m) - sum_n g_n d_n, and c_p and -g_n are its
//            derivatives by the distances. Sort the P limits d_p + m; the rank r_n = #{p : d_p + m <= d_n} of each
//            negative gives g_n = P - r_n, and the running sum of the histogram of ranks gives the c_p in sorted order.
//            Only the positives are sorted: they are the few.
// Mined      hard and hard_negative take a row minimum; semihard ranks negatives among the sorted d_p and takes running
//            minima of the least negative at each rank. All of them end as weights w of the distances.
// Layout     A row of inner products in (torch made them, block by block), e out in its place: w / d for Euclidean
//            distances, 2 w for squared ones, w for dot. Then the gradient of the block is sums of e and products e Y
//            and e^T X, which torch does. A row and its scratch take about 60 bytes a candidate and stay in the cache.
// Distances  |x|^2 + |y|^2 - 2 x y keeps its digits where that is not small beside |x|^2 + |y|^2. Where it is (kClose),
//            and in batches of which eager torch takes differences, so do we, in float64: equal distances stay equal,
//            a far row costs the others nothing, and 0 is 0.
// Sort       64-bit keys (limit in order-preserving bits, index), least significant byte first, bytes that are the same
//            in all keys skipped; up to 32 keys by insertion.
// Rank       Branch-free binary search in the limits, padded with infinity to 2^L - 1 and stored as a tree, level after
//            level: node k has the children 2 k and 2 k + 1. AVX-512: a level of up to 256 nodes is looked up in
//            registers by permutation, below that one gathers.
// Sums       float64 in 16 lanes by column: every instruction set and number of threads gives the same bits. The sum is
//            that of the weighed distances; the caller adds the margin once for each open triplet, in float64. The
//            module is compiled without contraction to fused multiply-add.
// Bound      The two products of 2 N d operations a row each (three where the gradient of both sides is wanted, or the
//            batch does not fit one block); this file is a few cycles a candidate beside d / 8 cycles for a product.
// Non-finite A NaN or an infinite distance makes the loss NaN or infinite: each distance takes part in the sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "triplet.h"

namespace cmr {
namespace {

#define CMR_INLINE __attribute__((always_inline))

inline uint32_t ordered_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

inline float from_ordered(uint32_t bits) {
    bits ^= (bits >> 31) ? 0x80000000u : 0xffffffffu;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Portable {
    // ranks[j] = #{limits < d[j]}, or <= where `equal`, of the limits in `tree` (grow_tree)
    template <bool equal>
    static void rank(const float* tree, int levels, const float* d, int64_t n, int32_t* ranks) {
        for (int64_t j = 0; j < n; ++j) {
            int32_t node = 1;
            for (int level = 0; level < levels; ++level)
                node = 2 * node + (equal ? tree[node] <= d[j] : tree[node] < d[j]);
            ranks[j] = node - (1 << levels);
        }
    }

    // keys (limit, index) of the relevant, in the order of the index; returns how many
    static int64_t relevant_keys(const float* d, const int32_t* kind, int64_t n, float margin, uint64_t* keys) {
        int64_t count = 0;
        for (int64_t j = 0; j < n; ++j) {
            keys[count] = static_cast<uint64_t>(ordered_bits(d[j] + margin)) << 32 | static_cast<uint64_t>(j);
            count += kind[j] == 1;
        }
        return count;
    }
};

// Sorts keys; returns where they are then, `keys` or `other`.
inline uint64_t* sort_keys(uint64_t* keys, uint64_t* other, int64_t count) {
    if (count <= 32) {
        for (int64_t i = 1; i < count; ++i) {
            const uint64_t key = keys[i];
            int64_t at = i;
            for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
            keys[at] = key;
        }
        return keys;
    }
    uint64_t all = ~uint64_t{0}, any = 0;
    for (int64_t i = 0; i < count; ++i) all &= keys[i], any |= keys[i];
    for (int shift = 32; shift < 64; shift += 8) {  // indices below are in order already
        if (((all ^ any) >> shift & 255) == 0) continue;
        uint32_t starts[256] = {};
        for (int64_t i = 0; i < count; ++i) ++starts[keys[i] >> shift & 255];
        uint32_t total = 0;
        for (uint32_t& start : starts) {
            const uint32_t size = start;
            start = total;
            total += size;
        }
        for (int64_t i = 0; i < count; ++i) other[starts[keys[i] >> shift & 255]++] = keys[i];
        std::swap(keys, other);
    }
    return keys;
}

// `body(first, count)` over kLanes columns at a time, count constant but for the last.
template <class Body>
inline void by_lanes(int64_t n, const Body& body) {
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) body(j, kLanes);
    if (j < n) body(j, n - j);
}

inline double total(const double* lanes) {
    double sum[kLanes];
    std::copy(lanes, lanes + kLanes, sum);
    for (int64_t half = kLanes / 2; half; half /= 2)
        for (int64_t l = 0; l < half; ++l) sum[l] += sum[l + half];
    return sum[0];
}

template <class Ops>
struct Triplet {
    static void kinds(const TripletLabels& labels, int64_t row, int64_t n, int32_t* kind) {
        const int64_t* const mine = labels.anchors + row * labels.words;
        if (labels.classes) {
            const int64_t id = mine[0];
            for (int64_t j = 0; j < n; ++j) kind[j] = labels.candidates[j] == id;
            return;
        }
        const int64_t* theirs = labels.candidates;
        for (int64_t j = 0; j < n; ++j) kind[j] = (theirs[j] & mine[0]) != 0;
        for (int64_t w = 1; w < labels.words; ++w) {
            theirs += n;
            const int64_t word = mine[w];
            if (word == 0) continue;
            for (int64_t j = 0; j < n; ++j) kind[j] |= (theirs[j] & word) != 0;
        }
    }

    // Of rows as they are given; the sum is float64.
    static float squared_difference(const float* x, const float* y, int64_t width) {
        double lanes[kLanes] = {};
        by_lanes(width, [&](int64_t first, int64_t count) CMR_INLINE {
            for (int64_t l = 0; l < count; ++l) {
                const double difference = static_cast<double>(x[first + l]) - static_cast<double>(y[first + l]);
                lanes[l] += difference * difference;
            }
        });
        return static_cast<float>(total(lanes));
    }

    static void distances(const TripletBlock& b, int64_t row, float* d) {
        const float* const product = b.block + row * b.candidates;
        if (b.distance == Distance::dot) {
            for (int64_t j = 0; j < b.candidates; ++j) d[j] = -product[j];
            return;
        }
        const float* const x = b.x + row * b.width;
        const float mine = b.x_squares[row];
        const int64_t own = b.self >= 0 ? b.self + row : -1;
        if (b.exact) {
            for (int64_t j = 0; j < b.candidates; ++j)
                d[j] = j == own ? 0 : squared_difference(x, b.y + j * b.width, b.width);
        } else {
            by_lanes(b.candidates, [&](int64_t first, int64_t count) CMR_INLINE {
                int32_t any = 0;
                for (int64_t l = 0; l < count; ++l) {
                    const int64_t j = first + l;
                    const float both = mine + b.y_squares[j], squared = both - 2 * product[j];
                    d[j] = squared < 0 ? 0 : squared;  // NaN stays
                    any |= squared <= kClose * both;
                }
                if (!any) return;
                for (int64_t j = first; j < first + count; ++j) {
                    if (j == own) d[j] = 0;
                    else if (d[j] <= kClose * (mine + b.y_squares[j]))
                        d[j] = squared_difference(x, b.y + j * b.width, b.width);
                }
            });
        }
        if (b.distance == Distance::euclidean)
            for (int64_t j = 0; j < b.candidates; ++j) d[j] = std::sqrt(d[j]);
    }

    // The block's row becomes e; returns its sum. A distance of 0 has no direction.
    static float finish(const TripletBlock& b, int64_t row, const float* w, const float* d) {
        float* const e = b.block + row * b.candidates;
        const float mine = b.x_squares[row];
        const bool root = b.distance == Distance::euclidean, squares = b.distance == Distance::squared;
        double lanes[kLanes] = {};
        int32_t close[kLanes] = {};
        by_lanes(b.candidates, [&](int64_t first, int64_t count) CMR_INLINE {
            for (int64_t l = 0; l < count; ++l) {
                const int64_t j = first + l;
                float value = w[j];
                if (root) value = d[j] == 0 ? 0 : value / d[j];
                else if (squares) value = 2 * value;
                const float squared = root ? d[j] * d[j] : d[j];
                close[l] += (value != 0) & (squared <= 2 * kClose * (mine + b.y_squares[j]));
                e[j] = value;
                lanes[l] += value;
            }
        });
        b.close[row] = 0;
        if (b.distance != Distance::dot)
            for (const int32_t lane : close) b.close[row] += lane;
        return static_cast<float>(total(lanes));
    }

    static void margin(const TripletBlock& b, const TripletMargin& m, int64_t row, const TripletScratch& s) {
        const int64_t n = b.candidates;
        kinds(b.labels, row, n, s.kind);
        if (b.self >= 0) s.kind[b.self + row] = 2;
        distances(b, row, s.d);
        int64_t triplets = 0, open = 0;
        std::fill(s.weights, s.weights + n, 0.0f);
        switch (m.mining) {
            case Mining::all: all(m.margin, n, s, triplets, open); break;
            case Mining::semihard: semihard(m.margin, n, s, triplets, open); break;
            default: hardest(m.margin, n, m.mining == Mining::hard, s, triplets, open);
        }
        m.triplets[row] = triplets;
        m.open[row] = open;
        const float *const d = s.d, *const weights = s.weights;
        double lanes[kLanes] = {};
        by_lanes(n, [&](int64_t first, int64_t count) CMR_INLINE {
            for (int64_t l = 0; l < count; ++l) {
                const int64_t j = first + l;
                lanes[l] += static_cast<double>(weights[j]) * static_cast<double>(d[j]);
            }
        });
        b.losses[row] = total(lanes);
        if (b.wants_e) b.row_sums[row] = finish(b, row, s.weights, s.d);
    }

    // Sorts the limits of the relevant into a tree; returns their keys in order.
    static const uint64_t* grow_tree(float margin, int64_t n, const TripletScratch& s, int64_t& count, int& levels) {
        count = Ops::relevant_keys(s.d, s.kind, n, margin, s.keys);
        const uint64_t* const keys = sort_keys(s.keys, s.other, count);
        for (levels = 0; (int64_t{1} << levels) <= count;) ++levels;
        for (int level = 0; level < levels; ++level) {
            const int64_t nodes = int64_t{1} << level, step = int64_t{1} << (levels - level);
            for (int64_t i = 0, at = step / 2 - 1; i < nodes; ++i, at += step)
                s.tree[nodes + i] = at < count ? from_ordered(static_cast<uint32_t>(keys[at] >> 32))
                                               : std::numeric_limits<float>::infinity();
        }
        return keys;
    }

    static int64_t count_negatives(const int32_t* kind, int64_t n) {
        int32_t count = 0;
        for (int64_t j = 0; j < n; ++j) count += kind[j] == 0;
        return count;
    }

    static void all(float margin, int64_t n, const TripletScratch& s, int64_t& triplets, int64_t& open) {
        int64_t positives;
        int levels;
        const uint64_t* const keys = grow_tree(margin, n, s, positives, levels);
        triplets = positives * count_negatives(s.kind, n);
        if (triplets == 0) return;
        Ops::template rank<true>(s.tree, levels, s.d, n, s.ranks);
        const int32_t most = static_cast<int32_t>(positives);
        const int32_t* __restrict const kind = s.kind;
        int32_t* __restrict const ranks = s.ranks;
        float* __restrict const weights = s.weights;
        for (int64_t j = 0; j < n; ++j) {
            int32_t above = (ranks[j] - most) & -static_cast<int32_t>(kind[j] == 0);
            above &= above >> 31;  // an infinite distance passes the padding, too
            ranks[j] = most + above;
            weights[j] = static_cast<float>(above);
        }
        const int64_t table = positives + 1;
        uint32_t* const counts = s.counts;  // four tables: equal neighbours do not wait for each other
        std::fill(counts, counts + 4 * table, 0u);
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) {
            ++counts[ranks[j]];
            ++counts[table + ranks[j + 1]];
            ++counts[2 * table + ranks[j + 2]];
            ++counts[3 * table + ranks[j + 3]];
        }
        for (; j < n; ++j) ++counts[ranks[j]];
        uint32_t below = 0;
        for (int64_t i = 0; i < positives; ++i) {
            below += counts[i] + counts[table + i] + counts[2 * table + i] + counts[3 * table + i];
            weights[static_cast<uint32_t>(keys[i])] = static_cast<float>(below);
            open += below;
        }
    }

    // Index of the least d (or of the greatest) among those of a kind; the lower of equals, -1 where there is none.
    template <bool greatest>
    static int64_t extreme(const float* d, const int32_t* kind, int32_t wanted, int64_t n) {
        float best[kLanes];
        int32_t at[kLanes];
        std::fill(best, best + kLanes, std::numeric_limits<float>::infinity());
        std::fill(at, at + kLanes, -1);
        by_lanes(n, [&](int64_t first, int64_t count) CMR_INLINE {
            for (int64_t l = 0; l < count; ++l) {
                const float value = greatest ? -d[first + l] : d[first + l];
                const bool better = kind[first + l] == wanted && (value < best[l] || at[l] < 0);
                best[l] = better ? value : best[l];
                at[l] = better ? static_cast<int32_t>(first + l) : at[l];
            }
        });
        int64_t found = 0;
        for (int64_t l = 1; l < kLanes; ++l)
            if (at[l] >= 0 && (at[found] < 0 || best[l] < best[found] || (best[l] == best[found] && at[l] < at[found])))
                found = l;
        return at[found];
    }

    static void hardest(float margin, int64_t n, bool one, const TripletScratch& s, int64_t& triplets, int64_t& open) {
        const int64_t nearest = extreme<false>(s.d, s.kind, 0, n);
        if (nearest < 0) return;
        const float least = s.d[nearest];
        if (one) {
            const int64_t farthest = extreme<true>(s.d, s.kind, 1, n);
            triplets = farthest >= 0;
            open = triplets && least < s.d[farthest] + margin;
            if (open) s.weights[farthest] = 1;
        } else {
            int32_t positives = 0, reached = 0;
            for (int64_t j = 0; j < n; ++j) {
                const int32_t positive = s.kind[j] == 1, hit = positive & (least < s.d[j] + margin);
                s.weights[j] = static_cast<float>(hit);
                positives += positive;
                reached += hit;
            }
            triplets = positives;
            open = reached;
        }
        if (open) s.weights[nearest] = -static_cast<float>(open);
    }

    static void semihard(float margin, int64_t n, const TripletScratch& s, int64_t& triplets, int64_t& open) {
        int64_t positives;
        int levels;
        const uint64_t* const keys = grow_tree(0, n, s, positives, levels);
        if (positives == 0) return;
        Ops::template rank<false>(s.tree, levels, s.d, n, s.ranks);
        int32_t* const nearest = reinterpret_cast<int32_t*>(s.counts);  // the least negative of each rank
        std::fill(nearest, nearest + positives + 1, -1);
        for (int64_t j = 0; j < n; ++j) {
            if (s.kind[j] != 0) continue;
            int32_t& best = nearest[std::min<int64_t>(s.ranks[j], positives)];
            if (best < 0 || s.d[j] < s.d[best]) best = static_cast<int32_t>(j);
        }
        for (int64_t i = positives; i-- > 0;) {
            if (nearest[i + 1] < 0) continue;  // none is farther
            ++triplets;
            const int64_t p = static_cast<uint32_t>(keys[i]), negative = nearest[i + 1];
            if (s.d[negative] < s.d[p] + margin) {
                ++open;
                s.weights[p] = 1;
                s.weights[negative] -= 1;
            }
            // what is nearest above this positive serves those before it unless something is nearer
            if (nearest[i] < 0) nearest[i] = nearest[i + 1];
        }
    }

    static void acmr(const TripletBlock& b, const AcmrTerms& t, int64_t row, const TripletScratch& s) {
        const int64_t n = b.candidates;
        kinds(b.labels, row, n, s.kind);
        distances(b, row, s.d);
        const float near = t.near[t.first + row], far = t.far[t.first + row];
        double lanes[kLanes] = {};
        by_lanes(n, [&](int64_t first, int64_t count) CMR_INLINE {
            for (int64_t l = 0; l < count; ++l) {
                const int64_t j = first + l;
                const float hinge = t.margin - s.d[j], pull = near + t.near[j], push = far + t.far[j];
                const bool alike = s.kind[j] == 1, open = !(hinge <= 0);  // NaN counts as open
                s.weights[j] = alike ? pull : open ? -push : 0.0f;
                lanes[l] += alike ? static_cast<double>(pull) * s.d[j] : open ? static_cast<double>(push) * hinge : 0.0;
            }
        });
        b.losses[row] = total(lanes);
        if (b.wants_e) b.row_sums[row] = finish(b, row, s.weights, s.d);
    }

    static int64_t count_relevant(const TripletLabels& labels, int64_t row, int64_t n) {
        int32_t kind[256];
        int64_t count = 0;
        TripletLabels part = labels;
        part.anchors += row * labels.words;
        if (labels.classes) {
            for (int64_t j = 0; j < n; ++j) count += labels.candidates[j] == part.anchors[0];
            return count;
        }
        for (int64_t first = 0; first < n; first += 256) {
            const int64_t size = std::min<int64_t>(256, n - first);
            std::fill(kind, kind + size, 0);
            for (int64_t w = 0; w < labels.words; ++w)
                for (int64_t j = 0; j < size; ++j)
                    kind[j] |= (labels.candidates[w * n + first + j] & part.anchors[w]) != 0;
            for (int64_t j = 0; j < size; ++j) count += kind[j];
        }
        return count;
    }

    // Rows that are a power of two apart share few cache lines, so tiles are transposed in a copy.
    static void symmetrise(float* e, int64_t n, int64_t tile_row) {
        const int64_t top = tile_row * kTripletTile, height = std::min(kTripletTile, n - top);
        float copy[kTripletTile][kTripletTile + 1];
        for (int64_t left = top; left < n; left += kTripletTile) {
            const int64_t width = std::min(kTripletTile, n - left);
            float* const above = e + top * n + left;
            float* const below = e + left * n + top;
            for (int64_t j = 0; j < width; ++j)
                for (int64_t i = 0; i < height; ++i) copy[j][i] = below[j * n + i];
            for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < width; ++j) copy[j][i] += above[i * n + j];
            for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < width; ++j) above[i * n + j] = copy[j][i];
            if (left == top) continue;
            for (int64_t j = 0; j < width; ++j)
                for (int64_t i = 0; i < height; ++i) below[j * n + i] = copy[j][i];
        }
    }

    static float sum(const float* row, int64_t n) {
        double lanes[kLanes] = {};
        by_lanes(n, [&](int64_t first, int64_t count) CMR_INLINE {
            for (int64_t l = 0; l < count; ++l) lanes[l] += row[first + l];
        });
        return static_cast<float>(total(lanes));
    }
};

#define CMR_TRIPLET_KERNEL(name, Ops)                                                                   \
    const TripletKernel name = {Triplet<Ops>::margin, Triplet<Ops>::acmr, Triplet<Ops>::count_relevant, \
                                Triplet<Ops>::symmetrise, Triplet<Ops>::sum};

}  // namespace
}  // namespace cmr
