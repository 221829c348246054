// L-inf, element by element in float32, the operations of the eager formula in its order, so the bits are the same:
//
//     x <- clamp(origin + clamp(x + alpha sign(g) - origin, -eps, eps), low, high)
//
// L2, sample by sample, with both norms in float64:
//
//     d <- x + alpha g / |g| - origin,   x <- clamp(origin + d min(1, eps / |d|), low, high)
//
// A sum over a sample always adds the same 16 partial sums, so the bits do not depend on the instruction set either.
//
// Noise: Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (block, sample index): element e of a sample is word
// e % 4 of block e / 4, of which 23 bits become an odd multiple of 2^-23 in (-1, 1), exactly.
//
// Layout: x, g and origin (samples, channels, inner), contiguous; a task is a run of samples.
// Bound: memory. The L-inf step moves 16 bytes an element (three reads, a write); eager moves 68 in seven passes.
//
// Versions tried: loops that the compiler vectorises are as fast as intrinsics (both at the speed of memory, and in
// cache within a tenth of a copy of the same bytes), so each instruction set compiles this file.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "pgd.h"

namespace cmr {
namespace {

constexpr int kLanes = 16;

inline float lesser(float a, float b) { return a < b ? a : b; }
inline float greater(float a, float b) { return a > b ? a : b; }

// 1 where a value is not finite
inline uint32_t not_finite(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (bits & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
}

struct PgdLoops {
    // whether a gradient was not finite
    static uint32_t sign_run(float* __restrict x, const float* __restrict g, const float* __restrict origin, int64_t n,
                             float alpha, float eps, float low, float high) {
        uint32_t broken = 0;
        for (int64_t i = 0; i < n; ++i) {
            const float sign = static_cast<float>((g[i] > 0.0f) - (g[i] < 0.0f));
            const float delta = lesser(greater(x[i] + alpha * sign - origin[i], -eps), eps);
            x[i] = lesser(greater(origin[i] + delta, low), high);
            broken |= not_finite(g[i]);
        }
        return broken;
    }

    static double total(const double (&lanes)[kLanes]) {
        double sum = 0;
        for (double lane : lanes) sum += lane;
        return sum;
    }

    static double squares(const float* __restrict g, int64_t n, uint32_t& broken) {
        double lanes[kLanes] = {};
        uint32_t found = 0;
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes)
            for (int j = 0; j < kLanes; ++j) {
                const double value = g[i + j];
                lanes[j] += value * value;
                found |= not_finite(g[i + j]);
            }
        for (int j = 0; i + j < n; ++j) {
            lanes[j] += static_cast<double>(g[i + j]) * g[i + j];
            found |= not_finite(g[i + j]);
        }
        broken = found;
        return total(lanes);
    }

    static void move(float* __restrict x, const float* __restrict g, int64_t n, double scale) {
        for (int64_t i = 0; i < n; ++i) x[i] += static_cast<float>(scale * g[i]);
    }

    static double squared_distance(const float* __restrict x, const float* __restrict origin, int64_t n) {
        double lanes[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes)
            for (int j = 0; j < kLanes; ++j) {
                const double d = x[i + j] - origin[i + j];
                lanes[j] += d * d;
            }
        for (int j = 0; i + j < n; ++j) {
            const double d = x[i + j] - origin[i + j];
            lanes[j] += d * d;
        }
        return total(lanes);
    }

    static void shrink(float* __restrict x, const float* __restrict origin, int64_t n, float factor, float low, float high) {
        for (int64_t i = 0; i < n; ++i)
            x[i] = lesser(greater(origin[i] + (x[i] - origin[i]) * factor, low), high);
    }

    static uint32_t l2_sample(const PgdStep& s, int64_t sample) {
        const int64_t n = s.channels * s.inner, at = sample * n;
        uint32_t broken;
        const double norm = std::sqrt(squares(s.gradient + at, n, broken));
        if (broken) return 1;
        if (norm > 0) move(s.x + at, s.gradient + at, n, s.alpha(sample, 0) / norm);
        const double distance = std::sqrt(squared_distance(s.x + at, s.origin + at, n)), eps = s.eps(sample, 0);
        const float factor = distance > eps ? static_cast<float>(eps / distance) : 1.0f;
        for (int64_t c = 0; c < s.channels; ++c)
            shrink(s.x + at + c * s.inner, s.origin + at + c * s.inner, s.inner, factor, s.low(sample, c), s.high(sample, c));
        return 0;
    }

    static void step(const PgdStep& s, int64_t first, int64_t last) {
        for (int64_t sample = first; sample < last; ++sample) {
            uint32_t broken = 0;
            if (s.l2) {
                broken = l2_sample(s, sample);
            } else {
                for (int64_t c = 0; c < s.channels; ++c) {
                    const int64_t at = (sample * s.channels + c) * s.inner;
                    broken |= sign_run(s.x + at, s.gradient + at, s.origin + at, s.inner, s.alpha(sample, c),
                                       s.eps(sample, c), s.low(sample, c), s.high(sample, c));
                }
            }
            if (broken && s.broken && s.broken[sample] < 0) s.broken[sample] = s.step;
        }
    }

    static void noise(const PgdNoise& s, int64_t first, int64_t last) {
        for (int64_t sample = first; sample < last; ++sample) {
            float* const out = s.out + sample * s.count;
            const uint64_t index = static_cast<uint64_t>(s.index[sample]);
            int64_t block = 0;
            for (; 4 * (block + kLanes) <= s.count; block += kLanes) blocks(s.seed, index, block, out + 4 * block);
            float rest[4 * kLanes];
            if (4 * block < s.count) {
                blocks(s.seed, index, block, rest);
                std::memcpy(out + 4 * block, rest, static_cast<size_t>(s.count - 4 * block) * 4);
            }
        }
    }

    static float uniform(uint32_t word) {
        return static_cast<float>(2 * static_cast<int32_t>(word >> 9) + 1 - (1 << 23)) * 0x1p-23f;
    }

    // 4 * kLanes elements of a sample, from block `first`
    static void blocks(uint64_t seed, uint64_t index, int64_t first, float* __restrict out) {
        uint32_t c[4][kLanes], key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (int j = 0; j < kLanes; ++j) {
            const uint64_t block = static_cast<uint64_t>(first + j);
            c[0][j] = static_cast<uint32_t>(block);
            c[1][j] = static_cast<uint32_t>(block >> 32);
            c[2][j] = static_cast<uint32_t>(index);
            c[3][j] = static_cast<uint32_t>(index >> 32);
        }
        for (int round = 0; round < 10; ++round) {
            for (int j = 0; j < kLanes; ++j) {
                const uint64_t a = uint64_t{0xD2511F53u} * c[0][j], b = uint64_t{0xCD9E8D57u} * c[2][j];
                c[0][j] = static_cast<uint32_t>(b >> 32) ^ c[1][j] ^ key0;
                c[1][j] = static_cast<uint32_t>(b);
                c[2][j] = static_cast<uint32_t>(a >> 32) ^ c[3][j] ^ key1;
                c[3][j] = static_cast<uint32_t>(a);
            }
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        for (int j = 0; j < kLanes; ++j)
            for (int word = 0; word < 4; ++word) out[4 * j + word] = uniform(c[word][j]);
    }
};

}  // namespace
}  // namespace cmr
