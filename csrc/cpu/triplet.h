// Margin losses over triplets: from a block of anchors' inner products with all candidates to the weight of each
// distance in the loss, in place. See triplet_kernel.h for the maths, the layout and the bound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cmr {

enum class Mining : int { all = 0, hard = 1, hard_negative = 2, semihard = 3 };
enum class Distance : int { euclidean = 0, squared = 1, dot = 2 };  // dot: minus the inner product

// Who shares a label with whom: class ids, or words of packed multi-hot labels.
struct TripletLabels {
    int64_t words;  // of a row; 1 for class ids
    bool classes;
    const int64_t* anchors;     // (rows, words)
    const int64_t* candidates;  // (words, candidates)
};

// A block of anchors. All memory belongs to the caller.
struct TripletBlock {
    int64_t rows, candidates;  // candidates < 2^24
    TripletLabels labels;
    int64_t self;  // the candidate that is row 0's own item, then the next one; -1: anchors are no candidates
    Distance distance;
    bool wants_e;                        // else the block is left as it is
    bool exact;                          // every distance from differences: no products come in
    float* block;                        // (rows, candidates): inner products in, e out (triplet_kernel.h)
    const float *x_squares, *y_squares;  // (rows,), (candidates,) squared norms
    const float *x, *y;                  // (rows, width), (candidates, width)
    int64_t width;
    double* losses;   // (rows,) sums of weight times distance; of a margin loss the caller adds margin * open
    float* row_sums;  // (rows,) of e
    int64_t* close;   // (rows,) pairs with a weight that are close (kClose)
    int threads;
};

struct TripletMargin {
    float margin;
    Mining mining;
    int64_t *triplets, *open;  // (rows,) of an anchor, and those of them whose hinge is above 0
};

// ACMR Eq. 4-6 in their separable form: the weight of pair (i, j) is near[i] + near[j] where relevant, else far[i] +
// far[j] on its hinge.
struct AcmrTerms {
    float margin;
    const float *near, *far;  // (candidates,)
    int64_t first;            // row 0's own index
};

constexpr float kClose = 1.0f / 64;  // squared distances up to this share of |x|^2 + |y|^2 come from differences

constexpr int64_t kLanes = 16;  // of the sums: their order is the same on every instruction set

// What one row is worked in, laid out by triplet.cpp; `candidates` rounded up to lanes each, and more where said.
struct TripletScratch {
    float* d;
    int32_t* kind;  // 1 relevant, 0 not, 2 the anchor itself
    float* weights;
    int32_t* ranks;
    uint64_t *keys, *other;
    float* tree;       // twice: as many as the next power of two
    uint32_t* counts;  // four tables, one more each
};

struct TripletKernel {
    void (*margin)(const TripletBlock&, const TripletMargin&, int64_t row, const TripletScratch&);
    void (*acmr)(const TripletBlock&, const AcmrTerms&, int64_t row, const TripletScratch&);
    int64_t (*count_relevant)(const TripletLabels&, int64_t row, int64_t candidates);
    // e + e^T of tiles (i, i ...) of an (n, n) block, in place; and the sums of a row
    void (*symmetrise)(float* e, int64_t n, int64_t tile_row);
    float (*sum)(const float* row, int64_t n);
};

extern const TripletKernel triplet_scalar;
#if defined(__x86_64__)
extern const TripletKernel triplet_avx2;
extern const TripletKernel triplet_avx512;
#elif defined(__aarch64__)
extern const TripletKernel triplet_neon;
#endif

constexpr int64_t kTripletTile = 32;

size_t triplet_workspace(int64_t rows, int64_t candidates, int threads);
void triplet_margin(const std::string& isa, const TripletBlock&, const TripletMargin&, uint8_t* workspace);
void triplet_acmr(const std::string& isa, const TripletBlock&, const AcmrTerms&, uint8_t* workspace);

// near and far of AcmrTerms for n pairs with these labels. mean: per anchor the mean over its positives and over its
// negatives, then the mean over the anchors that have both; else the sum over all triplets. counts (n,) is scratch.
void triplet_acmr_factors(const std::string& isa, const TripletLabels&, int64_t n, double weight, bool mean,
                          int threads, int64_t* counts, float* near, float* far);

// The point that both sets are moved by, so that rows far from 0 keep the digits of their distances: (width,) of the
// median of up to kOriginRows rows of each where it is more than twice the median deviation, 0 elsewhere. Whether any
// is not 0. y null: there is one set.
constexpr int64_t kOriginRows = 17;
bool triplet_origin(const float* x, int64_t n, const float* y, int64_t m, int64_t width, float* origin);

// (n, n) e -> e + e^T in place, and its row sums.
void triplet_symmetrise(const std::string& isa, int64_t n, int threads, float* e, float* row_sums);

}  // namespace cmr
