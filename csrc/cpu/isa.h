// Which instruction sets this build and this processor have, best first, and which one ran last.
#pragma once

#include <string>
#include <vector>

namespace cmr {

inline bool has_isa(const std::string& isa) {
    if (isa == "scalar") return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == "avx2") return __builtin_cpu_supports("avx2");
    if (isa == "avx512bw") return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    // every processor with AVX-512BW and VPOPCNTDQ has BITALG as well
    if (isa == "avx512_vpopcntdq")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg");
#elif defined(__aarch64__)
    if (isa == "neon") return true;
#endif
    return false;
}

inline std::vector<std::string> available_isas() {
    std::vector<std::string> found;
    for (const char* isa : {"avx512_vpopcntdq", "avx512bw", "avx2", "neon", "scalar"})
        if (has_isa(isa)) found.push_back(isa);
    return found;
}

}  // namespace cmr
