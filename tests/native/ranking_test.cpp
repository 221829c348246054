// Ranking statistics against a sort, without Python: for sanitizers and for processors that are only emulated.
// Prints the instruction sets that it tested; exit code 1 at the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "hamming.h"
#include "isa.h"
#include "ranking.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 24;
}

void require(bool ok, const char* what, const std::string& isa, const cmr::RankingShape& s) {
    if (ok) return;
    std::printf("%s differs: %s, %lld bytes, n = %lld, %lld label bytes, k = %lld\n", what, isa.c_str(),
                (long long)s.nbytes, (long long)s.n, (long long)s.label_bytes, (long long)s.k);
    std::exit(1);
}

struct Case {
    cmr::RankingShape s;
    std::vector<uint8_t> q, db, ql, dl;
    std::vector<int64_t> partners;

    Case(int64_t nq, int64_t n, int64_t nbytes, int64_t label_bytes, bool classes, int kind)
        : s{nq, n, nbytes, label_bytes, classes, true, true, std::max<int64_t>(1, n), cmr::Cut::rank, 1},
          q(nq * nbytes),
          db(n * nbytes),
          ql(nq * label_bytes),
          dl(n * label_bytes),
          partners(nq) {
        for (auto* codes : {&q, &db})
            for (uint8_t& byte : *codes) byte = static_cast<uint8_t>(kind == 0 ? next() : kind == 1 ? next() & 1 : 7);
        for (auto* labels : {&ql, &dl})
            for (size_t i = 0; i < labels->size(); ++i)
                (*labels)[i] =
                    static_cast<uint8_t>(classes ? (i % 4 ? 0 : next() % 3) : next() & next() & next() & next());
        for (int64_t& partner : partners) partner = n ? static_cast<int64_t>(next() % n) : 0;
    }
};

struct Result {
    std::vector<int64_t> items, relevant, hits, first, tied_before, hit_steps;
    std::vector<double> sums, recall_steps;
};

Result run(const std::string& isa, const Case& c, cmr::RankingShape s) {
    const int64_t cells = s.num_queries * s.levels(), nq = s.num_queries;
    Result r{std::vector<int64_t>(cells, -1), std::vector<int64_t>(cells, -1), std::vector<int64_t>(nq),
             std::vector<int64_t>(nq),        std::vector<int64_t>(nq),        std::vector<int64_t>(s.n),
             std::vector<double>(nq),         std::vector<double>(s.n)};
    std::vector<uint8_t> workspace(cmr::ranking_workspace(s), 0xee);
    cmr::ranking(isa, s,
                 {c.q.data(), c.db.data(), c.ql.data(), c.dl.data(), s.n ? c.partners.data() : nullptr, r.items.data(),
                  r.relevant.data(), r.sums.data(), r.hits.data(), r.first.data(), r.tied_before.data(),
                  r.hit_steps.data(), r.recall_steps.data()},
                 workspace.data());
    return r;
}

Result expect(const Case& c) {
    const cmr::RankingShape& s = c.s;
    const int64_t cells = s.num_queries * s.levels(), nq = s.num_queries;
    Result r{std::vector<int64_t>(cells), std::vector<int64_t>(cells), std::vector<int64_t>(nq),
             std::vector<int64_t>(nq),    std::vector<int64_t>(nq),    std::vector<int64_t>(s.n),
             std::vector<double>(nq),     std::vector<double>(s.n)};
    for (int64_t i = 0; i < nq; ++i) {
        std::vector<int> d(s.n), rel(s.n);
        std::vector<int64_t> order(s.n);
        int64_t total = 0;
        for (int64_t j = 0; j < s.n; ++j) {
            for (int64_t b = 0; b < s.nbytes; ++b)
                for (int bit = 0; bit < 8; ++bit) d[j] += ((c.q[i * s.nbytes + b] ^ c.db[j * s.nbytes + b]) >> bit) & 1;
            int shared = 0, same = 1;
            for (int64_t b = 0; b < s.label_bytes; ++b) {
                shared |= c.ql[i * s.label_bytes + b] & c.dl[j * s.label_bytes + b];
                same &= c.ql[i * s.label_bytes + b] == c.dl[j * s.label_bytes + b];
            }
            rel[j] = s.classes ? same : shared != 0;
            total += rel[j];
            ++r.items[i * s.levels() + d[j]];
            r.relevant[i * s.levels() + d[j]] += rel[j];
            order[j] = j;
        }
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return d[a] < d[b]; });
        for (int64_t j = 0; j < s.n; ++j) {
            if (j < c.partners[i]) r.tied_before[i] += d[j] == d[c.partners[i]];
            if (!rel[order[j]]) continue;
            r.sums[i] += static_cast<double>(++r.hits[i]) / static_cast<double>(j + 1);
            if (!r.first[i]) r.first[i] = j + 1;
            ++r.hit_steps[j];
            r.recall_steps[j] += 1.0 / static_cast<double>(total);
        }
    }
    return r;
}

bool close(const std::vector<double>& a, const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i)
        if (!(std::fabs(a[i] - b[i]) <= 1e-12 * (1 + std::fabs(b[i])))) return false;
    return true;
}

void check(const Case& c, int most = 3) {
    const Result want = expect(c);
    std::vector<double> sums;
    for (const std::string& isa : cmr::available_isas())
        for (int threads : {1, most}) {
            cmr::RankingShape s = c.s;
            s.threads = threads;
            const Result got = run(isa, c, s);
            require(got.items == want.items && got.relevant == want.relevant, "histogram", isa, s);
            require(got.hits == want.hits && close(got.sums, want.sums), "sum", isa, s);
            require(got.first == want.first && (!s.n || got.tied_before == want.tied_before), "place", isa, s);
            require(got.hit_steps == want.hit_steps && close(got.recall_steps, want.recall_steps), "curve", isa, s);
            if (sums.empty()) sums = got.sums;
            require(got.sums == sums, "the sum's last bit", isa, s);
            s.ordered = s.curves = false;
            const Result counted = run(isa, c, s);
            require(counted.items == want.items && counted.relevant == want.relevant, "histogram alone", isa, s);
        }
}

}  // namespace

int main() {
    for (int64_t nbytes : {1, 3, 4, 6, 8, 9, 16, 20, 32, 40, 512})
        for (int64_t n : {0, 1, 33, 64, 700})
            for (int kind = 0; kind < 3; ++kind)
                for (int64_t label_bytes : {1, 3, 4, 10})
                    check(Case(kind == 0 ? 11 : 3, n, nbytes, label_bytes, false, kind));
    check(Case(5, 700, 8, 4, true, 0));
    check(Case(5, 700, 4, 4, true, 1));
    for (int64_t nbytes : {2, 8, 64}) check(Case(9, 40001, nbytes, 3, false, 0));
    check(Case(17, 33, 512, 512, false, 0), 4096);  // the widest codes, 4,096 labels, more threads than queries
    check(Case(1, 40001, 512, 130, false, 0), 4096);
    for (const std::string& isa : cmr::available_isas()) std::printf("%s ok\n", isa.c_str());
}
