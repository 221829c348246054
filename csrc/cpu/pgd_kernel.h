// L-inf, element by element in float32, the operations of the eager formula in its order, so the bits are the same:
//
//     x <- clamp(origin + clamp(x + alpha sign(g) - origin, -eps, eps), low, high)
//
// L2, sample by sample:
//
//     d <- x + alpha g / |g| - origin,   x <- clamp(origin + d min(1, eps / |d|), low, high)
//
// Squares are added in float32 in 16 lanes over 256 elements, then in float64, always in this order, so the bits do not
// depend on the instruction set either.
//
// Noise: Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (block, sample index): element e of a sample is word
// e % 4 of block e / 4, of which 23 bits become an odd multiple of 2^-23 in (-1, 1), exactly.
//
// Layout: x, g and origin (samples, channels, inner), contiguous; a task is a run of samples.
// Bound: memory. The L-inf step moves 16 bytes an element (three reads, a write), eager 68 in seven passes. L2 reads g
// three times and x and origin twice, while a sample is in cache.
//
// Versions tried: loops that the compiler vectorises run the L-inf step at the speed of memory (95% of a stream of
// the same bytes), so each instruction set compiles this file. For the sums of L2 an array of partial sums stayed in
// memory, and float64 throughout cost conversions: both were two to five times slower than registers of floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "pgd.h"

namespace cmr {
namespace {

#ifndef CMR_PGD_FLOATS
#define CMR_PGD_FLOATS 4
#endif
constexpr int kLanes = 16, kBlock = 256;
constexpr int kFloats = CMR_PGD_FLOATS, kVectors = kLanes / kFloats;  // of a register, and registers of partial sums
typedef float Floats __attribute__((vector_size(4 * CMR_PGD_FLOATS)));

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

    static double total(const Floats (&lanes)[kVectors]) {
        float each[kLanes];
        std::memcpy(each, lanes, sizeof each);
        double sum = 0;
        for (float lane : each) sum += lane;
        return sum;
    }

    // The bits of the largest |g|: NaN and infinity are above all others.
    static uint32_t largest(const float* __restrict g, int64_t n) {
        uint32_t most = 0;
        for (int64_t i = 0; i < n; ++i) {
            uint32_t bits;
            std::memcpy(&bits, g + i, 4);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        return most;
    }

    // |unit g|^2
    static double squares(const float* __restrict g, int64_t n, float unit) {
        double sum = 0;
        int64_t i = 0;
        while (i + kLanes <= n) {
            Floats lanes[kVectors] = {};
            for (const int64_t end = std::min(n - kLanes, i + kBlock - kLanes); i <= end; i += kLanes)
                for (int v = 0; v < kVectors; ++v) {
                    Floats value;
                    std::memcpy(&value, g + i + v * kFloats, sizeof value);
                    value *= unit;
                    lanes[v] += value * value;
                }
            sum += total(lanes);
        }
        for (; i < n; ++i) {
            const double value = unit * g[i];
            sum += value * value;
        }
        return sum;
    }

    // x <- x + scale unit g, and |x - origin|^2
    static double move(float* __restrict x, const float* __restrict g, const float* __restrict origin, int64_t n,
                       float scale, float unit) {
        double sum = 0;
        int64_t i = 0;
        while (i + kLanes <= n) {
            Floats lanes[kVectors] = {};
            for (const int64_t end = std::min(n - kLanes, i + kBlock - kLanes); i <= end; i += kLanes)
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t place = i + v * kFloats;
                    Floats at, along, home;
                    std::memcpy(&at, x + place, sizeof at);
                    std::memcpy(&along, g + place, sizeof along);
                    std::memcpy(&home, origin + place, sizeof home);
                    at += scale * (along * unit);
                    std::memcpy(x + place, &at, sizeof at);
                    const Floats delta = at - home;
                    lanes[v] += delta * delta;
                }
            sum += total(lanes);
        }
        for (; i < n; ++i) {
            x[i] += scale * (g[i] * unit);
            const double delta = x[i] - origin[i];
            sum += delta * delta;
        }
        return sum;
    }

    static void shrink(float* __restrict x, const float* __restrict origin, int64_t n, float factor, float low,
                       float high) {
        for (int64_t i = 0; i < n; ++i) x[i] = lesser(greater(origin[i] + (x[i] - origin[i]) * factor, low), high);
    }

    static uint32_t l2_sample(const PgdStep& s, int64_t sample) {
        const int64_t n = s.channels * s.inner, at = sample * n;
        const uint32_t most = largest(s.gradient + at, n);
        if (most >= 0x7f800000u) return 1;
        // a power of two that brings the largest element near 1: squares neither overflow nor vanish, nothing rounds
        const float unit = std::ldexp(1.0f, std::clamp(127 - static_cast<int>(most >> 23), -126, 126));
        const double norm = std::sqrt(squares(s.gradient + at, n, unit)), eps = s.eps(sample, 0);
        const float scale = most ? static_cast<float>(s.alpha(sample, 0) / norm) : 0.0f;
        const double distance = std::sqrt(move(s.x + at, s.gradient + at, s.origin + at, n, scale, unit));
        const float factor = distance > eps ? static_cast<float>(eps / distance) : 1.0f;
        for (int64_t c = 0; c < s.channels; ++c)
            shrink(s.x + at + c * s.inner, s.origin + at + c * s.inner, s.inner, factor, s.low(sample, c),
                   s.high(sample, c));
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
