// What a contrastive loss does to one tile of similarities between two matrix products: log-sum-exp of its rows and
// columns, the gradient in its place, or the sigmoid loss. See info_nce_kernel.h for the maths, the layout, the bound.
#pragma once

#include <cstdint>
#include <string>

namespace cmr {

// A tile s (rows, cols), contiguous, float32 or bfloat16: products image_i . text_j, not scaled.
struct SimilarityTile {
    const void* s;
    bool bf16;
    int64_t rows, cols;
    float scale, bias;     // logits are scale * s + bias
    const float* weights;  // (rows, cols) how much of a positive each pair is, or null:
    int64_t diagonal;      // then row r has its positive in column r + diagonal, where the tile has one
};

// One direction of the softmax, all arrays along its axis; null where the direction is not wanted.
struct SoftmaxState {
    float *max, *sum;          // running: largest logit, sum of exp(logit - max)
    float *positive, *weight;  // running: sum of weight * logit and of weight
};
struct SoftmaxGradient {
    const float *max, *logsum;  // log-sum-exp in two parts, so that a softmax near 1 keeps its digits
    const float *grad, *pull;   // of the loss: times the softmax, and (over the sum of weights) times the weights
};

// Two arrays along the columns, padded to the widest vector.
static constexpr int64_t info_nce_padded(int64_t cols) { return (cols + 15) / 16 * 16; }
static constexpr int64_t info_nce_scratch(int64_t cols) { return 2 * info_nce_padded(cols) * 4; }

struct InfonceKernel {
    // scratch: info_nce_scratch(cols) bytes
    void (*forward)(const SimilarityTile&, const SoftmaxState& rows, const SoftmaxState& cols, float* scratch);
    // out (rows, cols) of the tile's type, may be the tile itself: gradient of the logits
    void (*gradient)(const SimilarityTile&, const SoftmaxGradient& rows, const SoftmaxGradient& cols, void* out);
    // sums[0..2]: softplus(-logit) of positives, softplus(logit) of the others, the gradient's sum. Its gradient, each
    // side times its weight, to out where it is not null. weights are a mask here.
    void (*sigmoid)(const SimilarityTile&, float positive, float negative, double* sums, void* out);
};

extern const InfonceKernel infonce_scalar;
#if defined(__x86_64__)
extern const InfonceKernel infonce_avx2;
extern const InfonceKernel infonce_avx512;
#elif defined(__aarch64__)
extern const InfonceKernel infonce_neon;
#endif

const InfonceKernel& infonce_kernel(const std::string& isa);

}  // namespace cmr
