// A step of a projected gradient attack on the GPU, in place, and the noise that it starts from. The maths is that of
// csrc/cpu/pgd_kernel.h, and so are the bits of the L-inf step and of the noise: nothing is contracted.
//
// L-inf    x <- clamp(origin + clamp(x + alpha sign(g) - origin, -eps, eps), low, high)
// L2       d <- x + alpha g / |g| - origin,   x <- clamp(origin + d min(1, eps / |d|), low, high)
//          |d|^2 = |x - origin|^2 + 2 alpha (x - origin) . g / |g| + alpha^2: three sums, read in one pass.
//
// Layout   L-inf, noise: a thread takes 4 consecutive elements of the whole tensor, whatever sample and channel they
//          are of. L2: a block takes a part of one sample, 2048 elements or what makes 256 parts, so that one large
//          sample fills the device too; a sample's parts depend on its size alone, and so do its bits.
// Sums     float64 a thread, then by halves in a block, a partial for each part in the workspace, and those by halves
//          again in every block of the second kernel: the same bits from run to run.
// Flags    Whoever sees a gradient that is not finite swaps the flag for `step` if it is negative: all of them write
//          the same number.
// Bound    Memory. L-inf moves 16 bytes an element (three reads, a write), L2 28 (twice three reads, and a write).
// Versions Not measured on a GPU yet. Left out by counting bytes: a third kernel that adds the partials (one more
//          launch), and |d| from the moved x (32 bytes an element, three kernels).
#include "launch.cuh"

namespace cmr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 4;  // elements of one load
constexpr int64_t kPart = 2 * kThreads * kWide;

__device__ inline float lesser(float a, float b) { return a < b ? a : b; }
__device__ inline float greater(float a, float b) { return a > b ? a : b; }
__device__ inline bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// a / b, both positive; short where both fit in 32 bits
__device__ inline int64_t quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
}

// `count` elements and zeros, in one load where there are 4 and they are aligned
__device__ inline void load(float (&to)[kWide], const float* from, int count, bool aligned) {
    if (aligned && count == kWide) {
        const float4 all = *reinterpret_cast<const float4*>(from);
        to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
    } else {
        for (int i = 0; i < kWide; ++i) to[i] = i < count ? from[i] : 0;
    }
}

__device__ inline void store(float* to, const float (&from)[kWide], int count, bool aligned) {
    if (aligned && count == kWide) *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
    else
        for (int i = 0; i < kWide; ++i)
            if (i < count) to[i] = from[i];
}

// Where an element is, and the values that hold there.
struct Place {
    const PgdStep& s;
    int64_t sample, channel, along;
    float alpha, eps, low, high;

    __device__ Place(const PgdStep& step, int64_t element) : s(step) {
        const int64_t run = quotient(element, s.inner);
        along = element - run * s.inner;
        sample = quotient(run, s.channels);
        channel = run - sample * s.channels;
        read();
    }

    // to the next element, which must be there
    __device__ void advance() {
        if (++along < s.inner) return;
        along = 0;
        if (++channel == s.channels) channel = 0, ++sample;
        read();
    }

    __device__ void read() { alpha = value(s.alpha), eps = value(s.eps), low = value(s.low), high = value(s.high); }

    __device__ float value(const PgdValue& v) const {
        return __ldg(v.at + sample * v.per_sample + channel * v.per_channel);
    }
};

__device__ inline void flag(const PgdStep& s, int64_t sample) {
    if (!s.broken) return;
    const int seen = *const_cast<volatile int*>(s.broken + sample);
    if (seen < 0) atomicCAS(s.broken + sample, seen, s.step);
}

