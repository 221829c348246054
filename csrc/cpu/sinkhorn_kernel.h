// Sinkhorn's iterations and IPOT for one small problem, written once and compiled once per instruction set
// (sinkhorn_<isa>.cpp).
//
// Maths      The plan is T_ij = exp(a_i + b_j - p C_ij), p = 1 / reg. An iteration makes the row sums right, then the
//            column sums: a_i = log mu_i - log sum_j exp(b_j - p C_ij), b_j = log nu_j - log sum_i exp(a_i - p C_ij).
//            IPOT (Xie et al. 2018, Algorithm 1) multiplies T by exp(-C / beta) and makes one such iteration from the
//            scaling of the columns that it made last: in logarithms the same two lines with p = t / beta in outer
//            iteration t, and 2 b - b_before in place of b in the first of them.
// Scaling    Exponentials are taken once: T = u K v with K = exp(a + b - p C) kept in cache, and an iteration is
//            u = mu / K v, v = nu / K^T u, in one pass over K, four rows at a time: their products with v, the four u,
//            and their part of K^T u while the rows are at hand. The first K is exp(p (min_j C_ij - C_ij)).
// Stability  Where u or v leaves [1e-12, 1e12], K is made anew from a + log u and b + log v, with u = v = 1; a step
//            that takes them out of [1e-14, 1e14] is thrown away and made in logarithms. So what K loses to underflow
//            (below 1e-38) is below 1e-14 of a plan, whatever reg is. Exponents are differences in double, so C / reg
//            may be in the thousands.
//            IPOT's K loses a factor exp(-C / beta) a step; it is made anew before that adds up to e^55, and a step
//            that scales by more than 1e8, or all of them where C / beta varies by more than 16, are made in
//            logarithms.
// Zero mass  a row without mass has a = -inf and u = 0 and takes no part, a column neither, from the start; so do the
//            rows that fill up a group of four.
// Layout     K (rows, stride): rows a multiple of 4, stride of 16, zeros where nothing is. A 64 x 64 problem takes
//            16 KiB, so it lives in the first-level cache.
// Bound      two fused multiply-adds an element and iteration, and for IPOT three products more; the loads of K, two
//            of each, are what limits. 16 elements take about 5 cycles on Zen 4, all in.
// Tried      the first step in logarithms: three passes of exponentials, as long as 50 iterations of 32 x 32.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "sinkhorn.h"
#include "vecmath.h"

