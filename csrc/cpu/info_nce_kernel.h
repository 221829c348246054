// Epilogues over one tile of similarities, while it is in cache.
//
// Maths. With logits z = scale * s, m the largest of a row and l the log of its sum of exp(z - m), InfoNCE (MAT Eq. 1)
// of the row with positives of weights w is (m - sum w z / sum w) + l, and its gradient
// grad * (exp(z - m - l) - w / sum w). The columns are the other direction, from the same tile. m and l stay apart: at
// a scale of 100 their sum has lost the digits that a softmax near 1 is made of. The sigmoid loss is softplus(-z) of
// positives, softplus(z) of the others, with log(1 + t) = 2 atanh(t / (2 + t)), t = exp(-|z|), so that many small terms
// keep theirs.
//
// Layout. A tile is contiguous, so that the matrix product writes it and the next ones read it without a copy; it and
// the columns' arrays stay in the second-level cache. The compiler's own vectors, as wide as the registers
// (CMR_VECTOR_BYTES), so one source serves every instruction set.
//
// Bound. Two exp a pair in either pass, some 60 vector operations for a vector of pairs, against 4 d multiply-adds a
// pair of the products: at d = 512 on AVX-512 2 ns against 40 ns in float32, against 19 ns in bfloat16.
//
// Versions tried. Vectors of 64 bytes on every instruction set: the compiler takes them apart through memory, 6 times
// slower on AVX2. Registers' own width: this one.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "info_nce.h"

#ifndef CMR_VECTOR_BYTES
#define CMR_VECTOR_BYTES 16
#endif

