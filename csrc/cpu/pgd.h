// The update of a projected gradient attack and the noise that it starts from. See pgd_kernel.h for the maths.
#pragma once

#include <cstdint>
#include <string>

namespace cmr {

// One value for every (sample, channel); a stride of 0 repeats it.
struct PgdValue {
    const float* at;
    int64_t per_sample, per_channel;
    float operator()(int64_t sample, int64_t channel) const { return at[sample * per_sample + channel * per_channel]; }
};

struct PgdStep {
    int64_t samples, channels, inner;  // x is (samples, channels, inner), contiguous
    float* x;
    const float *gradient, *origin;
    PgdValue alpha, eps, low, high;
    int32_t* broken;  // (samples,), or null: `step` is written where it is negative and a gradient is not finite
    int32_t step;
    bool l2;
    int threads;
};

struct PgdNoise {
    uint64_t seed;
    const int64_t* index;  // (samples,) what a sample's noise depends on, besides the seed
    int64_t samples, count;
    float* out;  // (samples, count) in (-1, 1)
    int threads;
};

// What one instruction set runs: samples [first, last) of a step, or of the noise.
struct PgdKernel {
    void (*step)(const PgdStep&, int64_t first, int64_t last);
    void (*noise)(const PgdNoise&, int64_t first, int64_t last);
};

extern const PgdKernel pgd_scalar, pgd_avx2, pgd_avx512, pgd_neon;

void pgd_step(const std::string& isa, const PgdStep& step);
void pgd_noise(const std::string& isa, const PgdNoise& noise);

}  // namespace cmr
