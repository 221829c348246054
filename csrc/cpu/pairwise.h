// The likelihood of pairwise similarities over a tile of Theta: its sum, and its gradient in Theta's place.
// See pairwise_kernel.h for the maths and the bound.
#pragma once

#include <cstdint>
#include <string>

namespace cmr {

enum class Similarity : int { labels = 0, classes = 1, bytes = 2, floats = 3 };

// All memory belongs to the caller.
struct PairwiseTile {
    float* theta;  // (rows, columns), contiguous
    int64_t rows, columns;
    Similarity kind;
    const int32_t* row_labels;  // labels: (rows, words) multi-hot bits; classes: (rows,) ids, words 1
    const int32_t* labels;      // (words, label_stride) planes of the columns' words, at the tile's first column
    int64_t words, label_stride;
    const void* s;  // bytes or floats: (rows, columns) from here, rows s_stride apart
    int64_t s_stride;
    float positive;    // similarity of a relevant pair; what s is multiplied by
    bool squared;      // SSAH's form, else the negative log-likelihood
    bool gradient;     // else theta is left as it is
    double* row_sums;  // (rows,) scratch
    double* total;     // the tile's sum is added here
};

struct PairwiseKernel {
    void (*rows)(const PairwiseTile&, int64_t first, int64_t last);
};

extern const PairwiseKernel pairwise_portable;
#if defined(__x86_64__)
extern const PairwiseKernel pairwise_avx2;
extern const PairwiseKernel pairwise_avx512;
#endif

void pairwise(const std::string& isa, const PairwiseTile&, int threads);

}  // namespace cmr