__global__ void __launch_bounds__(kThreads) linf_kernel(const PgdStep s, bool aligned) {
    const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWide;
    const int64_t left = s.samples * s.channels * s.inner - first;
    if (left <= 0) return;
    const int count = left < kWide ? static_cast<int>(left) : kWide;
    float x[kWide], g[kWide], origin[kWide];
    load(x, s.x + first, count, aligned);
    load(g, s.gradient + first, count, aligned);
    load(origin, s.origin + first, count, aligned);
    Place place(s, first);
    for (int i = 0; i < kWide; ++i) {
        if (i >= count) break;
        if (i) place.advance();
        const float sign = static_cast<float>((g[i] > 0) - (g[i] < 0));
        const float delta = __fsub_rn(__fadd_rn(x[i], __fmul_rn(place.alpha, sign)), origin[i]);
        const float inside = lesser(greater(delta, -place.eps), place.eps);
        x[i] = lesser(greater(__fadd_rn(origin[i], inside), place.low), place.high);
        if (!finite(g[i])) flag(s, place.sample);
    }
    store(s.x + first, x, count, aligned);
}

struct Sums {
    double gradient, along, offset;  // |g|^2, (x - origin) . g, |x - origin|^2
};

// Sum over the block of one a thread, in a fixed order; `scratch` holds kThreads.
__device__ Sums sum_block(const Sums& mine, Sums* scratch) {
    scratch[threadIdx.x] = mine;
    __syncthreads();
    for (int half = kThreads / 2; half; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) {
            Sums& to = scratch[threadIdx.x];
            const Sums& from = scratch[threadIdx.x + half];
            to = {to.gradient + from.gradient, to.along + from.along, to.offset + from.offset};
        }
        __syncthreads();
    }
    return scratch[0];
}

// Elements of a part: a multiple of what a block loads at a time, so that every part is as well aligned as its sample.
__host__ __device__ inline int64_t part_of(int64_t elements) {
    constexpr int64_t unit = kThreads * kWide;
    const int64_t least = (elements + kThreads - 1) / kThreads;
    return least <= kPart ? kPart : (least + unit - 1) / unit * unit;
}

__host__ __device__ inline int64_t parts_of(int64_t elements) {
    return (elements + part_of(elements) - 1) / part_of(elements);
}

// A block's part of a sample: loop(i, count) over its elements, `count` of them from i on.
template <class Body>
__device__ void over_part(int64_t elements, int64_t part, const Body& body) {
    const int64_t each = part_of(elements), end = (part + 1) * each < elements ? (part + 1) * each : elements;
    for (int64_t i = part * each + threadIdx.x * kWide; i < end; i += kThreads * kWide)
        body(i, end - i < kWide ? static_cast<int>(end - i) : kWide);
}

