// Margin losses over triplets on the GPU: from a block of anchors' inner products with all candidates to the weight of
// each distance in the loss, in place. The maths is that of csrc/cpu/triplet_kernel.h.
//
// Layout   One block of threads an anchor. Squared distances take the place of the inner products, and their roots are
//          made whenever they are needed, so shared memory holds only the sorted side: up to 4096 keys (distance or limit in order-preserving
//          bits, index) and as many counters, 48 KB.
// Sort     Bitonic, of the keys padded to a power of two. Keys are gathered in any order; sorted, they are in one.
// Weights  all: the positives are sorted. A negative's rank is a binary search in their limits; ranks are counted with
//          integer atomics, and the running sum over the counters gives the positives' weights, which they find by
//          their own key. semihard: the negatives are sorted, and each positive finds and counts the next one.
//          Nothing depends on the order of threads.
// Sums     float64 a thread in column order, then by halves: the same bits from run to run.
// Bound    The products are cuBLAS's; a row is read three times and written once, and sorted in shared memory in
//          log2(P) (log2(P) + 1) / 2 steps.
#include "launch.cuh"

namespace cmr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostSorted = 4096;
constexpr float kClose = 1.0f / 64;  // as on the CPU
constexpr uint64_t kNone = ~uint64_t{0};
enum { kAll, kHard, kHardNegative };  // TripletRows::mining, semihard is the other
enum { kEuclidean, kSquared, kDot };  // TripletRows::distance

__device__ inline uint32_t ordered_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

__device__ inline float from_ordered(uint32_t bits) {
    return __uint_as_float(bits ^ ((bits >> 31) ? 0x80000000u : 0xffffffffu));
}

__device__ inline uint64_t make_key(float value, int64_t index) {
    return static_cast<uint64_t>(ordered_bits(value)) << 32 | static_cast<uint64_t>(index);
}
__device__ inline float value_of(uint64_t key) { return from_ordered(static_cast<uint32_t>(key >> 32)); }
__device__ inline int64_t index_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

struct Row {
    const TripletRows& p;
    const int64_t row;
    float* const values;
    const float squares;

    __device__ Row(const TripletRows& params, int64_t at)
        : p(params), row(at), values(params.block + at * params.candidates), squares(params.x_squares[at]) {}

    // 1 relevant, 0 not, 2 the anchor itself
    __device__ int kind(int64_t j) const {
        if (p.self >= 0 && j == p.self + row) return 2;
        if (p.classes) return p.y_labels[j] == p.x_labels[row];
        bool shared = false;
        for (int64_t w = 0; w < p.words; ++w)
            shared |= (p.y_labels[w * p.candidates + j] & p.x_labels[row * p.words + w]) != 0;
        return shared;
    }

    // Of rows as they are given; the sum is float64.
    __device__ float squared_difference(int64_t j) const {
        const float *const x = p.x + row * p.width, *const y = p.y + j * p.width;
        double sum = 0;
        for (int64_t k = 0; k < p.width; ++k) {
            const double difference = static_cast<double>(x[k]) - static_cast<double>(y[k]);
            sum += difference * difference;
        }
        return static_cast<float>(sum);
    }

    // Products become squared distances in their place, or minus the products. A thread reads none but its own.
    // Sums and products are rounded one by one: as on the CPU, never contracted.
    __device__ void prepare() const {
        for (int64_t j = threadIdx.x; j < p.candidates; j += kThreads) {
            if (p.distance == kDot) {
                values[j] = -values[j];
                continue;
            }
            const float both = __fadd_rn(squares, p.y_squares[j]);
            float d2 = p.exact ? 0.0f : __fsub_rn(both, __fmul_rn(2.0f, values[j]));
            if (p.exact || d2 <= __fmul_rn(kClose, both))
                d2 = p.self >= 0 && j == p.self + row ? 0.0f : squared_difference(j);
            values[j] = d2;
        }
    }

    __device__ float distance(int64_t j) const { return p.distance == kEuclidean ? __fsqrt_rn(values[j]) : values[j]; }

    // A distance of 0 has no direction.
    __device__ float e(float d, float weight) const {
        if (p.distance == kDot) return weight;
        if (p.distance == kSquared) return 2 * weight;
        return d == 0 ? 0 : __fdiv_rn(weight, d);
    }
};

