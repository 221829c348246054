// The projected step and its noise against the formulas in double, without Python: for sanitizers and for processors
// that are only emulated. Prints the instruction sets that it tested; exit code 1 at the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "isa.h"
#include "pgd.h"

namespace {

uint64_t state = 88172645463325252u;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 24;
}
float uniform() { return static_cast<float>(next() % 20001) / 10000 - 1; }

void require(bool ok, const char* what, const std::string& isa, int64_t samples, int64_t channels, int64_t inner) {
    if (ok) return;
    std::printf("%s differs: %s, (%lld, %lld, %lld)\n", what, isa.c_str(), (long long)samples, (long long)channels,
                (long long)inner);
    std::exit(1);
}

void check_step(const std::string& isa, int64_t samples, int64_t channels, int64_t inner, bool l2, int threads) {
    const int64_t each = channels * inner, n = samples * each;
    std::vector<float> x(n), g(n), origin(n), alpha(samples), eps(samples), low(channels), high(channels);
    for (int64_t i = 0; i < n; ++i) origin[i] = uniform(), x[i] = origin[i] + 0.1f * uniform(), g[i] = uniform();
    for (int64_t s = 0; s < samples; ++s) alpha[s] = 0.05f + 0.01f * (s % 3), eps[s] = s % 5 ? 0.2f : 0.0f;
    for (int64_t c = 0; c < channels; ++c) low[c] = -0.9f - 0.01f * (c % 2), high[c] = 0.8f;
    const int64_t bad = samples > 1 && each > 0 ? 1 : -1;
    if (bad >= 0) g[bad * each + each - 1] = NAN;
    const std::vector<float> before = x;
    std::vector<int32_t> broken(samples, -1);
    cmr::pgd_step(isa, {samples,
                        channels,
                        inner,
                        x.data(),
                        g.data(),
                        origin.data(),
                        {alpha.data(), 1, 0},
                        {eps.data(), 1, 0},
                        {low.data(), 0, 1},
                        {high.data(), 0, 1},
                        broken.data(),
                        3,
                        l2,
                        threads});
    for (int64_t s = 0; s < samples; ++s) {
        require(broken[s] == (s == bad ? 3 : -1), "where a gradient broke", isa, samples, channels, inner);
        if (s == bad) continue;
        double norm = 0, distance = 0;
        for (int64_t i = s * each; i < (s + 1) * each; ++i) norm += static_cast<double>(g[i]) * g[i];
        std::vector<double> moved(each);
        for (int64_t e = 0; e < each; ++e) {
            const int64_t i = s * each + e;
            const double along = l2 ? (norm > 0 ? g[i] / std::sqrt(norm) : 0) : (g[i] > 0) - (g[i] < 0);
            moved[e] = before[i] + alpha[s] * along - origin[i];
            distance += moved[e] * moved[e];
        }
        const double factor = std::sqrt(distance) > eps[s] ? eps[s] / std::sqrt(distance) : 1;
        for (int64_t e = 0; e < each; ++e) {
            const int64_t c = e / inner;
            const double inside =
                l2 ? moved[e] * factor : std::clamp<double>(moved[e], -static_cast<double>(eps[s]), eps[s]);
            const double want = std::clamp<double>(origin[s * each + e] + inside, low[c], high[c]);
            require(std::fabs(x[s * each + e] - want) <= 1e-6, l2 ? "an L2 step" : "an L-inf step", isa, samples,
                    channels, inner);
        }
    }
}

// Philox4x32-10, word by word
float philox(uint64_t seed, uint64_t index, int64_t element) {
    const uint64_t block = static_cast<uint64_t>(element / 4);
    uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(index),
                     static_cast<uint32_t>(index >> 32)};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
        const uint32_t made[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
        std::copy(made, made + 4, c);
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    return static_cast<float>((2 * static_cast<double>(c[element % 4] >> 9) + 1 - 8388608) / 8388608);
}

void check_noise(const std::string& isa, int64_t samples, int64_t count, int threads) {
    std::vector<int64_t> index(samples);
    for (int64_t s = 0; s < samples; ++s) index[s] = s % 2 ? (int64_t{1} << 40) + s : s;
    std::vector<float> out(samples * count, 7);
    const uint64_t seed = 0xfedcba9876543210u;
    cmr::pgd_noise(isa, {seed, index.data(), samples, count, out.data(), threads});
    for (int64_t s = 0; s < samples; ++s)
        for (int64_t e = 0; e < count; ++e)
            require(out[s * count + e] == philox(seed, static_cast<uint64_t>(index[s]), e), "noise", isa, samples, 1,
                    count);
}

}  // namespace

int main() {
    for (const std::string& isa : cmr::available_isas()) {
        for (const int64_t samples : {0, 1, 3, 65})
            for (const int64_t channels : {1, 3})
                for (const int64_t inner : {1, 7, 16, 17, 255, 256, 257, 784})
                    for (const bool l2 : {false, true})
                        for (const int threads : {1, 128}) check_step(isa, samples, channels, inner, l2, threads);
        check_step(isa, 2, 3, 224 * 224, true, 2);  // one sample above a task
        check_step(isa, 40000, 1, 1, false, 4096);
        for (const int64_t count : {0, 1, 3, 63, 64, 65, 3072})
            for (const int threads : {1, 4096}) check_noise(isa, 5, count, threads);
        std::printf("%s ok\n", isa.c_str());
    }
}
