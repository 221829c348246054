// Top-k without a table of distances: a list of candidates per (query, range), then one stable counting sort a query.
//
// Lists    A warp keeps the keys (distance << 48 | index) of the codes below the query's limit, in index order. Once a
//          list holds too many, the k nearest by (distance, index) stay and the limit becomes the distance of the k-th:
//          later codes have higher indices, so only nearer ones can still matter. A list never overflows and never
//          drops one of the k nearest of its range, whatever the order of the database and however many ties it has.
// Limits   Start from the k-th distance in a sample of the database where it is large: that bounds the k-th distance
//          in all of it, and few codes are below it. It changes what is looked at, never what is found.
// Sort     Distances have 8 * nbytes + 1 values: count, running sum, place. Lists are read in the order of the ranges.
#pragma once

#include "hamming_scan.cuh"

namespace cmr::cuda {

constexpr int kIndexBits = 48;

__device__ inline uint64_t make_key(int distance, int64_t index) {
    return static_cast<uint64_t>(distance) << kIndexBits | static_cast<uint64_t>(index);
}
__device__ inline int key_distance(uint64_t key) { return static_cast<int>(key >> kIndexBits); }
__device__ inline int64_t key_index(uint64_t key) {
    return static_cast<int64_t>(key & ((uint64_t{1} << kIndexBits) - 1));
}

struct ListParams {
    int64_t k, capacity;
    const int* limits;
    uint64_t* keys;
    int* counts;
};

__device__ inline int count_up_to(const uint64_t* keys, int count, int distance) {
    int mine = 0;
    for (int i = lane_id(); i < count; i += 32) mine += key_distance(keys[i]) <= distance;
    return __reduce_add_sync(kFullWarp, mine);
}

struct ListState {
    int count, limit;
};

// Keeps the k nearest of a list, still in index order, and lowers the limit to the distance of the k-th. The whole warp
// calls it with the same arguments; nothing changes where there are k keys or fewer. Rare, so kept out of line.
__device__ __noinline__ static ListState compact(uint64_t* keys, int count, int limit, int64_t k) {
    __syncwarp();
    if (count <= k) return {count, limit};
    int cut = 0, most = limit - 1;  // cut: the smallest distance that k keys are within
    while (cut < most) {
        const int middle = (cut + most) / 2;
        if (count_up_to(keys, count, middle) >= k) most = middle;
        else cut = middle + 1;
    }
    int at_cut = static_cast<int>(k) - count_up_to(keys, count, cut - 1), kept = 0;
    for (int first = 0; first < count; first += 32) {
        const int i = first + lane_id();
        const uint64_t key = i < count ? keys[i] : ~uint64_t{0};
        const bool tied = key_distance(key) == cut;
        const unsigned ties = __ballot_sync(kFullWarp, tied);
        const bool keep = key_distance(key) < cut || (tied && __popc(ties & lanes_below()) < at_cut);
        const unsigned kept_lanes = __ballot_sync(kFullWarp, keep);
        if (keep) keys[kept + __popc(kept_lanes & lanes_below())] = key;  // never past what every lane has read
        at_cut -= __popc(ties);
        kept += __popc(kept_lanes);
    }
    __syncwarp();
    return {kept, cut};
}

struct ListSink {
    using Params = ListParams;
    __host__ static int64_t bytes_per_query(int, const Params&) { return 2 * sizeof(int); }

    const Params& p;
    const HammingScan& s;
    const WarpTask& task;
    int *limits, *counts;  // (group,)

    __device__ ListSink(const Params& p, const HammingScan& s, const WarpTask& task, int* state, int group)
        : p(p), s(s), task(task), limits(state), counts(state + group) {
        for (int i = lane_id(); i < task.queries; i += 32) {
            limits[i] = p.limits[task.first_query + i];
            counts[i] = 0;
        }
    }

    __device__ void visit(const Distances& d, int first, int queries, int64_t base) {
        if (!any_below(d, limits + first, queries)) return;
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            if (i >= queries) continue;
            uint64_t* const keys = p.keys + task.slot(s, first + i) * p.capacity;
            ListState list{counts[first + i], limits[first + i]};
#pragma unroll
            for (int r = 0; r < kCodes; ++r) {
                const bool near = d[i][r] < list.limit;
                const unsigned who = __ballot_sync(kFullWarp, near);
                if (near) keys[list.count + __popc(who & lanes_below())] = make_key(d[i][r], base + 32 * r + lane_id());
                list.count += __popc(who);
            }
            if (list.count > p.capacity - kStep) list = compact(keys, list.count, list.limit, p.k);
            __syncwarp();
            if (lane_id() == 0) {
                counts[first + i] = list.count;
                limits[first + i] = list.limit;
            }
            __syncwarp();
        }
    }

