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

#if defined(__clang__)
#pragma clang attribute push(                                                                                       \
    __attribute__((                                                                                                 \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi,bmi2")
#endif

#include "ranking_kernel.h"

namespace cmr {
namespace {

struct Avx512 : Portable {
    static __mmask64 first(int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

    // Which of 16 items are relevant: their labels are rows of `plane` words, one row a word.
    struct OneWord {
        __m512i wanted;
        OneWord(const uint32_t* label, int64_t, int64_t) : wanted(_mm512_set1_epi32(static_cast<int>(label[0]))) {}
        __mmask16 operator()(const uint32_t* at) const {
            return _mm512_test_epi32_mask(_mm512_loadu_si512(at), wanted);
        }
    };
    struct Class : OneWord {
        using OneWord::OneWord;
        __mmask16 operator()(const uint32_t* at) const {
            return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(at), wanted);
        }
    };
    struct ManyWords {
        const uint32_t* wanted;
        int64_t words, plane;
        ManyWords(const uint32_t* label, int64_t words, int64_t plane) : wanted(label), words(words), plane(plane) {}
        __mmask16 operator()(const uint32_t* at) const {
            __mmask16 found = 0;
            for (int64_t w = 0; w < words; ++w)
                found |= _mm512_test_epi32_mask(_mm512_loadu_si512(at + w * plane),
                                                _mm512_set1_epi32(static_cast<int>(wanted[w])));
            return found;
        }
    };

    template <class Body>
    static void with_labels(const uint32_t* wanted, int64_t words, int64_t plane, bool classes, const Body& body) {
        if (classes) body(Class(wanted, words, plane));
        else if (words == 1) body(OneWord(wanted, words, plane));
        else body(ManyWords(wanted, words, plane));
    }

    static int least_byte(__m512i x) {
        const __m256i a = _mm256_min_epu8(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
        const __m128i b = _mm_min_epu8(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        return _mm_extract_epi8(_mm_minpos_epu16(_mm_min_epu8(b, _mm_srli_epi16(b, 8))), 0);
    }

    static bool reads_codes(const RankingShape& s) { return s.nbytes <= 8; }

    // 64 codes at a time, each in a lane of kLane bytes (kFull: it fills the lane): kLane registers of counts are
    // shifted together to 64 bytes, and one permutation puts them in order.
    template <int kLane, bool kFull>
    static void values_in_lanes(const uint8_t* q, const uint8_t* codes, int64_t nbytes, const uint32_t* labels,
                                int64_t plane, int64_t words, bool classes, const uint32_t* wanted, int64_t count,
                                uint8_t* v, int& lo, int& hi) {
        constexpr int kLanes = 64 / kLane;
        alignas(64) uint8_t ordered[64], spread[64], asked[64] = {};
        uint64_t held = 0;
        for (int i = 0; i < 64; ++i) {
            ordered[i] = static_cast<uint8_t>(i % kLanes * kLane + i / kLanes);
            spread[i] = static_cast<uint8_t>(i / kLane * nbytes + i % kLane);
            if (i % kLane < nbytes) held |= uint64_t{1} << i, asked[i] = q[i % kLane];
        }
        const __m512i order = _mm512_load_si512(ordered), lanes = _mm512_load_si512(spread), one = _mm512_set1_epi8(1);
        const __m512i query = _mm512_load_si512(asked);
        const __mmask64 row = first(kLanes * nbytes);
        __m512i least = _mm512_set1_epi8(-1), most = _mm512_setzero_si512();
        with_labels(wanted, words, plane, classes, [&](const auto& relevant) {
            const auto block = [&](int64_t i, const uint8_t* from, __mmask64 valid) {
                const auto twice = [&](int k) {  // 2 distance in byte k of each lane
                    const uint8_t* const at = from + k * kLanes * (kFull ? kLane : nbytes);
                    const __m512i code =
                        kFull ? _mm512_loadu_si512(at)
                              : _mm512_maskz_permutexvar_epi8(held, lanes, _mm512_maskz_loadu_epi8(row, at));
                    const __m512i x = _mm512_xor_si512(query, code);
                    const __m512i d = kLane == 8 ? _mm512_popcnt_epi64(x) : _mm512_popcnt_epi32(x);
                    return _mm512_slli_epi64(d, static_cast<unsigned>(8 * k + 1));
                };
                constexpr int kOr = 0xfe;
                __m512i all = _mm512_ternarylogic_epi64(twice(0), twice(1), twice(2), kOr);
                if constexpr (kLane == 8) {
                    all = _mm512_ternarylogic_epi64(all, twice(3), twice(4), kOr);
                    all = _mm512_ternarylogic_epi64(all, twice(5), twice(6), kOr);
                }
                all = _mm512_or_si512(all, twice(kLane - 1));
                const uint32_t* const at = labels + i;
                const __mmask64 found = _mm512_kunpackd(_mm512_kunpackw(relevant(at + 48), relevant(at + 32)),
                                                        _mm512_kunpackw(relevant(at + 16), relevant(at)));
                const __m512i d = _mm512_permutexvar_epi8(order, all), value = _mm512_mask_add_epi8(d, found, d, one);
                least = _mm512_mask_min_epu8(least, valid, least, value);
                most = _mm512_mask_max_epu8(most, valid, most, value);
                _mm512_storeu_si512(v + i, value);
            };
            int64_t i = 0;
            for (; i + 64 <= count; i += 64) block(i, codes + nbytes * i, ~uint64_t{0});
            if (i < count) {
                alignas(64) uint8_t rest[512] = {};
                std::memcpy(rest, codes + nbytes * i, nbytes * (count - i));
                block(i, rest, first(count - i));
            }
        });
        lo = std::min(lo, least_byte(least));
        hi = std::max(hi, 255 - least_byte(_mm512_xor_si512(most, _mm512_set1_epi8(-1))));
    }

    static void values(const uint8_t* q, const uint8_t* codes, int64_t nbytes, const uint32_t* labels, int64_t plane,
                       int64_t words, bool classes, const uint32_t* wanted, int64_t count, uint8_t* v, int& lo,
                       int& hi) {
        const auto run = [&](auto in_lanes) {
            in_lanes(q, codes, nbytes, labels, plane, words, classes, wanted, count, v, lo, hi);
        };
        if (nbytes == 8) run(values_in_lanes<8, true>);
        else if (nbytes == 4) run(values_in_lanes<4, true>);
        else if (nbytes > 4) run(values_in_lanes<8, false>);
        else run(values_in_lanes<4, false>);
    }
    using Portable::values;

    template <class Value>
    static void combine(const int32_t* distances, const uint32_t* labels, int64_t plane, int64_t words, bool classes,
                        const uint32_t* wanted, int64_t count, Value* v, int& lo, int& hi) {
        const __m512i one = _mm512_set1_epi32(1);
        __m512i least = _mm512_set1_epi32(lo), most = _mm512_set1_epi32(hi);
        with_labels(wanted, words, plane, classes, [&](const auto& relevant) {
            for (int64_t i = 0; i < count; i += 16) {
                const __mmask16 valid = static_cast<__mmask16>(first(std::min<int64_t>(16, count - i)));
                const __m512i d = _mm512_loadu_si512(distances + i), twice = _mm512_add_epi32(d, d);
                const __m512i value = _mm512_mask_add_epi32(twice, relevant(labels + i), twice, one);
                least = _mm512_mask_min_epi32(least, valid, least, value);
                most = _mm512_mask_max_epi32(most, valid, most, value);
                if constexpr (sizeof(Value) == 1)
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(v + i), _mm512_cvtepi32_epi8(value));
                else _mm256_storeu_si256(reinterpret_cast<__m256i*>(v + i), _mm512_cvtepi32_epi16(value));
            }
        });
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

    // values from i on, less `base`, as bytes
    static __m512i load(const uint8_t* v, int64_t i, int base) {
        return _mm512_sub_epi8(_mm512_loadu_si512(v + i), _mm512_set1_epi8(static_cast<char>(base)));
    }
    static __m512i load(const uint16_t* v, int64_t i, int base) {
        const __m512i origin = _mm512_set1_epi16(static_cast<int16_t>(base));
        const __m512i low = _mm512_sub_epi16(_mm512_loadu_si512(v + i), origin);
        const __m512i high = _mm512_sub_epi16(_mm512_loadu_si512(v + i + 32), origin);
        return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packus_epi16(low, high));
    }

    template <class Value>
    static void sort(const Value* v, int64_t count, int lo, int hi, int64_t levels, uint8_t* buffer, uint32_t* counts,
                     uint64_t* bits, uint16_t* starts) {
        const int base = lo & ~1, range = hi - base;
        if (range > 255) return Portable::sort(v, count, lo, hi, levels, buffer, counts, bits, starts);
        const int64_t room = sort_room(count);
        uint8_t *zeros = buffer, *ones = buffer + room, *from_zeros = nullptr, *from_ones = nullptr;
        int64_t num_zeros = 0, num_ones = 0;
        uint8_t* sorted = buffer;
        if (range < 2) {
            for (int64_t i = 0; i < count; i += 64) _mm512_storeu_si512(sorted + i, load(v, i, base));
        } else {
            for (int bit = 2; bit <= range; bit *= 2) {
                const __m512i b = _mm512_set1_epi8(static_cast<char>(bit));
                uint8_t *z = zeros, *o = ones;
                if (bit == 2) {
                    int64_t i = 0;
                    for (; i + 64 <= count; i += 64) split(load(v, i, base), ~uint64_t{0}, b, z, o);
                    if (i < count) split(load(v, i, base), first(count - i), b, z, o);
                } else {
                    int64_t i = 0;
                    for (; i + 64 <= num_zeros; i += 64)
                        split(_mm512_loadu_si512(from_zeros + i), ~uint64_t{0}, b, z, o);
                    if (i < num_zeros) split(_mm512_loadu_si512(from_zeros + i), first(num_zeros - i), b, z, o);
                    for (i = 0; i + 64 <= num_ones; i += 64)
                        split(_mm512_loadu_si512(from_ones + i), ~uint64_t{0}, b, z, o);
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

    static int64_t positions(uint64_t word, int32_t base, int32_t* out) {
        alignas(64) static constexpr uint8_t kLane[64] = {
            0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
            22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
            44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
        const __m512i lanes = _mm512_maskz_compress_epi8(word, _mm512_load_si512(kLane)),
                      from = _mm512_set1_epi32(base);
        const auto store = [&](int part, __m128i sixteen) {
            _mm512_storeu_si512(out + 16 * part, _mm512_add_epi32(from, _mm512_cvtepu8_epi32(sixteen)));
        };
        store(0, _mm512_castsi512_si128(lanes));
        store(1, _mm512_extracti32x4_epi32(lanes, 1));
        store(2, _mm512_extracti32x4_epi32(lanes, 2));
        store(3, _mm512_extracti32x4_epi32(lanes, 3));
        return __builtin_popcountll(word);
    }

    static void add_at(uint64_t word, double weight, double* sums) {
        const __m512d w = _mm512_set1_pd(weight);
#pragma GCC unroll 8
        for (int part = 0; part < 8; ++part) {
            const __m512d sum = _mm512_loadu_pd(sums + 8 * part);
            _mm512_storeu_pd(sums + 8 * part,
                             _mm512_mask_add_pd(sum, static_cast<__mmask8>(word >> (8 * part)), sum, w));
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
