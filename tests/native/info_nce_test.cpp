// Contrastive tiles against the formulas in double, without Python: for sanitizers and for processors that are only
// emulated. Prints the instruction sets that it tested; exit code 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "info_nce.h"
#include "isa.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 24;
}

void require(bool ok, const char* what, const std::string& isa, const cmr::SimilarityTile& t) {
    if (ok) return;
    std::printf("%s differs: %s, %lld x %lld, scale %g, diagonal %lld, %s%s\n", what, isa.c_str(), (long long)t.rows,
                (long long)t.cols, t.scale, (long long)t.diagonal, t.bf16 ? "bfloat16" : "float32",
                t.weights ? ", weights" : "");
    std::exit(1);
}

bool near(double a, double b, double share) { return std::fabs(a - b) <= share * std::fmax(1, std::fabs(b)); }

float widen(uint16_t x) {
    const uint32_t bits = uint32_t{x} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

struct Side {
    std::vector<float> max, sum, positive, weight, logsum, grad, pull;
    explicit Side(int64_t n) : max(n, -INFINITY), sum(n), positive(n), weight(n), logsum(n), grad(n), pull(n) {}
    cmr::SoftmaxState forward() { return {max.data(), sum.data(), positive.data(), weight.data()}; }
    cmr::SoftmaxGradient backward() { return {max.data(), logsum.data(), grad.data(), pull.data()}; }
};

// kind: 0 no positives in the tile, 1 the diagonal, 2 weights
void check(const std::string& isa, int64_t rows, int64_t cols, float scale, int kind, int64_t diagonal, bool bf16,
           int directions) {
    const int64_t n = rows * cols;
    std::vector<float> s(n), weights(n);
    std::vector<uint16_t> halves(n);
    for (int64_t i = 0; i < n; ++i) {
        s[i] = static_cast<float>(next() % 2001) / 1000 - 1;
        uint32_t bits;
        std::memcpy(&bits, &s[i], 4);
        halves[i] = static_cast<uint16_t>(bits >> 16);
        if (bf16) s[i] = widen(halves[i]);
        weights[i] = next() % 4 ? 0.0f : 1.0f;
    }
    void* const tile = bf16 ? static_cast<void*>(halves.data()) : s.data();
    const std::vector<float> before = s;
    const cmr::SimilarityTile t{
        tile, bf16, rows, cols, scale, 0.25f, kind == 2 ? weights.data() : nullptr, kind == 0 ? cols + rows : diagonal};
    const auto weight = [&](int64_t i, int64_t j) -> double {
        return kind == 2 ? weights[i * cols + j] : kind == 1 && j == i + diagonal;
    };
    const auto logit = [&](int64_t i, int64_t j) { return double{scale} * before[i * cols + j] + 0.25; };
    const cmr::InfonceKernel& kernel = cmr::infonce_kernel(isa);
    Side row(rows), col(cols);
    std::vector<float> scratch(cmr::info_nce_scratch(cols) / 4);
    const bool with_rows = directions & 1, with_cols = directions & 2;
    kernel.forward(t, with_rows ? row.forward() : cmr::SoftmaxState{}, with_cols ? col.forward() : cmr::SoftmaxState{},
                   scratch.data());
    for (int side = 0; side < 2; ++side) {
        if (!(side ? with_cols : with_rows)) continue;
        Side& of = side ? col : row;
        for (int64_t i = 0; i < (side ? cols : rows); ++i) {
            double most = -INFINITY, sum = 0, positive = 0, share = 0;
            for (int64_t j = 0; j < (side ? rows : cols); ++j) {
                const int64_t r = side ? j : i, c = side ? i : j;
                most = std::fmax(most, logit(r, c));
                positive += weight(r, c) * logit(r, c), share += weight(r, c);
            }
            for (int64_t j = 0; j < (side ? rows : cols); ++j)
                sum += std::exp(logit(side ? j : i, side ? i : j) - most);
            if (!(side ? rows : cols)) continue;
            // a sum of n terms in float32
            const double rounding = 2e-6 + 1e-8 * static_cast<double>(side ? rows : cols);
            require(near(of.max[i] + std::log(of.sum[i]), most + std::log(sum), rounding), "a log-sum-exp", isa, t);
            require(near(of.positive[i], positive, 1e-5) && near(of.weight[i], share, 1e-6), "a positive", isa, t);
            of.logsum[i] = std::log(of.sum[i]);
            of.grad[i] = 0.5f, of.pull[i] = share > 0 ? static_cast<float>(0.5 / share) : 0.0f;
        }
    }
    std::vector<uint16_t> made16(n);
    std::vector<float> made(n);
    void* const out = bf16 ? static_cast<void*>(made16.data()) : made.data();
    kernel.gradient(t, with_rows ? row.backward() : cmr::SoftmaxGradient{},
                    with_cols ? col.backward() : cmr::SoftmaxGradient{}, out);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t r = i / cols, c = i % cols;
        double want = 0;
        if (with_rows) want += 0.5 * std::exp(logit(r, c) - row.max[r] - row.logsum[r]) - row.pull[r] * weight(r, c);
        if (with_cols) want += 0.5 * std::exp(logit(r, c) - col.max[c] - col.logsum[c]) - col.pull[c] * weight(r, c);
        require(near(bf16 ? widen(made16[i]) : made[i], want, bf16 ? 5e-3 : 2e-5), "a gradient", isa, t);
    }
    double sums[3] = {}, wanted[3] = {}, size = 0;
    kernel.sigmoid(t, 2.0f, 0.5f, sums, out);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t r = i / cols, c = i % cols;
        const double z = logit(r, c), up = 1 / (1 + std::exp(-z));
        const bool positive = weight(r, c) != 0;
        const double slope = positive ? 2.0 * (up - 1) : 0.5 * up;
        wanted[positive ? 0 : 1] += std::fmax(positive ? -z : z, 0) + std::log1p(std::exp(-std::fabs(z)));
        wanted[2] += slope, size += std::fabs(slope);
        require(near(bf16 ? widen(made16[i]) : made[i], slope, bf16 ? 5e-3 : 2e-6), "a sigmoid's gradient", isa, t);
    }
    for (int i = 0; i < 2; ++i) require(near(sums[i], wanted[i], 2e-6), "a sigmoid's sum", isa, t);
    require(std::fabs(sums[2] - wanted[2]) <= 2e-6 * std::fmax(1, size), "the gradient's sum", isa, t);
    kernel.sigmoid(t, 2.0f, 0.5f, sums, nullptr);
    if (kind != 2) return;
    kernel.gradient(t, row.backward(), col.backward(), tile);  // in place
}

}  // namespace

int main() {
    for (const std::string& isa : cmr::available_isas()) {
        for (const int64_t rows : {1, 2, 16, 33})
            for (const int64_t cols : {1, 3, 15, 16, 17, 100})
                for (const float scale : {1.0f, 20.0f})
                    for (const bool bf16 : {false, true})
                        for (int directions = 1; directions < 4; ++directions) {
                            check(isa, rows, cols, scale, 0, 0, bf16, directions);
                            for (const int64_t diagonal : {int64_t{0}, -rows / 2, cols / 2, cols - 1})
                                check(isa, rows, cols, scale, 1, diagonal, bf16, directions);
                            check(isa, rows, cols, scale, 2, 0, bf16, directions);
                        }
        check(isa, 2, 70001, 5.0f, 1, 69999, false, 3);
        check(isa, 70001, 2, 5.0f, 1, 1, true, 3);
        std::printf("%s ok\n", isa.c_str());
    }
}