__global__ void __launch_bounds__(kThreads) l2_sums_kernel(const PgdStep s, Sums* sums, bool aligned) {
    const int64_t elements = s.channels * s.inner, sample = quotient(blockIdx.x, parts_of(elements));
    Sums mine = {0, 0, 0};
    over_part(elements, blockIdx.x - sample * parts_of(elements), [&](int64_t i, int count) {
        const int64_t at = sample * elements + i;
        float x[kWide], g[kWide], origin[kWide];
        load(x, s.x + at, count, aligned);
        load(g, s.gradient + at, count, aligned);
        load(origin, s.origin + at, count, aligned);
        for (int j = 0; j < kWide; ++j) {  // products of floats are exact in float64
            const double slope = g[j], offset = __fsub_rn(x[j], origin[j]);
            mine.gradient += slope * slope;
            mine.along += offset * slope;
            mine.offset += offset * offset;
        }
    });
    const Sums all = sum_block(mine, reinterpret_cast<Sums*>(shared_memory()));
    if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

__global__ void __launch_bounds__(kThreads) l2_move_kernel(const PgdStep s, const Sums* sums, bool aligned) {
    const int64_t elements = s.channels * s.inner, parts = parts_of(elements);
    const int64_t sample = quotient(blockIdx.x, parts), part = blockIdx.x - sample * parts;
    const Sums mine = threadIdx.x < parts ? sums[sample * parts + threadIdx.x] : Sums{0, 0, 0};
    const Sums all = sum_block(mine, reinterpret_cast<Sums*>(shared_memory()));
    if (all.gradient - all.gradient != 0) {  // a sum of squares is finite unless one of them is not
        if (part == 0 && threadIdx.x == 0) flag(s, sample);
        return;
    }
    const double alpha = __ldg(s.alpha.at + sample * s.alpha.per_sample);
    const double eps = __ldg(s.eps.at + sample * s.eps.per_sample);
    const double norm = sqrt(all.gradient), scale = norm > 0 ? alpha / norm : 0;
    const double square = all.offset + 2 * scale * all.along + scale * norm * scale * norm;
    const double distance = sqrt(square > 0 ? square : 0);
    const float factor = distance > eps ? static_cast<float>(eps / distance) : 1;
    over_part(elements, part, [&](int64_t i, int count) {
        const int64_t at = sample * elements + i;
        float x[kWide], g[kWide], origin[kWide];
        load(x, s.x + at, count, aligned);
        load(g, s.gradient + at, count, aligned);
        load(origin, s.origin + at, count, aligned);
        Place place(s, at);
        for (int j = 0; j < kWide; ++j) {
            if (j >= count) break;
            if (j) place.advance();
            const float delta = __fsub_rn(__fadd_rn(x[j], static_cast<float>(scale * g[j])), origin[j]);
            x[j] = lesser(greater(__fadd_rn(origin[j], __fmul_rn(delta, factor)), place.low), place.high);
        }
        store(s.x + at, x, count, aligned);
    });
}

__device__ inline float uniform(uint32_t word) {
    return static_cast<float>(2 * static_cast<int32_t>(word >> 9) + 1 - (1 << 23)) * 0x1p-23f;
}

__global__ void __launch_bounds__(kThreads) noise_kernel(const PgdNoise s, int64_t blocks, bool aligned) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at >= s.samples * blocks) return;
    const int64_t sample = quotient(at, blocks), block = at - sample * blocks;
    const uint64_t index = static_cast<uint64_t>(s.index[sample]), number = static_cast<uint64_t>(block);
    uint32_t c[4] = {static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(index),
                     static_cast<uint32_t>(index >> 32)};
    uint32_t key[2] = {static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
        c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0];
        c[1] = static_cast<uint32_t>(b);
        c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1];
        c[3] = static_cast<uint32_t>(a);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    float found[kWide];
    for (int i = 0; i < kWide; ++i) found[i] = uniform(c[i]);
    const int64_t left = s.count - block * kWide;
    store(s.out + sample * s.count + block * kWide, found, left < kWide ? static_cast<int>(left) : kWide, aligned);
}

bool aligned_to_a_load(uintptr_t addresses) { return addresses % (kWide * sizeof(float)) == 0; }

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

}  // namespace

int64_t pgd_workspace(int64_t samples, int64_t elements) {
    return samples * parts_of(elements) * static_cast<int64_t>(sizeof(Sums));
}

const char* pgd_step(const Queue& queue, const PgdStep& step, void* workspace) {
    const int64_t elements = step.channels * step.inner;
    if (step.samples * elements == 0) return nullptr;
    const bool aligned =
        aligned_to_a_load(reinterpret_cast<uintptr_t>(step.x) | reinterpret_cast<uintptr_t>(step.gradient) |
                          reinterpret_cast<uintptr_t>(step.origin));
    if (!step.l2) {
        set_last_kernel("linf");
        const int64_t threads = (step.samples * elements + kWide - 1) / kWide;
        return launch(linf_kernel, queue, blocks_for(threads), kThreads, 0, step, aligned);
    }
    set_last_kernel("l2");
    const bool rows_too = aligned && elements % kWide == 0;
    const int64_t blocks = step.samples * parts_of(elements);
    const int bytes = kThreads * static_cast<int>(sizeof(Sums));
    Sums* const sums = static_cast<Sums*>(workspace);
    const char* const error = launch(l2_sums_kernel, queue, blocks, kThreads, bytes, step, sums, rows_too);
    if (error) return error;
    return launch(l2_move_kernel, queue, blocks, kThreads, bytes, step, static_cast<const Sums*>(sums), rows_too);
}

const char* pgd_noise(const Queue& queue, const PgdNoise& noise) {
    set_last_kernel("noise");
    const int64_t blocks = (noise.count + kWide - 1) / kWide;
    const bool aligned = noise.count % kWide == 0 && aligned_to_a_load(reinterpret_cast<uintptr_t>(noise.out));
    return launch(noise_kernel, queue, blocks_for(noise.samples * blocks), kThreads, 0, noise, blocks, aligned);
}

}  // namespace cmr::cuda
