// Pairwise likelihoods over a tile of Theta, written once and compiled once per instruction set (pairwise_<isa>.cpp).
//
// Maths      With e = exp(-|t|): softplus(t) = max(t, 0) + log1p(e), and sigmoid(t) = 1 / (1 + e) or e / (1 + e). Both
//            are finite for every finite t.
//            negative log-likelihood   softplus(t) - s t              gradient sigmoid(t) - s
//            squared (SSAH)            1/2 (s t - softplus(t))^2      gradient (s t - softplus(t)) (s - sigmoid(t))
// Layout     A tile that stays in the second-level cache, made by a matrix product and read by the next one. s comes
//            from label words (any bit shared), class ids (equal) or a matrix, and is never stored where it does not
//            exist already.
// Sums       in double, row by row, rows in order: the same bits for any number of threads.
// Bound      about 45 instructions for 16 elements on AVX-512, 25 of them the two polynomials.
#pragma once

#include "pairwise.h"
#include "vecmath.h"

namespace cmr {
namespace {

// Similarities of one row at columns [j, j + n).
struct SharedLabels {
    const int32_t *mine, *labels;
    int64_t words, stride;
    Vec positive;
    Vec operator()(int64_t j, int64_t n) const {
        Vec::mask found = Vec::shares(labels + j, n, mine[0]);
        for (int64_t w = 1; w < words; ++w)
            found = Vec::either(found, Vec::shares(labels + w * stride + j, n, mine[w]));
        return Vec::select(found, positive, Vec::of(0));
    }
};
struct SameClass {
    int32_t mine;
    const int32_t* labels;
    Vec positive;
    Vec operator()(int64_t j, int64_t n) const {
        return Vec::select(Vec::equal(labels + j, n, mine), positive, Vec::of(0));
    }
};
struct ByteMatrix {
    const uint8_t* row;
    Vec positive;
    Vec operator()(int64_t j, int64_t n) const { return Vec::bytes(row + j, n) * positive; }
};
struct FloatMatrix {
    const float* row;
    Vec positive;
    Vec operator()(int64_t j, int64_t n) const { return Vec::load(row + j, n) * positive; }
};

template <bool squared, class Similar>
double pairwise_row(float* theta, int64_t columns, bool gradient, const Similar& similar) {
    DoubleSum sum = DoubleSum::zero();
    const auto at = [&](int64_t j, int64_t n) {
        const Vec t = Vec::load(theta + j, n), s = similar(j, n);
        const Vec e = exp(Vec::of(0) - t.abs());
        const Vec soft = log1p_unit(e), inverse = Vec::of(1) / (Vec::of(1) + e);
        const Vec sigmoid = Vec::select(t < Vec::of(0), e * inverse, inverse);
        const Vec above = Vec::max(Vec::of(0), t);
        if (squared) {
            const Vec rest = (s * t - above) - soft;
            if (gradient) (rest * (s - sigmoid)).store(theta + j, n);
            return Vec::of(0.5f) * rest * rest;
        }
        if (gradient) (sigmoid - s).store(theta + j, n);
        return (above - s * t) + soft;
    };
    int64_t j = 0;
    for (; j + Vec::lanes <= columns; j += Vec::lanes) sum.add(at(j, Vec::lanes));
    if (j < columns) {
        float rest[Vec::lanes];
        at(j, columns - j).store(rest, columns - j);
        sum.add(Vec::load(rest, columns - j));
    }
    return sum.total();
}

void pairwise_rows(const PairwiseTile& t, int64_t first, int64_t last) {
    const Vec positive = Vec::of(t.positive);
    for (int64_t i = first; i < last; ++i) {
        float* const theta = t.theta + i * t.columns;
        const auto run = [&](const auto& similar) {
            t.row_sums[i] = t.squared ? pairwise_row<true>(theta, t.columns, t.gradient, similar)
                                      : pairwise_row<false>(theta, t.columns, t.gradient, similar);
        };
        switch (t.kind) {
            case Similarity::labels:
                run(SharedLabels{t.row_labels + i * t.words, t.labels, t.words, t.label_stride, positive});
                break;
            case Similarity::classes: run(SameClass{t.row_labels[i], t.labels, positive}); break;
            case Similarity::bytes: run(ByteMatrix{static_cast<const uint8_t*>(t.s) + i * t.s_stride, positive}); break;
            case Similarity::floats: run(FloatMatrix{static_cast<const float*>(t.s) + i * t.s_stride, positive}); break;
        }
    }
}

}  // namespace
}  // namespace cmr
