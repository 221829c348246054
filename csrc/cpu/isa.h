// Which instruction sets this build and this processor have, best first, and which one ran last.
#pragma once

#include <string>
#include <vector>

namespace cmr {

inline bool has_isa(const std::string& isa) {
    if (isa == "scalar") return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // what came with AVX2, with AVX-512BW and with VPOPCNTDQ on every processor is taken together with them
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == "avx512bw")
        return has_isa("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == "avx512_vpopcntdq")
        return has_isa("avx512bw") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg");
#elif defined(__aarch64__)
    if (isa == "neon") return true;
#endif
    return false;
}

constexpr const char* kIsas[] = {"avx512_vpopcntdq", "avx512bw", "avx2", "neon", "scalar"};

// Kernels that count no bits are compiled once for both.
inline bool is_avx512(const std::string& isa) { return isa == "avx512_vpopcntdq" || isa == "avx512bw"; }

inline std::vector<std::string> available_isas() {
    std::vector<std::string> found;
    for (const char* isa : kIsas)
        if (has_isa(isa)) found.push_back(isa);
    return found;
}

}  // namespace cmr
