// Which instruction sets this build and this processor have, best first, and which one ran last. Declarations alone:
// kernel files include this under their own instruction set, so an inline function here could be taken from them.
#pragma once

#include <string>
#include <vector>

namespace cmr {

constexpr const char* kIsas[] = {"avx512_vpopcntdq", "avx512bw", "avx2", "neon", "scalar"};

bool has_isa(const std::string& isa);
bool is_avx512(const std::string& isa);  // kernels that count no bits are compiled once for both
std::vector<std::string> available_isas();

// By its name in kIsas; "none" before the first. Whatever a kernel's own unit reports is what really ran.
const char* last_isa();
void set_last_isa(const char* isa);

}  // namespace cmr
