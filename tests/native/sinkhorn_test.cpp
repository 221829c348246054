// Entropic transport: what a plan must hold, and Sinkhorn's and IPOT's iterations in double, without Python: for
// sanitizers and for processors that are only emulated. Prints the instruction sets that it tested; exit code 1 at the
// first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "isa.h"
#include "sinkhorn.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 24;
}

void require(bool ok, const char* what, const std::string& isa, const cmr::SinkhornShape& s) {
    if (ok) return;
    std::printf("%s differs: %s, %lld problems of %lld x %lld, 1 / reg = %g%s\n", what, isa.c_str(),
                (long long)s.problems, (long long)s.m, (long long)s.n, s.inverse, s.proximal ? ", proximal" : "");
    std::exit(1);
}

// log sum exp of x; -infinity where all are
double lse(const std::vector<double>& x) {
    double most = -INFINITY, sum = 0;
    for (double v : x) most = std::max(most, v);
    if (most == -INFINITY) return most;
    for (double v : x) sum += std::exp(v - most);
    return most + std::log(sum);
}

// In logarithms, from b = 0: a makes the row sums right, then b the column sums. IPOT's power grows and it extrapolates.
std::vector<double> oracle(const cmr::SinkhornShape& s, const float* cost, const float* mu, const float* nu) {
    std::vector<double> a(s.m), b(s.n), before(s.n), from(s.n), column(s.m), row(s.n);
    for (int64_t j = 0; j < s.n; ++j) b[j] = before[j] = from[j] = nu[j] > 0 ? 0.0 : -INFINITY;
    double power = s.proximal ? 0 : s.inverse;
    const auto once = [&](const std::vector<double>& start) {
        for (int64_t i = 0; i < s.m; ++i) {
            for (int64_t j = 0; j < s.n; ++j) row[j] = start[j] - power * cost[i * s.n + j];
            a[i] = mu[i] > 0 ? std::log(mu[i]) - lse(row) : -INFINITY;
        }
        for (int64_t j = 0; j < s.n; ++j) {
            for (int64_t i = 0; i < s.m; ++i) column[i] = a[i] - power * cost[i * s.n + j];
            b[j] = nu[j] > 0 ? std::log(nu[j]) - lse(column) : -INFINITY;
        }
    };
    for (int64_t step = 0; step < s.max_iter; ++step) {
        if (!s.proximal) {
            from = b;
            once(from);
            continue;
        }
        power += s.inverse;
        for (int64_t j = 0; j < s.n; ++j) from[j] = nu[j] > 0 ? 2 * b[j] - before[j] : -INFINITY;
        before = b;
        once(from);
    }
    std::vector<double> plan(s.m * s.n);
    for (int64_t i = 0; i < s.m; ++i)
        for (int64_t j = 0; j < s.n; ++j) {
            const double power_now = s.proximal ? power : s.inverse, at = a[i] + b[j] - power_now * cost[i * s.n + j];
            plan[i * s.n + j] = std::isnan(at) ? 0 : std::exp(at);
        }
    return plan;
}

void check(const std::string& isa, const cmr::SinkhornShape& s, bool zeros, bool exact) {
    std::vector<float> cost(s.problems * s.m * s.n), mu(s.problems * s.m), nu(s.problems * s.n), plan(cost.size(), -7);
    for (float& c : cost) c = static_cast<float>(next() % 1001) / 1000;
    for (int64_t p = 0; p < s.problems; ++p)
        for (const auto& [mass, size] : {std::pair{&mu[p * s.m], s.m}, {&nu[p * s.n], s.n}}) {
            float sum = 0;
            for (int64_t i = 0; i < size; ++i) {
                mass[i] = zeros && i % 3 == 1 ? 0.0f : static_cast<float>(next() % 9 + 1);
                sum += mass[i];
            }
            for (int64_t i = 0; i < size; ++i) mass[i] /= sum;
        }
    std::vector<int32_t> iterations(s.problems, -1);
    std::vector<float> errors(s.problems, -1);
    std::vector<uint8_t> workspace(cmr::sinkhorn_workspace(s), 0xee);
    cmr::sinkhorn(isa, s, {cost.data(), mu.data(), nu.data(), s.m, s.n, plan.data(), iterations.data(), errors.data()},
                  workspace.data());
    for (int64_t p = 0; p < s.problems; ++p) {
        const float* const t = &plan[p * s.m * s.n];
        require(iterations[p] >= 1 && iterations[p] <= s.max_iter, "the count", isa, s);
        require(std::isfinite(errors[p]) && errors[p] >= 0, "the error", isa, s);
        for (int64_t j = 0; j < s.n; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < s.m; ++i) sum += t[i * s.n + j];
            require(std::fabs(sum - nu[p * s.n + j]) <= 1e-5, "a column's sum", isa, s);
        }
        for (int64_t i = 0; i < s.m; ++i)
            for (int64_t j = 0; j < s.n; ++j) {
                const float value = t[i * s.n + j];
                require(std::isfinite(value) && value >= 0, "a plan", isa, s);
                if (mu[p * s.m + i] == 0 || nu[p * s.n + j] == 0) require(value == 0, "a plan's zero", isa, s);
            }
        if (!exact) continue;
        const std::vector<double> want = oracle(s, &cost[p * s.m * s.n], &mu[p * s.m], &nu[p * s.n]);
        for (int64_t i = 0; i < s.m * s.n; ++i)
            require(std::fabs(t[i] - want[i]) <= 2e-5 * want[i] + 1e-9, "an iteration's plan", isa, s);
    }
}

}  // namespace

int main() {
    for (const std::string& isa : cmr::available_isas()) {
        for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 1}, {1, 17}, {17, 1}, {4, 16}, {5, 15}, {33, 40}})
            for (const bool proximal : {false, true})
                for (const bool zeros : {false, true})
                    for (const auto stop : {cmr::Stop::marginals, cmr::Stop::potentials})
                        for (const int threads : {1, 128}) {
                            check(isa, {5, m, n, 20, 12, 0, stop, proximal, 1, threads}, zeros, true);
                            check(isa, {3, m, n, 5000, 30, 1e-3, stop, proximal, 1, threads}, zeros, false);
                            if (proximal) check(isa, {2, m, n, 20, 5, 0, stop, true, 4, threads}, zeros, false);
                        }
        check(isa, {1, 1500, 3, 100, 4, 0, cmr::Stop::marginals, false, 1, 2}, false, true);
        check(isa, {1, 3, 1500, 100, 4, 0, cmr::Stop::marginals, true, 1, 2}, true, false);
        check(isa, {0, 4, 4, 100, 4, 0, cmr::Stop::marginals, false, 1, 4096}, false, true);
        std::printf("%s ok\n", isa.c_str());
    }
}