    __device__ void finish() {
        __syncwarp();
        for (int i = lane_id(); i < task.queries; i += 32) p.counts[task.slot(s, i)] = counts[i];
    }
};

struct MergeParams {
    int64_t ranges, k, capacity;
    int bins;  // 8 * nbytes + 1
    const uint64_t* keys;
    const int* counts;
    int* limits;
    int* distances;
    int64_t* indices;
    int64_t row_stride;
};

// Calls use(key, there) for the keys of lists [first, last) in order, 32 at a time and by the whole warp.
template <class Use>
__device__ void walk_lists(const uint64_t* keys, const int* counts, int64_t capacity, int64_t first, int64_t last,
                           const Use& use) {
    for (int64_t some = first; some < last; some += 32) {
        int before = some + lane_id() < last ? counts[some + lane_id()] : 0;  // keys in lists up to this lane's
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kFullWarp, before, step);
            if (lane_id() >= step) before += other;
        }
        const int all = __shfl_sync(kFullWarp, before, 31);
        for (int start = 0; start < all; start += 32) {
            const int at = start + lane_id();
            int list = 0;  // how many of the 32 lists end at or before `at`
            for (int step = 16; step; step /= 2)
                if (__shfl_sync(kFullWarp, before, list + step - 1) <= at) list += step;
            const int skipped = __shfl_sync(kFullWarp, before, list ? list - 1 : 0);
            const bool there = at < all;
            use(there ? keys[(some + list) * capacity + at - (list ? skipped : 0)] : 0, there);
        }
    }
}

// One block per query, each warp a run of its lists.
__global__ void __launch_bounds__(1024) merge_kernel(const __grid_constant__ MergeParams p) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = lane_id();
    const int64_t query = blockIdx.x;
    const uint64_t* const keys = p.keys + query * p.ranges * p.capacity;
    const int* const counts = p.counts + query * p.ranges;
    const int64_t first = p.ranges * warp / warps, last = p.ranges * (warp + 1) / warps;
    int* const starts = reinterpret_cast<int*>(shared_memory());  // (bins,)
    int* const mine = starts + (warp + 1) * p.bins;               // (warps, bins)

    for (int i = threadIdx.x; i < warps * p.bins; i += blockDim.x) starts[p.bins + i] = 0;
    __syncthreads();
    walk_lists(keys, counts, p.capacity, first, last, [&](uint64_t key, bool there) {
        if (there) atomicAdd(mine + key_distance(key), 1);
    });
    __syncthreads();
    // counts -> where a warp's first key of a distance goes among those of the distance
    for (int bin = threadIdx.x; bin < p.bins; bin += blockDim.x) {
        int sum = 0;
        for (int w = 1; w <= warps; ++w) {
            const int count = starts[w * p.bins + bin];
            starts[w * p.bins + bin] = sum;
            sum += count;
        }
        starts[bin] = sum;
    }
    __syncthreads();
    // counts of a distance -> keys nearer than it; and, if asked, one more than the k-th distance
    if (warp == 0) {
        int64_t nearer = 0;
        for (int some = 0; some < p.bins; some += 32) {
            const int bin = some + lane, count = bin < p.bins ? starts[bin] : 0;
            int sum = count;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kFullWarp, sum, step);
                if (lane >= step) sum += other;
            }
            const int64_t start = nearer + sum - count;
            if (bin < p.bins) starts[bin] = static_cast<int>(start < p.k ? start : p.k);
            if (p.limits && start < p.k && start + count >= p.k) p.limits[query] = bin + 1;
            nearer += __shfl_sync(kFullWarp, sum, 31);
        }
    }
    if (p.limits) return;
    __syncthreads();
    walk_lists(keys, counts, p.capacity, first, last, [&](uint64_t key, bool there) {
        const int d = there ? key_distance(key) : -1;
        const unsigned peers = __match_any_sync(kFullWarp, d);
        const int rank = __popc(peers & lanes_below());
        if (there) {
            const int64_t at = int64_t{starts[d]} + mine[d] + rank;
            if (at < p.k) {
                p.distances[query * p.row_stride + at] = d;
                p.indices[query * p.row_stride + at] = key_index(key);
            }
        }
        __syncwarp();
        if (there && rank == 0) mine[d] += __popc(peers);
        __syncwarp();
    });
}

}  // namespace cmr::cuda
