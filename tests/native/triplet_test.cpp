// Triplet losses against loops over every triplet, without Python: for sanitizers and for processors that are only
// emulated. Coordinates are whole numbers, so that nothing is rounded and ties are ties. Prints the instruction sets
// that it tested; exit code 1 at the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isa.h"
#include "triplet.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 24;
}

void require(bool ok, const char* what, const std::string& isa, int64_t rows, int64_t n, int mining) {
    if (ok) return;
    std::printf("%s differs: %s, %lld x %lld, mining %d\n", what, isa.c_str(), (long long)rows, (long long)n, mining);
    std::exit(1);
}

constexpr float kMargin = 2;
constexpr int64_t kWidth = 7;

struct Case {
    int64_t rows, n, words;
    bool classes, self;
    std::vector<float> x, y, products, x_squares, y_squares;
    std::vector<int64_t> x_labels, y_labels;

    Case(int64_t rows_, int64_t n_, int64_t words_, bool classes_, bool self_)
        : rows(rows_),
          n(n_),
          words(words_),
          classes(classes_),
          self(self_),
          x(rows * kWidth),
          y(n * kWidth),
          products(rows * n),
          x_squares(rows),
          y_squares(n),
          x_labels(rows * words),
          y_labels(words * n) {
        for (auto* points : {&x, &y})
            for (float& p : *points) p = static_cast<float>(next() % 4) - 1;
        if (self) std::copy(x.begin(), x.end(), y.begin());
        for (int64_t k = 0; k < kWidth; ++k) {
            for (int64_t i = 0; i < rows; ++i) x_squares[i] += x[i * kWidth + k] * x[i * kWidth + k];
            for (int64_t j = 0; j < n; ++j) y_squares[j] += y[j * kWidth + k] * y[j * kWidth + k];
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < n; ++j) products[i * n + j] += x[i * kWidth + k] * y[j * kWidth + k];
        }
        for (auto* labels : {&x_labels, &y_labels})
            for (int64_t& label : *labels)
                label = static_cast<int64_t>(classes ? next() % 3 : uint64_t{1} << next() % 64 & next() % 7);
    }

    int kind(int64_t i, int64_t j) const {
        if (self && i == j) return 2;
        if (classes) return x_labels[i] == y_labels[j];
        for (int64_t w = 0; w < words; ++w)
            if (x_labels[i * words + w] & y_labels[w * n + j]) return 1;
        return 0;
    }
    float distance(int64_t i, int64_t j) const { return x_squares[i] + y_squares[j] - 2 * products[i * n + j]; }
};

struct Row {
    double loss = 0;
    int64_t triplets = 0, open = 0;
    std::vector<double> weights;

    void add(const Case& c, int64_t i, int64_t p, int64_t negative) {
        const double hinge = c.distance(i, p) + kMargin - c.distance(i, negative);
        ++triplets;
        if (hinge <= 0) return;
        loss += hinge, ++open, ++weights[p], --weights[negative];
    }
};

Row oracle(const Case& c, int64_t i, cmr::Mining mining) {
    Row row;
    row.weights.assign(c.n, 0);
    int64_t nearest = -1, farthest = -1;
    for (int64_t j = 0; j < c.n; ++j) {
        if (c.kind(i, j) == 0 && (nearest < 0 || c.distance(i, j) < c.distance(i, nearest))) nearest = j;
        if (c.kind(i, j) == 1 && (farthest < 0 || c.distance(i, j) > c.distance(i, farthest))) farthest = j;
    }
    if (nearest < 0 || farthest < 0) return row;
    for (int64_t p = 0; p < c.n; ++p) {
        if (c.kind(i, p) != 1 || (mining == cmr::Mining::hard && p != farthest)) continue;
        int64_t farther = -1;
        for (int64_t j = 0; j < c.n; ++j) {
            if (c.kind(i, j) != 0) continue;
            if (mining == cmr::Mining::all) row.add(c, i, p, j);
            if (c.distance(i, j) > c.distance(i, p) && (farther < 0 || c.distance(i, j) < c.distance(i, farther)))
                farther = j;
        }
        if (mining == cmr::Mining::hard || mining == cmr::Mining::hard_negative) row.add(c, i, p, nearest);
        if (mining == cmr::Mining::semihard && farther >= 0) row.add(c, i, p, farther);
    }
    return row;
}

void check_margin(const std::string& isa, const Case& c, cmr::Mining mining, int threads, bool exact) {
    const int64_t rows = c.rows, n = c.n;
    const int which = static_cast<int>(mining);
    std::vector<float> block = c.products, sums(rows);
    if (exact) std::fill(block.begin(), block.end(), NAN);  // what a caller leaves there
    std::vector<double> losses(rows);
    std::vector<int64_t> triplets(rows), open(rows), close(rows);
    std::vector<uint8_t> workspace(cmr::triplet_workspace(rows, n, threads), 0xee);
    cmr::triplet_margin(isa,
                        {rows,
                         n,
                         {c.words, c.classes, c.x_labels.data(), c.y_labels.data()},
                         c.self ? 0 : -1,
                         cmr::Distance::squared,
                         true,
                         exact,
                         block.data(),
                         c.x_squares.data(),
                         c.y_squares.data(),
                         c.x.data(),
                         c.y.data(),
                         kWidth,
                         losses.data(),
                         sums.data(),
                         close.data(),
                         threads},
                        {kMargin, mining, triplets.data(), open.data()}, workspace.data());
    for (int64_t i = 0; i < rows; ++i) {
        const Row want = oracle(c, i, mining);
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) {
            require(block[i * n + j] == 2 * want.weights[j], "a weight", isa, rows, n, which);
            sum += 2 * want.weights[j];
        }
        // the kernel weighs the distances, its caller adds the margins
        require(losses[i] + double{kMargin} * static_cast<double>(open[i]) == want.loss, "a loss", isa, rows, n, which);
        require(triplets[i] == want.triplets && open[i] == want.open, "a count", isa, rows, n, which);
        require(sums[i] == sum, "a row sum", isa, rows, n, which);
    }
}