namespace cmr {
namespace {

constexpr int64_t kLanes = CMR_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(CMR_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(CMR_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(CMR_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(CMR_VECTOR_BYTES / 2)));

template <class To, class From>
inline To bits(const From& x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

inline Floats all(float x) { return Floats{} + x; }
inline Floats choose(Ints mask, Floats a, Floats b) { return mask ? a : b; }
inline Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

inline float largest(Floats x) {
    float y = x[0];
    for (int i = 1; i < kLanes; ++i) y = std::max(y, x[i]);
    return y;
}

inline float sum(Floats x) {
    float y[kLanes];
    std::memcpy(y, &x, sizeof(y));
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) y[i] += y[i + half];
    return y[0];
}

// Float32 or bfloat16 in memory; counts under kLanes leave `fill` in the other lanes.
inline Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
inline Floats load(const uint16_t* p) {
    Halves x;
    std::memcpy(&x, p, sizeof(x));
    return bits<Floats>(__builtin_convertvector(x, Words) << 16);
}
template <class T>
inline Floats load(const T* p, int64_t count, float fill) {
    if (count >= kLanes) return load(p);
    T padded[kLanes] = {};
    std::memcpy(padded, p, count * sizeof(T));
    Floats x = load(padded);
    for (int64_t i = count; i < kLanes; ++i) x[i] = fill;
    return x;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(uint16_t* p, Floats x) {  // to the nearest, ties to even; not a number stays none
    const Words w = bits<Words>(x);
    const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    const Halves y = __builtin_convertvector(bits<Words>(x != x) ? (w >> 16) | 0x40 : rounded, Halves);
    std::memcpy(p, &y, sizeof(y));
}
template <class T>
inline void store(T* p, Floats x, int64_t count) {
    if (count >= kLanes) return store(p, x);
    T padded[kLanes];
    store(padded, x);
    std::memcpy(p, padded, count * sizeof(T));
}
inline float value(const float* p) { return *p; }
inline float value(const uint16_t* p) { return bits<float>(static_cast<uint32_t>(*p) << 16); }

// exp(x) to two units in the last place; 0 below -87.3, where it leaves the normal numbers
inline Floats exp(Floats x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
    const Floats y = choose(x > 88.7f, all(88.7f), x);
    const Floats shifted = y * 1.44269504f + kMagic, n = shifted - kMagic;
    const Floats r = y - n * 0.693359375f - n * -2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Floats power = bits<Floats>((bits<Words>(shifted) << 23) + 0x3f800000);
    return choose(x < -87.3f, Floats{}, p * power);
}
inline float exp(float x) { return exp(all(x))[0]; }

// log(1 + t) for t from 0 to 1
inline Floats log1p(Floats t) {
    const Floats s = t / (t + 2.0f), q = s * s;
    Floats p = q * (1.0f / 15) + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    return 2.0f * (p * q * s + s);
}

enum class Positives { none, diagonal, weights };

// How much of a positive the pairs from column c on are; `at` is the row's column on the diagonal.
template <Positives kind>
inline Floats weights_of(const float* row, int64_t c, int64_t count, int64_t at) {
    if constexpr (kind == Positives::weights) return load(row + c, count, 0.0f);
    if constexpr (kind == Positives::none) return Floats{};
    const int64_t lane = at - c;
    float weights[kLanes] = {};
    if (lane >= 0 && lane < std::min(count, kLanes)) weights[lane] = 1.0f;
    return load(weights);
}

template <class Body>
inline void with_positives(const SimilarityTile& t, const Body& body) {
    if (t.weights) body(std::integral_constant<Positives, Positives::weights>());
    else if (t.diagonal > -t.rows && t.diagonal < t.cols)
        body(std::integral_constant<Positives, Positives::diagonal>());
    else body(std::integral_constant<Positives, Positives::none>());
}

template <class Body>
inline void with_directions(bool rows, bool cols, const Body& body) {
    if (rows && cols) body(std::true_type(), std::true_type());
    else if (rows) body(std::true_type(), std::false_type());
    else body(std::false_type(), std::true_type());
}

// Logits from `p` on; the lanes beyond count are minus infinity, which no sum and no maximum sees
template <class T>
inline Floats logits(const SimilarityTile& t, const T* p, int64_t count) {
    Floats z = load(p, count, 0.0f) * t.scale + t.bias;
    for (int64_t i = count; i < kLanes; ++i) z[i] = -std::numeric_limits<float>::infinity();
    return z;
}

template <class T, Positives kind, bool kRows, bool kCols>
void forward_tile(const SimilarityTile& t, const SoftmaxState& rows, const SoftmaxState& cols, float* scratch) {
    constexpr float kLeast = -std::numeric_limits<float>::infinity();
    const T* const s = static_cast<const T*>(t.s);
    const int64_t padded = info_nce_padded(t.cols);
    static_assert(16 % kLanes == 0, "info_nce_padded reckons with 16 lanes");
    float *const most = scratch, *const sums = scratch + padded;
    if constexpr (kCols) std::fill_n(most, padded, kLeast), std::fill_n(sums, padded, 0.0f);

    for (int64_t r = 0; r < t.rows; ++r) {
        Floats row_most = all(kLeast);
        for (int64_t c = 0; c < t.cols; c += kLanes) {
            const Floats z = logits(t, s + r * t.cols + c, t.cols - c);
            if constexpr (kRows) row_most = larger(z, row_most);
            if constexpr (kCols) store(most + c, larger(z, load(most + c)));
        }
        if constexpr (kRows) {
            const float now = std::max(rows.max[r], largest(row_most));
            rows.sum[r] *= exp(rows.max[r] - now);
            rows.max[r] = now;
        }
    }
    if constexpr (kCols)
        for (int64_t c = 0; c < t.cols; c += kLanes) {
            const int64_t count = t.cols - c;
            const Floats old = load(cols.max + c, count, kLeast), now = larger(old, load(most + c));
            store(cols.sum + c, load(cols.sum + c, count, 0.0f) * exp(old - now), count);
            store(cols.max + c, now, count);
            store(most + c, now);
        }

    for (int64_t r = 0; r < t.rows; ++r) {
        const Floats row_max = all(kRows ? rows.max[r] : 0.0f);
        Floats row_sum = {};
        for (int64_t c = 0; c < t.cols; c += kLanes) {
            const Floats z = logits(t, s + r * t.cols + c, t.cols - c);
            if constexpr (kRows) row_sum += exp(z - row_max);
            if constexpr (kCols) store(sums + c, load(sums + c) + exp(z - load(most + c)));
        }
        if constexpr (kRows) rows.sum[r] += sum(row_sum);
    }
    if constexpr (kCols)
        for (int64_t c = 0; c < t.cols; ++c) cols.sum[c] += sums[c];

    for (int64_t r = 0; r < t.rows && kind == Positives::diagonal; ++r) {
        const int64_t c = r + t.diagonal;
        if (c < 0 || c >= t.cols) continue;
        const float z = value(s + r * t.cols + c) * t.scale + t.bias;
        if constexpr (kRows) rows.positive[r] += z, rows.weight[r] += 1.0f;
        if constexpr (kCols) cols.positive[c] += z, cols.weight[c] += 1.0f;
    }
    for (int64_t r = 0; r < t.rows && kind == Positives::weights; ++r) {
        Floats positive = {}, weight = {};
        for (int64_t c = 0; c < t.cols; c += kLanes) {
            const int64_t count = t.cols - c;
            const Floats w = load(t.weights + r * t.cols + c, count, 0.0f);
            const Floats z = logits(t, s + r * t.cols + c, count), wz = choose(w != 0.0f, w * z, Floats{});
            positive += wz, weight += w;
            if constexpr (kCols) {
                store(cols.positive + c, load(cols.positive + c, count, 0.0f) + wz, count);
                store(cols.weight + c, load(cols.weight + c, count, 0.0f) + w, count);
            }
        }
        if constexpr (kRows) rows.positive[r] += sum(positive), rows.weight[r] += sum(weight);
    }
}

template <class T, Positives kind, bool kRows, bool kCols>
void gradient_tile(const SimilarityTile& t, const SoftmaxGradient& rows, const SoftmaxGradient& cols, void* to) {
    const T* const s = static_cast<const T*>(t.s);
    T* const out = static_cast<T*>(to);
    for (int64_t r = 0; r < t.rows; ++r) {
        const auto of_row = [&](const float* x) { return all(kRows ? x[r] : 0.0f); };
        const Floats max = of_row(rows.max), logsum = of_row(rows.logsum), grad = of_row(rows.grad),
                     pull = of_row(rows.pull);
        for (int64_t c = 0; c < t.cols; c += kLanes) {
            const int64_t count = t.cols - c;
            const auto of_col = [&](const float* x) { return load(x + c, count, 0.0f); };
            const Floats z = logits(t, s + r * t.cols + c, count);
            Floats g = {}, pulled = pull;
            if constexpr (kRows) g += grad * exp(z - max - logsum);
            if constexpr (kCols) g += of_col(cols.grad) * exp(z - of_col(cols.max) - of_col(cols.logsum));
            if constexpr (kind != Positives::none) {
                if constexpr (kCols) pulled += of_col(cols.pull);
                g -= weights_of<kind>(t.weights + (kind == Positives::weights ? r * t.cols : 0), c, count,
                                      r + t.diagonal) *
                     pulled;
            }
            store(out + r * t.cols + c, g, count);
        }
    }
}

template <class T, Positives kind, bool kGradient>
void sigmoid_tile(const SimilarityTile& t, float positive, float negative, double* sums, void* to) {
    const T* const s = static_cast<const T*>(t.s);
    T* const out = static_cast<T*>(to);
    constexpr int64_t kTogether = 8 * kLanes;  // added in float32 before they go on in double
    for (int64_t r = 0; r < t.rows; ++r) {
        Floats positives = {}, negatives = {}, gradients = {};
        for (int64_t c = 0; c < t.cols; c += kLanes) {
            if (c && c % kTogether == 0) {
                sums[0] += sum(positives), sums[1] += sum(negatives), sums[2] += sum(gradients);
                positives = negatives = gradients = Floats{};
            }
            const int64_t count = t.cols - c;
            const float* const row = t.weights + (kind == Positives::weights ? r * t.cols : 0);
            const Ints matched = weights_of<kind>(row, c, count, r + t.diagonal) != 0.0f;
            const Floats z = logits(t, s + r * t.cols + c, count), x = choose(matched, -z, z);
            const Floats e = exp(choose(x > 0.0f, -x, x)), loss = larger(x, Floats{}) + log1p(e);
            positives += choose(matched, loss, Floats{});
            negatives += choose(matched, Floats{}, loss);
            if constexpr (kGradient) {
                const Floats g =
                    choose(matched, all(-positive), all(negative)) * choose(x > 0.0f, all(1.0f), e) / (e + 1.0f);
                gradients += g;
                store(out + r * t.cols + c, g, count);
            }
        }
        sums[0] += sum(positives), sums[1] += sum(negatives), sums[2] += sum(gradients);
    }
}

template <class Body>
inline void with_type(bool bf16, const Body& body) {
    if (bf16) body(uint16_t());
    else body(float());
}

void forward(const SimilarityTile& t, const SoftmaxState& rows, const SoftmaxState& cols, float* scratch) {
    with_type(t.bf16, [&](auto type) {
        with_positives(t, [&](auto kind) {
            with_directions(rows.max, cols.max, [&](auto has_rows, auto has_cols) {
                forward_tile<decltype(type), kind(), has_rows(), has_cols()>(t, rows, cols, scratch);
            });
        });
    });
}

void gradient(const SimilarityTile& t, const SoftmaxGradient& rows, const SoftmaxGradient& cols, void* out) {
    with_type(t.bf16, [&](auto type) {
        with_positives(t, [&](auto kind) {
            with_directions(rows.max, cols.max, [&](auto has_rows, auto has_cols) {
                gradient_tile<decltype(type), kind(), has_rows(), has_cols()>(t, rows, cols, out);
            });
        });
    });
}

void sigmoid(const SimilarityTile& t, float positive, float negative, double* sums, void* out) {
    with_type(t.bf16, [&](auto type) {
        with_positives(t, [&](auto kind) {
            if (out) sigmoid_tile<decltype(type), kind(), true>(t, positive, negative, sums, out);
            else sigmoid_tile<decltype(type), kind(), false>(t, positive, negative, sums, nullptr);
        });
    });
}

}  // namespace
}  // namespace cmr

#define CMR_INFONCE_KERNEL(name) const InfonceKernel name = {forward, gradient, sigmoid};
