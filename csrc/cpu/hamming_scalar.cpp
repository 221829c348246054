// Portable C++: one code at a time, no intrinsics.
#include "hamming_kernel.h"

namespace cmr {
namespace {

template <class Word>
struct Scalar {
    using word = Word;
    using reg = Word;
    using sum = Word;
    using mask = bool;
    static constexpr int lanes = 1;
    static constexpr int64_t max_words = 64;
    static constexpr int blocks(int) { return 4; }
    static constexpr int queries(int) { return 2; }
    static constexpr bool has_transpose(int) { return false; }

    static reg load(const word* p) {
        word x;
        std::memcpy(&x, p, sizeof x);
        return x;
    }
    static reg splat(word x) { return x; }
    static reg bit_xor(reg a, reg b) { return a ^ b; }
    static sum zero() { return 0; }
    static sum add_popcount(sum total, reg x) {
        // the built-in calls a table walk where the platform has no instruction
        uint64_t v = x;
        v -= (v >> 1) & 0x5555555555555555u;
        v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
        v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
        return total + static_cast<word>((v * 0x0101010101010101u) >> 56);
    }
    static reg finish(sum total) { return total; }
    static reg add(reg a, reg b) { return a + b; }
    static reg min(reg a, reg b) { return a < b ? a : b; }
    static mask none() { return false; }
    static mask less(reg a, reg b) { return a < b; }
    static mask either(mask a, mask b) { return a | b; }
    static bool any(mask m) { return m; }
    static unsigned bits(mask m) { return m; }
    static void store_int32(int32_t* p, reg d) { *p = static_cast<int32_t>(d); }
};

}  // namespace

CMR_HAMMING_KERNEL(hamming_scalar, "scalar", Scalar<uint32_t>, Scalar<uint32_t>, Scalar<uint32_t>, Scalar<uint64_t>)

}  // namespace cmr