void check_acmr(const std::string& isa, const Case& c) {
    const int64_t n = c.n;
    std::vector<float> block = c.products, sums(n), near(n), far(n);
    std::vector<double> losses(n);
    std::vector<int64_t> counts(n), rows(n * c.words), close(n);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t w = 0; w < c.words; ++w) rows[j * c.words + w] = c.y_labels[w * n + j];
    const cmr::TripletLabels labels{c.words, c.classes, rows.data(), c.y_labels.data()};
    std::vector<uint8_t> workspace(cmr::triplet_workspace(n, n, 2), 0xee);
    cmr::triplet_acmr_factors(isa, labels, n, 0.5, false, 2, counts.data(), near.data(), far.data());
    cmr::triplet_acmr(isa,
                      {n, n, labels, -1, cmr::Distance::squared, true, false, block.data(), c.x_squares.data(),
                       c.y_squares.data(), c.x.data(), c.y.data(), kWidth, losses.data(), sums.data(), close.data(), 2},
                      {20, near.data(), far.data(), 0}, workspace.data());
    for (int64_t i = 0; i < n; ++i) {
        double loss = 0;
        for (int64_t j = 0; j < n; ++j) {
            bool alike = c.classes && rows[i] == rows[j];
            for (int64_t w = 0; !c.classes && w < c.words; ++w)
                alike |= (rows[i * c.words + w] & rows[j * c.words + w]) != 0;
            const double d = c.distance(i, j);
            loss += alike ? (2 * n - counts[i] - counts[j]) * d : 0.5 * (counts[i] + counts[j]) * std::max(0.0, 20 - d);
        }
        require(losses[i] == loss, "an ACMR loss", isa, n, n, -1);
    }
}

void check_symmetrise(const std::string& isa, int64_t n) {
    std::vector<float> e(n * n), sums(n);
    for (float& v : e) v = static_cast<float>(next() % 100);
    const std::vector<float> before = e;
    cmr::triplet_symmetrise(isa, n, 2, e.data(), sums.data());
    for (int64_t i = 0; i < n; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < n; ++j) {
            require(e[i * n + j] == before[i * n + j] + before[j * n + i], "a symmetric cell", isa, n, n, -1);
            sum += e[i * n + j];
        }
        require(sums[i] == sum, "a symmetric sum", isa, n, n, -1);
    }
}

}  // namespace

void check_origin(int64_t n, int64_t m) {
    // coordinate 0 lies far from 0 beside its spread, coordinate 1 around it
    std::vector<float> x(n * 2), y(m * 2), origin(2);
    for (auto* points : {&x, &y})
        for (size_t i = 0; i < points->size(); ++i)
            (*points)[i] = i % 2 ? static_cast<float>(next() % 9) - 4 : 100 + static_cast<float>(next() % 3);
    const bool moved = cmr::triplet_origin(x.data(), n, m ? y.data() : nullptr, m, 2, origin.data());
    require(moved && origin[0] >= 100 && origin[0] <= 102, "origin", "any", n, m, 0);
    std::fill(x.begin(), x.end(), 0.0f);
    require(!cmr::triplet_origin(x.data(), n, nullptr, 0, 2, origin.data()), "no origin", "any", n, m, 0);
}

int main() {
    for (const int64_t n : {1, 17, 18, 33, 34, 35, 1000})
        for (const int64_t m : {0, 1, 17, 19, 500}) check_origin(n, m);
    for (const std::string& isa : cmr::available_isas()) {
        for (const auto& [rows, n] :
             {std::pair<int64_t, int64_t>{1, 1}, {3, 2}, {17, 15}, {16, 16}, {5, 33}, {9, 130}, {2, 2500}})
            for (const auto& [words, classes] : {std::pair<int64_t, bool>{1, true}, {1, false}, {3, false}}) {
                for (const bool self : {false, true}) {
                    const Case c(self ? std::min(rows, n) : rows, n, words, classes, self);
                    for (int mining = 0; mining < 4; ++mining)
                        check_margin(isa, c, static_cast<cmr::Mining>(mining), mining % 2 + 1, mining >= 2);
                }
                if (n <= 130) check_acmr(isa, Case(n, n, words, classes, false));
            }
        for (const int64_t n : {1, 31, 32, 33, 100}) check_symmetrise(isa, n);
        // many candidates, the most labels, more threads than rows
        check_margin(isa, Case(2, 70001, 64, false, false), cmr::Mining::hard, 4096, false);
        for (const auto mining : {cmr::Mining::hard_negative, cmr::Mining::semihard})
            check_margin(isa, Case(2, 4097, 64, false, false), mining, 4096, true);
        std::printf("%s ok\n", isa.c_str());
    }
    return 0;
}
