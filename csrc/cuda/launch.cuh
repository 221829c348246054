// Launching a kernel, its shared memory, and the warp helpers that every kernel uses.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_shim.h"  // tests/native: the same kernels, run on the host
#endif

#include "kernels.h"

namespace cmr::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid, in x
constexpr int kSharedBytes = 48 << 10;       // what a block gets on every device

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline unsigned lanes_below() { return (1u << lane_id()) - 1; }

__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
#else
    return emulated::shared_memory;
#endif
}

// Makes `device` the current one for a while.
class OnDevice {
public:
#ifdef __CUDACC__
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess && before_ != device) {
            error_ = cudaSetDevice(device);
            moved_ = error_ == cudaSuccess;
        }
    }
    ~OnDevice() {
        if (moved_) cudaSetDevice(before_);
    }
    const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorName(error_); }

private:
    cudaError_t error_;
    int before_ = 0;
    bool moved_ = false;
#else
    explicit OnDevice(int) {}
    const char* error() const { return nullptr; }
#endif
};

// What a block can have on `device`, if asked for; launch() asks.
inline const char* most_shared_bytes([[maybe_unused]] int device, int& bytes) {
#ifdef __CUDACC__
    const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
#else
    bytes = emulated::most_shared_bytes();
    return nullptr;
#endif
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), [[maybe_unused]] const Queue& queue, int64_t blocks, int threads,
                   int shared_bytes, A... arguments) {
    if (blocks == 0) return nullptr;
    if (blocks > kMostBlocks) return "more blocks than a grid can have";
#ifdef __CUDACC__
    const OnDevice here(queue.device);
    if (here.error()) return here.error();
    if (shared_bytes > kSharedBytes) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (error != cudaSuccess) return cudaGetErrorName(error);
    }
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, reinterpret_cast<cudaStream_t>(queue.stream)>>>(
        arguments...);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
#else
    return emulated::launch(kernel, blocks, threads, shared_bytes, arguments...);
#endif
}

}  // namespace cmr::cuda
