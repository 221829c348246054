// Pairwise likelihoods against the formulas in double, without Python: for sanitizers and for processors that are only
// emulated. Prints the instruction sets that it tested; exit code 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "isa.h"
#include "pairwise.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 24;
}

void require(bool ok, const char* what, const std::string& isa, int64_t rows, int64_t columns, int kind) {
    if (ok) return;
    std::printf("%s differs: %s, %lld x %lld, kind %d\n", what, isa.c_str(), (long long)rows, (long long)columns, kind);
    std::exit(1);
}

void check(const std::string& isa, int64_t rows, int64_t columns, cmr::Similarity kind, int64_t words, bool squared,
           bool gradient, int threads) {
    const bool classes = kind == cmr::Similarity::classes;
    const int64_t stride = columns + 5;
    std::vector<float> theta(rows * columns), floats(rows * stride);
    std::vector<uint8_t> bytes(rows * stride);
    std::vector<int32_t> row_labels(rows * words), labels(words * stride);
    for (float& t : theta) t = next() % 50 ? static_cast<float>(next() % 4001) / 200 - 10 : (next() % 2 ? 1e4f : -1e4f);
    for (auto* side : {&row_labels, &labels})
        for (int32_t& label : *side)
            label = static_cast<int32_t>(classes ? next() % 3 : next() % 3 ? 0 : uint32_t{1} << next() % 32);
    for (float& s : floats) s = static_cast<float>(next() % 3) / 2;
    for (uint8_t& s : bytes) s = static_cast<uint8_t>(next() % 2);
    const std::vector<float> before = theta;
    const float positive = 0.999f;
    std::vector<double> sums(rows);
    double total = 0, expected = 0, size = 0;
    const void* s = kind == cmr::Similarity::bytes ? static_cast<const void*>(bytes.data()) : floats.data();
    cmr::pairwise(isa,
                  {theta.data(), rows, columns, kind, row_labels.data(), labels.data(), classes ? 1 : words, stride, s,
                   stride, positive, squared, gradient, sums.data(), &total},
                  threads);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            double similar = 0;
            if (classes) similar = row_labels[i] == labels[j];
            if (kind == cmr::Similarity::labels)
                for (int64_t w = 0; w < words; ++w)
                    if (row_labels[i * words + w] & labels[w * stride + j]) similar = 1;
            if (kind == cmr::Similarity::bytes) similar = bytes[i * stride + j];
            if (kind == cmr::Similarity::floats) similar = floats[i * stride + j];
            similar *= positive;
            const double t = before[i * columns + j], soft = std::fmax(t, 0) + std::log1p(std::exp(-std::fabs(t)));
            const double sigmoid = t > 0 ? 1 / (1 + std::exp(-t)) : std::exp(t) / (1 + std::exp(t));
            const double rest = similar * t - soft, value = squared ? 0.5 * rest * rest : -rest;
            const double slope = squared ? rest * (similar - sigmoid) : sigmoid - similar;
            expected += value, size += (squared ? std::fabs(rest) : 1) * std::fmax(1, std::fabs(t));
            const double made = gradient ? slope : t;
            require(std::fabs(theta[i * columns + j] - made) <= 2e-6 * std::fmax(1, std::fabs(made)),
                    gradient ? "a gradient" : "Theta", isa, rows, columns, static_cast<int>(kind));
        }
    require(std::fabs(total - expected) <= 1e-6 * size, "the sum", isa, rows, columns, static_cast<int>(kind));
}

}  // namespace

int main() {
    for (const std::string& isa : cmr::available_isas()) {
        for (const int64_t rows : {0, 1, 5})
            for (const int64_t columns : {0, 1, 7, 16, 17, 33, 1000})
                for (int kind = 0; kind < 4; ++kind)
                    for (const int64_t words : {1, 3})
                        for (int form = 0; form < 4; ++form)
                            check(isa, rows, columns, static_cast<cmr::Similarity>(kind), words, form & 1, form & 2,
                                  form == 1 ? 128 : 1);
        check(isa, 3, 40003, cmr::Similarity::labels, 128, false, true, 4096);  // 4,096 labels, one row above a task
        std::printf("%s ok\n", isa.c_str());
    }
}
