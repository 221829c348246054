// The Hamming kernels against a naive loop, without Python: for sanitizers and for processors that are only emulated.
// Prints the instruction sets that it tested; exit code 1 at the first difference.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "hamming.h"
#include "isa.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

std::vector<uint8_t> codes(int64_t n, int64_t nbytes, int kind) {
    std::vector<uint8_t> x(n * nbytes);
    for (uint8_t& byte : x) byte = static_cast<uint8_t>(kind == 0 ? next() >> 24 : kind == 1 ? (next() >> 24) & 1 : 7);
    return x;
}

int distance(const uint8_t* a, const uint8_t* b, int64_t nbytes) {
    int d = 0;
    for (int64_t i = 0; i < nbytes; i += 8) {
        uint64_t x = 0, y = 0;
        std::memcpy(&x, a + i, static_cast<size_t>(std::min<int64_t>(8, nbytes - i)));
        std::memcpy(&y, b + i, static_cast<size_t>(std::min<int64_t>(8, nbytes - i)));
        for (x ^= y; x; x &= x - 1) ++d;
    }
    return d;
}

void require(bool ok, const char* what, const std::string& isa, int64_t nbytes, int64_t n, int64_t k) {
    if (ok) return;
    std::printf("%s differs: %s, %lld bytes, n = %lld, k = %lld\n", what, isa.c_str(), (long long)nbytes, (long long)n,
                (long long)k);
    std::exit(1);
}

void check(const std::string& isa, int64_t nq, int64_t n, int64_t nbytes, int64_t k, int kind, int threads) {
    const std::vector<uint8_t> q = codes(nq, nbytes, kind == 2 ? 1 : kind), db = codes(n, nbytes, kind);
    std::vector<std::vector<int>> table(nq, std::vector<int>(n));
    for (int64_t i = 0; i < nq; ++i)
        for (int64_t j = 0; j < n; ++j) table[i][j] = distance(&q[i * nbytes], &db[j * nbytes], nbytes);

    cmr::HammingShape shape{nq, n, nbytes, k, threads};
    std::vector<uint8_t> workspace(cmr::hamming_topk_workspace(shape));
    std::vector<int32_t> distances(nq * k, -7);
    std::vector<int64_t> indices(nq * k, -7);
    cmr::hamming_topk(isa, q.data(), db.data(), shape, distances.data(), indices.data(), workspace.data());
    for (int64_t i = 0; i < nq; ++i) {
        std::vector<int64_t> order(n);
        for (int64_t j = 0; j < n; ++j) order[j] = j;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return table[i][a] < table[i][b]; });
        for (int64_t r = 0; r < std::min(k, n); ++r)
            require(indices[i * k + r] == order[r] && distances[i * k + r] == table[i][order[r]], "top-k", isa, nbytes,
                    n, k);
    }

    const int radius = static_cast<int>(nbytes * 4 - 1);
    shape.k_or_radius = radius;
    const int64_t splits = cmr::hamming_range_splits(shape);
    std::vector<int64_t> offsets(nq * splits + 1);
    workspace.assign(cmr::hamming_range_workspace(shape), 0);
    cmr::hamming_range_count(isa, q.data(), db.data(), shape, offsets.data(), workspace.data());
    for (size_t i = 1; i < offsets.size(); ++i) offsets[i] += offsets[i - 1];
    distances.assign(offsets.back(), 0);
    indices.assign(offsets.back(), 0);
    cmr::hamming_range_fill(isa, q.data(), db.data(), shape, offsets.data(), distances.data(), indices.data(),
                            workspace.data());
    size_t at = 0;
    for (int64_t i = 0; i < nq; ++i)
        for (int64_t j = 0; j < n; ++j)
            if (table[i][j] <= radius) {
                require(at < indices.size() && indices[at] == j && distances[at] == table[i][j], "range", isa, nbytes,
                        n, radius);
                ++at;
            }
    require(at == indices.size(), "range count", isa, nbytes, n, radius);

    std::vector<int32_t> all(nq * n);
    cmr::hamming_distances(isa, q.data(), db.data(), nq, n, nbytes, threads, all.data());
    for (int64_t i = 0; i < nq; ++i)
        for (int64_t j = 0; j < n; ++j) require(all[i * n + j] == table[i][j], "distances", isa, nbytes, n, 0);
}

}  // namespace

int main() {
    for (const std::string& isa : cmr::available_isas()) {
        for (int64_t nbytes : {1, 3, 4, 5, 8, 9, 16, 20, 24, 32, 40, 264, 512})
            for (int64_t n : {0, 1, 33, 700})
                for (int kind = 0; kind < 3; ++kind)
                    for (int64_t k : {int64_t{1}, int64_t{10}, n + 2})
                        check(isa, kind == 0 ? 11 : 3, n, nbytes, k, kind, 1 + kind);
        check(isa, 2, 150000, 4, 500, 0, 4);     // several splits, sampled limits
        check(isa, 2, 200003, 4, 100000, 0, 4);  // large k: one query after the other, split over the threads
        check(isa, 5, 5000, 4, 700, 1, 4);       // and each query by a thread
        // the widest codes, above the number of codes from which limits are sampled: every room at its largest
        for (int64_t nbytes : {257, 512})
            for (int64_t k : {24, 70003})
                for (int threads : {1, 4096})
                    check(isa, threads == 1 ? 1 : 70, threads == 1 ? 70001 : 900, nbytes, k, 0, threads);
        check(isa, 1, 70001, 512, 1000, 0, 4096);
        std::vector<std::thread> users;
        for (int t = 0; t < 4; ++t)
            users.emplace_back([isa] {
                std::vector<uint8_t> x(70000 * 8, 1);
                cmr::HammingShape shape{2, 70000, 8, 10, 3};
                std::vector<uint8_t> workspace(cmr::hamming_topk_workspace(shape));
                std::vector<int32_t> distances(20);
                std::vector<int64_t> indices(20);
                cmr::hamming_topk(isa, x.data(), x.data(), shape, distances.data(), indices.data(), workspace.data());
                for (int i = 0; i < 20; ++i) require(indices[i] == i % 10, "concurrent top-k", isa, 8, 70000, 10);
            });
        for (std::thread& user : users) user.join();
        require(cmr::last_isa() == isa, "the instruction set that ran", isa, 0, 0, 0);
        std::printf("%s ok\n", isa.c_str());
    }
}
