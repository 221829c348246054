// Exact packed-bit Hamming search on the GPU: the maths, layout and bound are in hamming_scan.cuh, the selection in
// hamming_topk.cuh, the tensor-core form in hamming_tensor.cuh. Here is what the host calls.
#include <atomic>

#include "hamming_tensor.cuh"

namespace cmr::cuda {
namespace {

std::atomic<const char*> last{"none"};

constexpr int kWordsInRegisters = 8;

__global__ void __launch_bounds__(256) arithmetic_kernel(int rounds, int* out) {
    uint32_t words[kWordsInRegisters];
    for (int i = 0; i < kWordsInRegisters; ++i) words[i] = (threadIdx.x + 1) * (2654435761u + 2 * i);
    int sum = 0;
    for (int round = 0; round < rounds; ++round)
#pragma unroll
        for (int i = 0; i < kWordsInRegisters; ++i) sum += __popc(words[i] ^ static_cast<uint32_t>(round));
    out[blockIdx.x * 256 + threadIdx.x] = sum;
}

}  // namespace

const char* last_kernel() { return last.load(); }
void set_last_kernel(const char* name) { last.store(name); }

const char* hamming_lists(const Queue& queue, const HammingScan& scan, Form form, int64_t k, int64_t capacity,
                          const int* limits, uint64_t* keys, int* counts) {
    const ListParams params{k, capacity, limits, keys, counts};
    last.store(form == Form::popc ? "popc" : form == Form::b1 ? "b1" : "int8");
    if (form == Form::popc) return launch_scan<ListSink>(queue, scan, params);
    return launch_tensor(queue, scan, form == Form::int8, params);
}

const char* hamming_merge(const Queue& queue, int64_t num_queries, int64_t ranges, int nbytes, int64_t k,
                          int64_t capacity, const uint64_t* keys, const int* counts, int* limits, int* distances,
                          int64_t* indices, int64_t row_stride) {
    const MergeParams params{ranges, k, capacity, 8 * nbytes + 1, keys, counts, limits, distances, indices, row_stride};
    const int row = params.bins * static_cast<int>(sizeof(int));
    const int wanted = num_queries < 512 ? 32 : 4, fit = kSharedBytes / row - 1;
    const int warps = wanted < fit ? wanted : fit;
    return launch(merge_kernel, queue, num_queries, 32 * warps, (warps + 1) * row, params);
}

const char* hamming_histogram(const Queue& queue, const HammingScan& scan, const Labels& labels, int* items,
                              int* relevant) {
    last.store("histogram");
    return launch_scan<HistogramSink>(queue, scan, {labels, items, relevant});
}

const char* hamming_place(const Queue& queue, const HammingScan& scan, int64_t k, const int* limits,
                          const int64_t* first_places, int* distances, int64_t* indices, int64_t row_stride) {
    last.store("place");
    return launch_scan<PlaceSink>(queue, scan, {k, limits, first_places, distances, indices, row_stride});
}

const char* hamming_range_count(const Queue& queue, const HammingScan& scan, int radius, int64_t* counts) {
    last.store("range");
    return launch_scan<RangeCountSink>(queue, scan, {radius, counts});
}

const char* hamming_range_fill(const Queue& queue, const HammingScan& scan, int radius, const int64_t* offsets,
                               int* distances, int64_t* indices) {
    last.store("range");
    return launch_scan<RangeFillSink>(queue, scan, {radius, offsets, distances, indices});
}

const char* hamming_table(const Queue& queue, const HammingScan& scan, int* distances) {
    last.store("table");
    return launch_scan<TableSink>(queue, scan, {distances});
}

const char* hamming_arithmetic(const Queue& queue, int64_t blocks, int rounds, int* out) {
    return launch(arithmetic_kernel, queue, blocks, 256, 0, rounds, out);
}

const char* device_problem() {
#ifdef __CUDACC__
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
#else
    return nullptr;
#endif
}

}  // namespace cmr::cuda