namespace cmr {
namespace {

constexpr float kFar = 1e12f, kTooFar = 1e14f, kFarStep = 1e8f;  // how far scalings may go
constexpr double kLogMost = 16, kLost = 55;                      // of IPOT, see above
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Transport : SinkhornScratch {
    const SinkhornShape& s;
    const float *cost, *mass, *share;  // mu and nu as they were given
    const int64_t m, n, rows, slots, stride;
    double power = 0;        // p
    bool everywhere = true;  // all columns have mass

    Transport(const SinkhornShape& shape, const SinkhornData& data, int64_t problem, uint8_t* memory)
        : s(shape),
          cost(data.cost + problem * s.m * s.n),
          mass(data.mu + problem * data.mu_stride),
          share(data.nu + problem * data.nu_stride),
          m(s.m),
          n(s.n),
          rows(s.rows()),
          slots(s.slots()),
          stride(s.stride()) {
        lay_out(s, reinterpret_cast<uintptr_t>(memory));
        std::fill(std::copy(mass, mass + m, mu), mu + slots, 0.0f);
        std::fill(std::copy(share, share + n, nu), nu + stride, 0.0f);
        for (double* p : {a, a_next}) std::fill(p, p + slots, 0.0);
        for (double* p : {b, b_next, before, from}) std::fill(p, p + stride, 0.0);
        for (int64_t j = 0; j < n; ++j)
            if (nu[j] == 0) b[j] = -kInfinity, everywhere = false;
        for (float* p : {u, u_next, sums}) std::fill(p, p + slots, 0.0f);
        std::fill(kernel + m * stride, kernel + rows * stride, 0.0f);
    }

    // x_j = exp(high_j - p C_ij - low); returns their sum
    float row_exponentials(int64_t i, const double* high, double low, float* to) {
        const float* const c = cost + i * n;
        const double p = power;
        for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>((high[j] - p * c[j]) - low);
        for (int64_t j = n; j < stride; ++j) to[j] = -std::numeric_limits<float>::infinity();
        Vec sum = Vec::of(0);
        for (int64_t j = 0; j < stride; j += Vec::lanes) {
            const Vec e = exp(Vec::load(to + j));
            e.store(to + j);
            sum = sum + e;
        }
        return sum.sum();
    }

    // New a and b from `from`, the b of the first line; returns how far the plan exp(a_i + b_j - p C), a being
    // `current`, was from mu, or how far a moved times reg.
    double logarithmic(const double* current) {
        double moved = 0;
        for (int64_t i = 0; i < m; ++i) {
            const float* const c = cost + i * n;
            double shift = -kInfinity;
            for (int64_t j = 0; j < n; ++j) shift = std::max(shift, from[j] - power * c[j]);
            if (mu[i] == 0 || shift == -kInfinity) {
                a_next[i] = -kInfinity;
                continue;
            }
            const double lse = shift + std::log(static_cast<double>(row_exponentials(i, from, shift, x)));
            a_next[i] = std::log(static_cast<double>(mu[i])) - lse;
            moved += s.stop == Stop::potentials ? std::fabs(a_next[i] - current[i]) / s.inverse
                                                : std::fabs(std::exp(current[i] + lse) - mu[i]);
        }
        std::fill(most, most + stride, -std::numeric_limits<float>::infinity());
        for (int64_t i = 0; i < m; ++i) {
            const float* const c = cost + i * n;
            const double mine = a_next[i], p = power;
            for (int64_t j = 0; j < n; ++j) {
                const float y = static_cast<float>(mine - p * c[j]);
                most[j] = most[j] < y ? y : most[j];
            }
        }
        std::fill(columns, columns + stride, 0.0f);
        for (int64_t i = 0; i < m; ++i) {
            if (mu[i] == 0) continue;
            const float* const c = cost + i * n;
            const double mine = a_next[i], p = power;
            for (int64_t j = 0; j < n; ++j) x[j] = static_cast<float>((mine - p * c[j]) - static_cast<double>(most[j]));
            for (int64_t j = n; j < stride; ++j) x[j] = 0;
            for (int64_t j = 0; j < stride; j += Vec::lanes)
                (Vec::load(columns + j) + exp(Vec::load(x + j))).store(columns + j);
        }
        for (int64_t j = 0; j < n; ++j) {
            const bool nothing = nu[j] == 0 || columns[j] == 0;
            b_next[j] = nothing ? -kInfinity
                                : std::log(static_cast<double>(nu[j])) -
                                      (static_cast<double>(most[j]) + std::log(static_cast<double>(columns[j])));
        }
        std::swap(a, a_next);
        std::swap(b, b_next);
        return moved;
    }

    // K = exp(a_i + high_j - p C_ij)
    void make_kernel(const double* high) {
        for (int64_t i = 0; i < m; ++i) {
            if (mu[i] == 0) std::fill(kernel + i * stride, kernel + (i + 1) * stride, 0.0f);
            else row_exponentials(i, high, -a[i], kernel + i * stride);
        }
        std::fill(u, u + slots, 1.0f);
        std::fill(v, v + stride, 1.0f);
    }

    // u_next, v_next and the row sums under v; returns how far from 1 the farthest is, as a factor. With `advance`, K
    // first becomes exp(-C / beta) u K v.
    template <bool advance>
    float scaled() {
        std::fill(columns, columns + stride, 0.0f);
        for (int64_t i = 0; i < rows; i += 4) {
            float* const k[4] = {kernel + i * stride, kernel + (i + 1) * stride, kernel + (i + 2) * stride,
                                 kernel + (i + 3) * stride};
            Vec dot[4] = {Vec::of(0), Vec::of(0), Vec::of(0), Vec::of(0)};
            if (advance) {
                const float* const g = step + i * stride;
                const Vec old[4] = {Vec::of(u[i]), Vec::of(u[i + 1]), Vec::of(u[i + 2]), Vec::of(u[i + 3])};
                for (int64_t j = 0; j < stride; j += Vec::lanes) {
                    const Vec w = Vec::load(v + j);
                    for (int r = 0; r < 4; ++r) {
                        const Vec q = (Vec::load(k[r] + j) * old[r]) * (Vec::load(g + r * stride + j) * w);
                        q.store(k[r] + j);
                        dot[r] = Vec::fma(q, w, dot[r]);
                    }
                }
            } else {
                for (int64_t j = 0; j < stride; j += Vec::lanes) {
                    const Vec w = Vec::load(v + j);
                    for (int r = 0; r < 4; ++r) dot[r] = Vec::fma(Vec::load(k[r] + j), w, dot[r]);
                }
            }
            Vec::ratios4(dot, mu + i, sums + i, u_next + i);
            const Vec w[4] = {Vec::of(u_next[i]), Vec::of(u_next[i + 1]), Vec::of(u_next[i + 2]),
                              Vec::of(u_next[i + 3])};
            for (int64_t j = 0; j < stride; j += Vec::lanes) {
                const Vec even = Vec::fma(Vec::load(k[0] + j), w[0], Vec::load(k[1] + j) * w[1]);
                const Vec odd = Vec::fma(Vec::load(k[2] + j), w[2], Vec::load(k[3] + j) * w[3]);
                (Vec::load(columns + j) + (even + odd)).store(columns + j);
            }
        }
        Vec least = Vec::of(1), greatest = Vec::of(1);
        const auto meet = [&](Vec mass, Vec x) {
            const Vec y = Vec::select(Vec::of(0) < mass, x, Vec::of(1));
            least = Vec::min(least, y);
            greatest = Vec::max(greatest, y);
        };
        for (int64_t j = 0; j < stride; j += Vec::lanes) {
            const Vec mass = Vec::load(nu + j), x = mass / Vec::load(columns + j);
            Vec::select(Vec::of(0) < mass, x, Vec::of(0)).store(v_next + j);
            meet(mass, x);
        }
        for (int64_t i = 0; i < slots; i += Vec::lanes) meet(Vec::load(mu + i), Vec::load(u_next + i));
        return std::max(greatest.largest(), (Vec::of(1) / least).largest());
    }

    void accept() {
        std::swap(u, u_next);
        std::swap(v, v_next);
    }

    double moved() const {  // by the step that scaled() made, before accept()
        Vec sum = Vec::of(0);
        for (int64_t i = 0; i < slots; i += Vec::lanes) {
            const Vec mass = Vec::load(mu + i), now = Vec::load(u + i);
            const Vec by =
                s.stop == Stop::marginals ? now * Vec::load(sums + i) - mass : log(Vec::load(u_next + i) / now);
            sum = sum + Vec::select(Vec::of(0) < mass, by.abs(), Vec::of(0));
        }
        return s.stop == Stop::marginals ? sum.sum() : sum.sum() / s.inverse;
    }

    static void add_logs(double* to, const float* scaling, int64_t count) {
        for (int64_t at = 0; at < count; at += Vec::lanes) {
            const int64_t some = std::min(Vec::lanes, count - at);
            float logs[Vec::lanes];
            log(Vec::load(scaling + at, some)).store(logs, some);
            for (int64_t k = 0; k < some; ++k) to[at + k] += logs[k];
        }
    }

    void absorb() {
        add_logs(a, u, m);
        add_logs(b, v, n);
    }

    static void extremes(const float* c, int64_t count, float& lowest, float& highest) {
        Vec low = Vec::of(c[0]), high = low;
        int64_t j = 0;
        for (; j + Vec::lanes <= count; j += Vec::lanes) {
            low = Vec::min(low, Vec::load(c + j));
            high = Vec::max(high, Vec::load(c + j));
        }
        lowest = -(Vec::of(0) - low).largest();
        highest = high.largest();
        for (; j < count; ++j) lowest = std::min(lowest, c[j]), highest = std::max(highest, c[j]);
    }

    void exponentials(const float* c, float lowest, float* to) const {  // exp(p (lowest - C)) of a row, 1 at most
        const Vec p = Vec::of(static_cast<float>(-power)), low = Vec::of(lowest);
        for (int64_t j = 0; j < n; j += Vec::lanes) {
            const int64_t some = std::min(Vec::lanes, n - j);
            exp(Vec::min(Vec::of(0), (Vec::load(c + j, some) - low) * p)).store(to + j, some);
        }
        std::fill(to + n, to + stride, 0.0f);
    }

    void first_scalings() {
        std::fill(u, u + slots, 1.0f);
        for (int64_t j = 0; j < stride; ++j) v[j] = nu[j] > 0 ? 1.0f : 0.0f;
    }

    // K of no potentials but a_i = p min_j C_ij
    void first_kernel() {
        for (int64_t i = 0; i < m; ++i) {
            const float* const c = cost + i * n;
            float lowest, highest;
            extremes(c, n, lowest, highest);
            if (!everywhere) {
                lowest = highest;
                for (int64_t j = 0; j < n; ++j)
                    if (nu[j] > 0) lowest = std::min(lowest, c[j]);
            }
            a[i] = power * lowest;
            exponentials(c, lowest, kernel + i * stride);
        }
        first_scalings();
    }

    // What the first step found or moved: a and b were 0 before it, not what K is made of.
    double first_moved() const {
        double sum = 0;
        for (int64_t i = 0; i < m; ++i) {
            if (mu[i] == 0) continue;
            sum += s.stop == Stop::marginals ? std::fabs(std::exp(-a[i]) * sums[i] - mu[i])
                                             : std::fabs(a[i] + std::log(u_next[i])) / s.inverse;
        }
        return sum;
    }

    int64_t sinkhorn() {
        power = s.inverse;
        first_kernel();
        double change = kInfinity;
        int64_t done = 0;
        while (done < s.max_iter && !(change < s.tol)) {
            const bool first = done++ == 0;
            const float far = scaled<false>();
            if (far < kTooFar) {
                if (s.tol > 0) change = first ? first_moved() : moved();
                accept();
                if (far < kFar) continue;
                absorb();
            } else {
                if (first) std::fill(a, a + m, 0.0);
                else absorb();
                std::copy(b, b + n, from);
                change = logarithmic(a);
            }
            make_kernel(b);
        }
        return done;
    }

    // b_before is b of the plan before: v, the scaling of the columns made last, is exp(b - b_before).
    void proximal_logarithmic(int64_t t) {
        power = static_cast<double>(t) * s.inverse;
        for (int64_t j = 0; j < n; ++j) from[j] = nu[j] == 0 ? -kInfinity : 2 * b[j] - before[j];
        std::copy(b, b + n, before);
        logarithmic(a);
        for (int64_t k = 1; k < s.inner; ++k) {
            std::copy(b, b + n, from);
            logarithmic(a);
        }
    }

    // The plan as u K v, v being the scaling of the columns made last.
    void proximal_kernel() {
        make_kernel(before);
        start_memory();
        for (int64_t j = 0; j < n; ++j) v[j] = nu[j] == 0 ? 0.0f : static_cast<float>(std::exp(b[j] - before[j]));
    }

    void start_memory() {
        std::fill(u_product, u_product + slots, 1.0f);
        std::fill(v_product, v_product + stride, 1.0f);
        std::fill(u_logs, u_logs + slots, 0.0f);
        std::fill(v_logs, v_logs + stride, 0.0f);
    }

    // Keeps what u and v add to a and b: four of them multiplied for one logarithm.
    void remember(int64_t made) {
        const auto keep = [made](const float* scaling, float* product, float* logs, int64_t count) {
            for (int64_t i = 0; i < count; i += Vec::lanes) {
                const Vec x = Vec::load(product + i) * Vec::load(scaling + i);
                if (made % 4) {
                    x.store(product + i);
                } else {
                    (Vec::load(logs + i) + log(x)).store(logs + i);
                    Vec::of(1).store(product + i);
                }
            }
        };
        keep(u, u_product, u_logs, slots);
        keep(v, v_product, v_logs, stride);
        std::copy(v, v + stride, v_made);
    }

    void recall(double steps) {
        add_logs(a, u_product, m);
        add_logs(b, v_product, n);
        for (int64_t i = 0; i < m; ++i) a[i] += static_cast<double>(u_logs[i]) + steps;
        for (int64_t j = 0; j < n; ++j) {
            b[j] += static_cast<double>(v_logs[j]);
            before[j] = nu[j] == 0 ? -kInfinity : b[j] - std::log(static_cast<double>(v_made[j]));
        }
    }

    int64_t ipot() {
        float least, greatest;
        extremes(cost, m * n, least, greatest);
        const double range = (static_cast<double>(greatest) - least) * s.inverse;
        if (range > kLogMost) {
            for (int64_t t = 1; t <= s.max_iter; ++t) proximal_logarithmic(t);
            make_kernel(b);
            return s.max_iter;
        }
        const double least_step = least * s.inverse;  // taken out: a factor on all of T changes no plan
        power = s.inverse;
        for (int64_t i = 0; i < m; ++i) exponentials(cost + i * n, least, step + i * stride);
        std::fill(step + m * stride, step + rows * stride, 0.0f);
        const int64_t often = static_cast<int64_t>(std::min(64.0, kLost / std::max(range, 1e-3)));
        std::fill(kernel, kernel + m * stride, 1.0f);
        first_scalings();
        start_memory();
        for (int64_t t = 1, made = 0; t <= s.max_iter; ++t) {
            if (made == often) {
                recall(static_cast<double>(made) * least_step);
                power = static_cast<double>(t - 1) * s.inverse;
                proximal_kernel();
                made = 0;
            }
            float far = scaled<true>();
            for (int64_t k = 1; far < kFarStep && k < s.inner; ++k) {
                std::swap(v, v_next);  // inner scalings replace each other, K stays
                far = scaled<false>();
            }
            if (far < kFarStep) {
                accept();
                remember(++made);
                continue;
            }
            if (made) recall(static_cast<double>(made) * least_step);
            proximal_logarithmic(t);
            proximal_kernel();
            made = 0;
        }
        return s.max_iter;
    }

    float write(float* plan) const {
        float error = 0;
        for (int64_t i = 0; i < m; ++i) {
            const Vec mine = Vec::of(u[i]);
            Vec sum = Vec::of(0);
            for (int64_t j = 0; j < n; j += Vec::lanes) {
                const int64_t some = std::min(Vec::lanes, n - j);
                const Vec t = (Vec::load(kernel + i * stride + j) * mine) * Vec::load(v + j);
                sum = sum + t;
                t.store(plan + i * n + j, some);
            }
            error += std::fabs(sum.sum() - mu[i]);
        }
        return error;
    }
};

void sinkhorn_solve(const SinkhornShape& s, const SinkhornData& data, int64_t problem, uint8_t* scratch) {
    Transport transport(s, data, problem, scratch);
    data.iterations[problem] = static_cast<int32_t>(s.proximal ? transport.ipot() : transport.sinkhorn());
    data.errors[problem] = transport.write(data.plan + problem * s.m * s.n);
}

}  // namespace
}  // namespace cmr