__device__ void sort_block(uint64_t* keys, int size) {
    for (int run = 2; run <= size; run *= 2)
        for (int apart = run / 2; apart; apart /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += kThreads) {
                const int low = 2 * i - (i & (apart - 1)), high = low + apart;
                const bool ascending = (low & run) == 0;
                const uint64_t a = keys[low], b = keys[high];
                if ((a > b) == ascending) keys[low] = b, keys[high] = a;
            }
            __syncthreads();
        }
}

// How many of `count` sorted keys are below `key`.
__device__ int keys_below(const uint64_t* keys, int count, uint64_t key) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (keys[middle] < key) low = middle + 1;
        else high = middle;
    }
    return low;
}

// How many of `count` sorted keys are at a value of at most d: as floats, so that 0 and -0 are equal.
__device__ int values_up_to(const uint64_t* keys, int count, float d) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (value_of(keys[middle]) <= d) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Keys (distance + shift, index) of all candidates of a kind, sorted; the counters are 0. Returns how many.
__device__ int gather(const Row& row, int kind, float shift, uint64_t* keys, int* counts) {
    if (threadIdx.x == 0) counts[0] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < row.p.candidates; j += kThreads)
        if (row.kind(j) == kind) keys[atomicAdd(counts, 1)] = make_key(__fadd_rn(row.distance(j), shift), j);
    __syncthreads();
    const int count = counts[0];
    int size = 1;
    while (size < count) size *= 2;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
        counts[i] = 0;
        if (i >= count) keys[i] = kNone;
    }
    __syncthreads();
    sort_block(keys, size);
    return count;
}

// counts[i] becomes the sum of counts[0 .. i].
__device__ void running_sum(int* counts, int size) {
    int added[kMostSorted / kThreads];
    for (int apart = 1; apart < size; apart *= 2) {
        for (int k = 0; k < kMostSorted / kThreads; ++k) {
            const int i = k * kThreads + static_cast<int>(threadIdx.x);
            added[k] = i < size && i >= apart ? counts[i - apart] : 0;
        }
        __syncthreads();
        for (int k = 0; k < kMostSorted / kThreads; ++k) {
            const int i = k * kThreads + static_cast<int>(threadIdx.x);
            if (i < size) counts[i] += added[k];
        }
        __syncthreads();
    }
}

// Of a kind the key (distance, index) that is least, or (-distance, index); kNone where there is none.
__device__ uint64_t extreme(const Row& row, int kind, bool farthest, uint64_t* scratch) {
    uint64_t best = kNone;
    for (int64_t j = threadIdx.x; j < row.p.candidates; j += kThreads)
        if (row.kind(j) == kind) {
            const uint64_t key = make_key(farthest ? -row.distance(j) : row.distance(j), j);
            best = key < best ? key : best;
        }
    __syncthreads();
    scratch[threadIdx.x] = best;
    __syncthreads();
    for (int half = kThreads / 2; half; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half && scratch[threadIdx.x + half] < scratch[threadIdx.x])
            scratch[threadIdx.x] = scratch[threadIdx.x + half];
        __syncthreads();
    }
    best = scratch[0];
    __syncthreads();
    return best;
}

