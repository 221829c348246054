// NEON: one instruction counts the bits of 16 bytes; bytes are summed over words before the horizontal step.
#if defined(__aarch64__)
#include "hamming_kernel.h"

#include <arm_neon.h>

namespace cmr {
namespace {

struct Neon {
    using sum = uint8x16_t;  // a byte count in every byte: room for 31 words
    static constexpr int64_t max_words = 31;
    static constexpr int blocks(int) { return 4; }
    static constexpr bool has_transpose(int) { return false; }

    static sum zero() { return vdupq_n_u8(0); }
    static bool any(uint32x4_t m) { return vmaxvq_u32(m) != 0; }
};

struct Neon32 : Neon {
    using word = uint32_t;
    using reg = uint32x4_t;
    using mask = uint32x4_t;
    static constexpr int lanes = 4;
    static constexpr int queries(int) { return 4; }

    static reg load(const word* p) { return vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
    static reg splat(word x) { return vdupq_n_u32(x); }
    static reg bit_xor(reg a, reg b) { return veorq_u32(a, b); }
    static sum add_popcount(sum total, reg x) { return vaddq_u8(total, vcntq_u8(vreinterpretq_u8_u32(x))); }
    static reg finish(sum total) { return vpaddlq_u16(vpaddlq_u8(total)); }
    static reg add(reg a, reg b) { return vaddq_u32(a, b); }
    static reg min(reg a, reg b) { return vminq_u32(a, b); }
    static mask none() { return vdupq_n_u32(0); }
    static mask less(reg a, reg b) { return vcltq_u32(a, b); }
    static mask either(mask a, mask b) { return vorrq_u32(a, b); }
    static unsigned bits(mask m) {
        const uint32x4_t weight = {1, 2, 4, 8};
        return vaddvq_u32(vandq_u32(m, weight));
    }
    static void store_int32(int32_t* p, reg d) { vst1q_s32(p, vreinterpretq_s32_u32(d)); }
};

struct Neon64 : Neon {
    using word = uint64_t;
    using reg = uint64x2_t;
    using mask = uint32x4_t;
    static constexpr int lanes = 2;
    static constexpr int queries(int words) { return words <= 1 ? 4 : 2; }

    static reg load(const word* p) { return vreinterpretq_u64_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p))); }
    static reg splat(word x) { return vdupq_n_u64(x); }
    static reg bit_xor(reg a, reg b) { return veorq_u64(a, b); }
    static sum add_popcount(sum total, reg x) { return vaddq_u8(total, vcntq_u8(vreinterpretq_u8_u64(x))); }
    static reg finish(sum total) { return vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(total))); }
    static reg add(reg a, reg b) { return vaddq_u64(a, b); }
    // distances fit in 32 bits and the upper halves are 0, so the 32-bit minimum serves
    static reg min(reg a, reg b) {
        return vreinterpretq_u64_u32(vminq_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
    }
    static mask none() { return vdupq_n_u32(0); }
    static mask less(reg a, reg b) { return vreinterpretq_u32_u64(vcltq_u64(a, b)); }
    static mask either(mask a, mask b) { return vorrq_u32(a, b); }
    static unsigned bits(mask m) { return (vgetq_lane_u32(m, 0) & 1) | (vgetq_lane_u32(m, 2) & 2); }
    static void store_int32(int32_t* p, reg d) { vst1_s32(p, vreinterpret_s32_u32(vmovn_u64(d))); }
};

}  // namespace

CMR_HAMMING_KERNEL(hamming_neon, "neon", Neon32, Neon32, Neon32, Neon64)

}  // namespace cmr
#endif
