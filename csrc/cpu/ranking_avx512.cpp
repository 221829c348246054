// AVX-512: values are sorted by compressing 64 of them at a time (VBMI2).
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <string>

#if !defined(__clang__)
// gcc 12's own header warns about the deliberately undefined registers of its intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define CMR_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi,bmi2"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(CMR_TARGET))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi,bmi2")
#endif

#include "ranking_kernel.h"

namespace cmr {
namespace {

struct Avx512 : Portable {
    static void combine(const int32_t* distances, const uint32_t* labels, int64_t plane, int64_t words, bool classes,
                        const uint32_t* wanted, int64_t count, uint16_t* v, int& lo, int& hi) {
        const __m512i one = _mm512_set1_epi32(1), label = _mm512_set1_epi32(static_cast<int>(wanted[0]));
        __m512i least = _mm512_set1_epi32(lo), most = _mm512_set1_epi32(hi);
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 valid = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
            const __m512i x = _mm512_loadu_si512(labels + i);
            __mmask16 shared = classes ? _mm512_cmpeq_epi32_mask(x, label) : _mm512_test_epi32_mask(x, label);
            for (int64_t w = 1; w < words; ++w)
                shared |= _mm512_test_epi32_mask(_mm512_loadu_si512(labels + w * plane + i),
                                                 _mm512_set1_epi32(static_cast<int>(wanted[w])));
            const __m512i d = _mm512_loadu_si512(distances + i);
            const __m512i twice = _mm512_add_epi32(d, d), value = _mm512_mask_add_epi32(twice, shared, twice, one);
            least = _mm512_mask_min_epi32(least, valid, least, value);
            most = _mm512_mask_max_epi32(most, valid, most, value);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(v + i), _mm512_cvtepi32_epi16(value));
        }
        lo = _mm512_reduce_min_epi32(least);
        hi = _mm512_reduce_max_epi32(most);
    }

    // 64 values, those with the bit 0 to `zeros`, those with the bit 1 to `ones`, in their order
    static void split(__m512i x, __mmask64 valid, __m512i bit, uint8_t*& zeros, uint8_t*& ones) {
        const __mmask64 set = _mm512_mask_test_epi8_mask(valid, x, bit), clear = valid & ~set;
        _mm512_storeu_si512(zeros, _mm512_maskz_compress_epi8(clear, x));
        _mm512_storeu_si512(ones, _mm512_maskz_compress_epi8(set, x));
        zeros += __builtin_popcountll(clear);
        ones += __builtin_popcountll(set);
    }

    static __mmask64 first(int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

    static void sort(const uint16_t* v, int64_t count, int lo, int hi, int64_t levels, uint8_t* buffer, uint32_t* counts,
                     uint64_t* bits, uint16_t* starts) {
        const int base = lo & ~1, range = hi - base;
        if (range > 255 || !has_compress()) return Portable::sort(v, count, lo, hi, levels, buffer, counts, bits, starts);
        const int64_t room = (count + kPad) / 64 * 64;
        uint8_t *zeros = buffer, *ones = buffer + room, *from_zeros = nullptr, *from_ones = nullptr;
        int64_t num_zeros = 0, num_ones = 0;
        const __m512i origin = _mm512_set1_epi16(static_cast<int16_t>(base));
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        const auto load = [&](int64_t i) {
            const __m512i low = _mm512_sub_epi16(_mm512_loadu_si512(v + i), origin);
            const __m512i high = _mm512_sub_epi16(_mm512_loadu_si512(v + i + 32), origin);
            return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(low, high));
        };
        uint8_t* sorted = buffer;
        if (range < 2) {
            for (int64_t i = 0; i < count; i += 64) _mm512_storeu_si512(sorted + i, load(i));
        } else {
            for (int bit = 2; bit <= range; bit *= 2) {
                const __m512i b = _mm512_set1_epi8(static_cast<char>(bit));
                uint8_t *z = zeros, *o = ones;
                if (bit == 2) {
                    int64_t i = 0;
                    for (; i + 64 <= count; i += 64) split(load(i), ~uint64_t{0}, b, z, o);
                    if (i < count) split(load(i), first(count - i), b, z, o);
                } else {
                    int64_t i = 0;
                    for (; i + 64 <= num_zeros; i += 64) split(_mm512_loadu_si512(from_zeros + i), ~uint64_t{0}, b, z, o);
                    if (i < num_zeros) split(_mm512_loadu_si512(from_zeros + i), first(num_zeros - i), b, z, o);
                    for (i = 0; i + 64 <= num_ones; i += 64) split(_mm512_loadu_si512(from_ones + i), ~uint64_t{0}, b, z, o);
                    if (i < num_ones) split(_mm512_loadu_si512(from_ones + i), first(num_ones - i), b, z, o);
                }
                num_zeros = z - zeros, num_ones = o - ones;
                from_zeros = zeros, from_ones = ones;
                zeros = zeros == buffer ? buffer + 2 * room : buffer;
                ones = zeros + room;
            }
            std::memcpy(from_zeros + num_zeros, from_ones, num_ones);
            sorted = from_zeros;
        }
        const __m512i levels_only = _mm512_set1_epi8(static_cast<char>(0xfe)), one = _mm512_set1_epi8(1);
        int64_t level = -1;
        const auto begin = [&](int64_t next, int64_t at) {
            while (level < next) starts[++level] = static_cast<uint16_t>(at);
        };
        begin((base + sorted[0]) >> 1, 0);
        for (int64_t i = 0; i < count; i += 64) {
            const __m512i x = _mm512_loadu_si512(sorted + i), next = _mm512_loadu_si512(sorted + i + 1);
            bits[i / 64] = _mm512_test_epi8_mask(x, one);
            uint64_t ends = _mm512_test_epi8_mask(_mm512_xor_si512(x, next), levels_only) & first(count - 1 - i);
            for (; ends; ends &= ends - 1) {
                const int64_t at = i + static_cast<int64_t>(__builtin_ctzll(ends)) + 1;
                begin((base + sorted[at]) >> 1, at);
            }
        }
        begin(levels, count);
    }

    static bool has_compress() {
        static const bool found = [] {
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi");
        }();
        return found;
    }

    static int64_t positions(uint64_t word, int32_t base, int32_t* out) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        int64_t count = 0;
        for (int part = 0; part < 64; part += 16) {
            const __mmask16 mask = static_cast<__mmask16>(word >> part);
            _mm512_storeu_si512(out + count,
                                _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(base + part))));
            count += __builtin_popcount(mask);
        }
        return count;
    }

    static void add_at(uint64_t word, double weight, double* sums) {
        const __m512d w = _mm512_set1_pd(weight);
#pragma GCC unroll 8
        for (int part = 0; part < 8; ++part) {
            const __m512d sum = _mm512_loadu_pd(sums + 8 * part);
            _mm512_storeu_pd(sums + 8 * part, _mm512_mask_add_pd(sum, static_cast<__mmask8>(word >> (8 * part)), sum, w));
        }
    }

    static void count_at(uint64_t word, uint8_t* counts) {
        const __m512i sum = _mm512_loadu_si512(counts);
        _mm512_storeu_si512(counts, _mm512_mask_add_epi8(sum, word, sum, _mm512_set1_epi8(1)));
    }
};

}  // namespace

CMR_RANKING_KERNEL(ranking_avx512, hamming_avx512, Avx512)

}  // namespace cmr
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
