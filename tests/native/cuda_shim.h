// Runs CUDA kernels on the host, so that their logic can be tested where there is no GPU: one block at a time, every
// thread a fiber that runs until it meets a warp collective, every warp until it meets __syncthreads. Lanes that meet
// different ones, or that leave while others wait, end the process with a message; shared memory starts out as garbage,
// and CMR_SHIM_ORDER=reverse runs the last thread first, so that a missing barrier shows.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))

namespace emulated {

struct Index {
    unsigned x;
};
inline Index thread_index, block_index, block_size, grid_size;
inline unsigned char* shared_memory = nullptr;

enum class Wait { none, block, syncwarp, ballot, any, shfl, shfl_up, shfl_xor, match, reduce, done };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait;
    uint64_t values[2];  // what it brought to the last two collectives: others may still read the one before
    unsigned meetings;
    bool votes[2];  // of the last two __syncthreads_or
    unsigned votings;
};

inline std::vector<Thread> threads;
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline const std::function<void()>* body = nullptr;
constexpr size_t kStack = 128 << 10;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_shim: %s (block %u, thread %u)\n", what, block_index.x, thread_index.x);
    std::abort();
}

inline void wait_for(Wait wait) {
    Thread* const self = current;
    const Index me = thread_index;
    self->wait = wait;
    swapcontext(&self->context, &scheduler);
    current = self;
    thread_index = me;
}

// Lane i's value, for all lanes of the warp, once all have come.
struct Meeting {
    const Thread* lanes;
    unsigned number;
    uint64_t operator[](int lane) const { return lanes[lane].values[number % 2]; }
};

inline Meeting meet(Wait wait, unsigned mask, uint64_t value) {
    if (mask != 0xffffffffu) fail("only whole warps can meet");
    Thread* const self = current;
    const unsigned number = ++self->meetings;
    self->values[number % 2] = value;
    wait_for(wait);
    return {&threads[thread_index.x / 32 * 32], number};
}

inline void start() {
    (*body)();
    current->wait = Wait::done;
    swapcontext(&current->context, &scheduler);
}

// Runs a warp until all of its threads are done or at __syncthreads: as far ahead of the others as it may be.
inline void run_warp(size_t first, bool reverse) {
    for (;;) {
        for (size_t i = 0; i < 32; ++i) {
            Thread& thread = threads[first + (reverse ? 31 - i : i)];
            if (thread.wait != Wait::none) continue;
            current = &thread;
            thread_index.x = static_cast<unsigned>(current - threads.data());
            swapcontext(&scheduler, &thread.context);
        }
        const Wait wait = threads[first].wait;
        for (size_t i = first; i < first + 32; ++i)
            if (threads[i].wait != wait) fail("the threads of a warp wait at different places");
        if (wait == Wait::block || wait == Wait::done) return;
        for (size_t i = first; i < first + 32; ++i) threads[i].wait = Wait::none;
    }
}

inline void run_block(size_t num_threads) {
    const char* const order = std::getenv("CMR_SHIM_ORDER");
    const bool reverse = order && std::string(order) == "reverse";
    threads.resize(num_threads);
    for (Thread& thread : threads) {
        if (!thread.stack) thread.stack.reset(new char[kStack]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        thread.wait = Wait::none;
        thread.meetings = 0;
        thread.votings = 0;
        makecontext(&thread.context, start, 0);
    }
    for (;;) {
        size_t at_block = 0;
        for (size_t first = 0; first < num_threads; first += 32)
            run_warp(reverse ? num_threads - 32 - first : first, reverse);
        for (const Thread& thread : threads) at_block += thread.wait == Wait::block;
        if (at_block == 0) return;
        if (at_block < num_threads) fail("a thread left before __syncthreads");
        for (Thread& thread : threads) thread.wait = Wait::none;
    }
}

// As on Hopper, or less where CMR_SHIM_SHARED says so.
inline int most_shared_bytes() {
    const char* const bytes = std::getenv("CMR_SHIM_SHARED");
    return bytes ? std::atoi(bytes) : 227 << 10;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int num_threads, int shared_bytes, A... arguments) {
    if (num_threads % 32 || num_threads > 1024 || shared_bytes > most_shared_bytes())
        return "cudaErrorInvalidConfiguration";
    // one byte past the end is another allocation's, so that address sanitizers see it
    const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes ? shared_bytes : 1]);
    const std::function<void()> call = [&] { kernel(arguments...); };
    body = &call;
    shared_memory = memory.get();
    block_size.x = static_cast<unsigned>(num_threads);
    grid_size.x = static_cast<unsigned>(blocks);
    for (block_index.x = 0; block_index.x < blocks; ++block_index.x) {
        std::memset(shared_memory, 0xcd, shared_bytes);
        run_block(static_cast<size_t>(num_threads));
    }
    return nullptr;
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int atomicAdd(int* address, int value) { return (*address += value) - value; }
inline int atomicCAS(int* address, int expected, int value) {
    const int before = *address;
    if (before == expected) *address = value;
    return before;
}

struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

inline void __syncthreads() { emulated::wait_for(emulated::Wait::block); }
inline int __syncthreads_or(int value) {
    emulated::Thread* const self = emulated::current;
    const unsigned number = ++self->votings;
    self->votes[number % 2] = value != 0;
    __syncthreads();
    bool any = false;
    for (const emulated::Thread& thread : emulated::threads) any |= thread.votes[number % 2];
    return any;
}
inline void __syncwarp() { emulated::meet(emulated::Wait::syncwarp, ~0u, 0); }

inline unsigned __ballot_sync(unsigned mask, bool value) {
    const auto lanes = emulated::meet(emulated::Wait::ballot, mask, value);
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(lanes[i]) << i;
    return all;
}
inline bool __any_sync(unsigned mask, bool value) {
    const auto lanes = emulated::meet(emulated::Wait::any, mask, value);
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= lanes[i] != 0;
    return any;
}
inline int __shfl_sync(unsigned mask, int value, int lane) {
    return static_cast<int>(emulated::meet(emulated::Wait::shfl, mask, static_cast<uint32_t>(value))[lane & 31]);
}
inline int __shfl_up_sync(unsigned mask, int value, int by) {
    const int lane = threadIdx.x % 32;
    return static_cast<int>(
        emulated::meet(emulated::Wait::shfl_up, mask, static_cast<uint32_t>(value))[lane < by ? lane : lane - by]);
}
inline int __shfl_xor_sync(unsigned mask, int value, int with) {
    return static_cast<int>(
        emulated::meet(emulated::Wait::shfl_xor, mask, static_cast<uint32_t>(value))[threadIdx.x % 32 ^ with]);
}
inline float __shfl_xor_sync(unsigned mask, float value, int with) {
    const int bits = static_cast<int>(__float_as_uint(value));
    return __uint_as_float(static_cast<uint32_t>(__shfl_xor_sync(mask, bits, with)));
}
inline unsigned __match_any_sync(unsigned mask, int value) {
    const auto lanes = emulated::meet(emulated::Wait::match, mask, static_cast<uint32_t>(value));
    unsigned same = 0;
    for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>(lanes[i] == static_cast<uint32_t>(value)) << i;
    return same;
}
inline int __reduce_add_sync(unsigned mask, int value) {
    const auto lanes = emulated::meet(emulated::Wait::reduce, mask, static_cast<uint32_t>(value));
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += static_cast<int>(lanes[i]);
    return sum;
}

namespace emulated {

// The registers of a warp: lane 4 g + t has word t of row g (a[0]) and of row g + 8 (a[1]) and of column g (b).
template <int kParts, class Dot>
void multiply(int (&c)[4], const uint32_t (&a)[2][kParts], const uint32_t (&b)[kParts], const Dot& dot) {
    uint32_t rows[32][2][kParts], columns[32][kParts];
    for (int part = 0; part < kParts; ++part) {
        for (int h = 0; h < 2; ++h) {
            const Meeting lanes = meet(Wait::shfl, ~0u, a[h][part]);
            for (int i = 0; i < 32; ++i) rows[i][h][part] = static_cast<uint32_t>(lanes[i]);
        }
        const Meeting lanes = meet(Wait::shfl, ~0u, b[part]);
        for (int i = 0; i < 32; ++i) columns[i][part] = static_cast<uint32_t>(lanes[i]);
    }
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int h = 0; h < 2; ++h)
        for (int j = 0; j < 2; ++j)
            for (int word = 0; word < 4; ++word)
                for (int part = 0; part < kParts; ++part)
                    c[2 * h + j] += dot(rows[4 * g + word][h][part], columns[4 * (2 * t + j) + word][part]);
}

inline void multiply_b1(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    multiply<1>(c, {{a0}, {a1}}, {b}, [](uint32_t x, uint32_t y) { return __popc(x & y); });
}

inline void multiply_int8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    multiply<2>(c, {{a0, a2}, {a1, a3}}, {b0, b1}, [](uint32_t x, uint32_t y) {
        int sum = 0;
        for (int shift = 0; shift < 32; shift += 8)
            sum += static_cast<int8_t>(x >> shift) * static_cast<int8_t>(y >> shift);
        return sum;
    });
}

}  // namespace emulated
