#include "isa.h"

#include <atomic>
#include <cstring>

namespace cmr {
namespace {

std::atomic<const char*> last{"none"};

}  // namespace

bool has_isa(const std::string& isa) {
    if (isa == "scalar") return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // what came with AVX2, with AVX-512BW and with VPOPCNTDQ on every processor is taken together with them
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == "avx512bw")
        return has_isa("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == "avx512_vpopcntdq")
        return has_isa("avx512bw") && __builtin_cpu_supports("avx512vpopcntdq") &&
               __builtin_cpu_supports("avx512bitalg");
#elif defined(__aarch64__)
    if (isa == "neon") return true;
#endif
    return false;
}

bool is_avx512(const std::string& isa) { return isa == "avx512_vpopcntdq" || isa == "avx512bw"; }

std::vector<std::string> available_isas() {
    std::vector<std::string> available;
    for (const char* isa : kIsas)
        if (has_isa(isa)) available.push_back(isa);
    return available;
}

const char* last_isa() { return last.load(); }

void set_last_isa(const char* isa) {
    const char* name = "none";
    for (const char* known : kIsas)
        if (std::strcmp(isa, known) == 0) name = known;
    last.store(name);
}

}  // namespace cmr