// Sum over the block of one double a thread, in a fixed order; `scratch` holds kThreads.
__device__ double sum_block(double mine, double* scratch) {
    __syncthreads();
    scratch[threadIdx.x] = mine;
    __syncthreads();
    for (int half = kThreads / 2; half; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    const double sum = scratch[0];
    __syncthreads();
    return sum;
}

// Ends a row: weight(j, kind, distance, triplets) is the weight of a distance, and adds the triplets it stands for.
// What that reads of shared memory may be where `scratch` is.
template <class Weight>
__device__ void finish(const Row& row, double* scratch, const Weight& weight) {
    double loss = 0, sum = 0, open = 0, triplets = 0;
    for (int64_t j = threadIdx.x; j < row.p.candidates; j += kThreads) {
        const int kind = row.kind(j);
        const float d = row.distance(j), w = weight(j, kind, d, triplets);
        loss += static_cast<double>(w) * static_cast<double>(d);
        open += w > 0 ? w : 0;
        if (row.p.wants_e) {
            const float e = row.e(d, w);
            row.values[j] = e;
            sum += e;
        }
    }
    loss = sum_block(loss, scratch);
    sum = sum_block(sum, scratch);
    open = sum_block(open, scratch);
    triplets = sum_block(triplets, scratch);
    if (threadIdx.x != 0) return;
    row.p.losses[row.row] = loss;
    row.p.triplets[row.row] = static_cast<int64_t>(triplets);
    row.p.open[row.row] = static_cast<int64_t>(open);
    if (row.p.wants_e) row.p.row_sums[row.row] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kThreads) all_kernel(const TripletRows params, int most) {
    uint64_t* const keys = reinterpret_cast<uint64_t*>(shared_memory());
    int* const counts = reinterpret_cast<int*>(keys + most);
    const Row row(params, blockIdx.x);
    row.prepare();
    const int positives = gather(row, 1, params.margin, keys, counts);
    for (int64_t j = threadIdx.x; j < params.candidates; j += kThreads)
        if (row.kind(j) == 0) {
            const int rank = values_up_to(keys, positives, row.distance(j));
            if (rank < positives) atomicAdd(counts + rank, 1);
        }
    __syncthreads();
    running_sum(counts, positives);
    finish(row, reinterpret_cast<double*>(keys), [&](int64_t j, int kind, float d, double& triplets) {
        if (kind == 1)
            return static_cast<float>(counts[keys_below(keys, positives, make_key(__fadd_rn(d, params.margin), j))]);
        if (kind != 0) return 0.0f;
        triplets += positives;
        return static_cast<float>(values_up_to(keys, positives, d) - positives);
    });
}

__global__ void __launch_bounds__(kThreads) semihard_kernel(const TripletRows params, int most) {
    uint64_t* const keys = reinterpret_cast<uint64_t*>(shared_memory());
    int* const counts = reinterpret_cast<int*>(keys + most);
    const Row row(params, blockIdx.x);
    row.prepare();
    const int negatives = gather(row, 0, 0, keys, counts);
    const auto open = [&](int next, float d) {
        return next < negatives && value_of(keys[next]) < __fadd_rn(d, params.margin);
    };
    for (int64_t j = threadIdx.x; j < params.candidates; j += kThreads)
        if (row.kind(j) == 1) {
            const int next = values_up_to(keys, negatives, row.distance(j));
            if (open(next, row.distance(j))) atomicAdd(counts + next, 1);
        }
    __syncthreads();
    finish(row, reinterpret_cast<double*>(keys), [&](int64_t j, int kind, float d, double& triplets) {
        if (kind == 0) return -static_cast<float>(counts[keys_below(keys, negatives, make_key(d, j))]);
        if (kind != 1) return 0.0f;
        const int next = values_up_to(keys, negatives, d);
        triplets += next < negatives;
        return open(next, d) ? 1.0f : 0.0f;
    });
}

__global__ void __launch_bounds__(kThreads) hardest_kernel(const TripletRows params) {
    uint64_t* const scratch = reinterpret_cast<uint64_t*>(shared_memory());
    const bool one = params.mining == kHard;
    const Row row(params, blockIdx.x);
    row.prepare();
    const uint64_t nearest = extreme(row, 0, false, scratch), farthest = extreme(row, 1, true, scratch);
    const float least = value_of(nearest);
    // whether positive j is in a triplet, and whether that is open
    const auto taken = [&](int64_t j) { return nearest != kNone && (!one || j == index_of(farthest)); };
    const auto open = [&](float d) { return least < __fadd_rn(d, params.margin); };
    double mine = 0;
    for (int64_t j = threadIdx.x; j < params.candidates; j += kThreads)
        if (row.kind(j) == 1 && taken(j)) mine += open(row.distance(j));
    const double all = sum_block(mine, reinterpret_cast<double*>(scratch));
    finish(row, reinterpret_cast<double*>(scratch), [&](int64_t j, int kind, float d, double& triplets) {
        if (kind == 0) return nearest != kNone && j == index_of(nearest) ? -static_cast<float>(all) : 0.0f;
        if (kind != 1 || !taken(j)) return 0.0f;
        triplets += 1;
        return open(d) ? 1.0f : 0.0f;
    });
}

}  // namespace

const char* triplet_weigh(const Queue& queue, const TripletRows& rows) {
    if (rows.candidates > kMostSorted) return "too many candidates";
    if (rows.mining == kHard || rows.mining == kHardNegative)
        return launch(hardest_kernel, queue, rows.rows, kThreads, kThreads * static_cast<int>(sizeof(double)), rows);
    int most = kThreads;
    while (most < rows.candidates) most *= 2;
    const int bytes = most * static_cast<int>(sizeof(uint64_t) + sizeof(int));
    return launch(rows.mining == kAll ? all_kernel : semihard_kernel, queue, rows.rows, kThreads, bytes, rows, most);
}

}  // namespace cmr::cuda
