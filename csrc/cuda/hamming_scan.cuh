// Exact packed-bit Hamming search: the scan by xor and popcount.
//
// Maths    d(a, b) = sum over words of popcount(a_w ^ b_w), from 0 to 8 * nbytes.
// Work     A warp compares a group of queries (in shared memory) with one run of the database. Both are split, so that
//          one query fills the device as well as a thousand do. A step is kStep codes, eight to a lane, lane after
//          lane, so loads are coalesced; kQueries x kCodes distances are in registers at a time and never leave them:
//          a sink looks at them and keeps what it needs. Warps of a block share the run and differ in the queries
//          where there are enough of these, so the codes come from the first-level cache.
// Bound    Popcounts: 16 words of 32 bits a cycle and multiprocessor, against 64 other integer operations. A pair of
//          64-bit codes is two popcounts, two xors, an addition and a comparison, so popcount is the limit from about
//          four queries on; below that it is the database's bytes over the memory's bandwidth.
// Order    Codes are visited in index order within a warp and every append takes its place from a ballot, so what a
//          warp keeps is in index order and the same in every run.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace cmr::cuda {

constexpr int kWarps = 8;    // warps of a block, at most
constexpr int kQueries = 4;  // queries whose distances are in registers at a time
constexpr int kCodes = kStep / 32;
constexpr int kFar = 1 << 20;  // the distance of a code behind the end

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many queries a warp takes and how many warps share a block, so that their shared memory fits.
struct WarpShape {
    int group, warps, bytes;  // bytes: of one warp

    WarpShape(int least, int most, int64_t bytes_per_query) {
        const int64_t fit = kSharedBytes / kWarps / bytes_per_query;
        group = static_cast<int>(fit < least ? least : fit < most ? fit : most);
        bytes = static_cast<int>(ceil_div(group * bytes_per_query, 16) * 16);
        warps = kSharedBytes / bytes < kWarps ? kSharedBytes / bytes : kWarps;
    }
};

// The part of a search that one warp does.
struct WarpTask {
    int64_t first_query, range;
    int queries;
    int64_t first_step, last_step;  // [first, last), in steps that are looked at
    bool any;

    __device__ WarpTask(const HammingScan& s, const WarpShape& shape) {
        const int64_t task = int64_t{blockIdx.x} * shape.warps + threadIdx.x / 32;
        const int64_t groups = ceil_div(s.num_queries, shape.group);
        any = task < groups * s.ranges;
        range = task / groups;
        first_query = task % groups * shape.group;
        const int64_t left = s.num_queries - first_query, steps = ceil_div(ceil_div(s.n, kStep), s.stride);
        queries = static_cast<int>(left < shape.group ? left : shape.group);
        first_step = range * s.range_steps;
        last_step = first_step + s.range_steps < steps ? first_step + s.range_steps : steps;
    }

    // where a (query, range) has its slot in arrays (num_queries, ranges)
    __device__ int64_t slot(const HammingScan& s, int query) const { return (first_query + query) * s.ranges + range; }
};

// Rows of nbytes as words: 64 bits where rows and addresses allow it, else 32, put together from bytes if need be.
template <int kUnit>
struct Rows {
    using Word = std::conditional_t<kUnit == 8, uint64_t, uint32_t>;

    __host__ __device__ static int words(int nbytes) {
        return (nbytes + static_cast<int>(sizeof(Word)) - 1) / static_cast<int>(sizeof(Word));
    }

    __device__ static Word load(const uint8_t* row, int word, int nbytes) {
        if constexpr (kUnit == sizeof(Word)) {
            return __ldg(reinterpret_cast<const Word*>(row) + word);
        } else {
            Word value = 0;
#pragma unroll
            for (int b = 0; b < 4; ++b)
                if (4 * word + b < nbytes) value |= Word{__ldg(row + 4 * word + b)} << (8 * b);
            return value;
        }
    }
};

__device__ inline int popcount(uint32_t x) { return __popc(x); }
__device__ inline int popcount(uint64_t x) { return __popcll(x); }

// A sink has Params, bytes_per_query(nbytes, params) of shared memory, and in each warp one object, which sees
// visit(d, first, queries, base): d[i][r] is the distance of the group's query first + i, i < queries, to code
// base + 32 r + lane, or kFar where there is none.
template <int kUnit, class Sink>
__global__ void __launch_bounds__(32 * kWarps, 2)
    scan_kernel(const __grid_constant__ HammingScan s, const __grid_constant__ WarpShape shape,
                const __grid_constant__ typename Sink::Params params) {
    using Word = typename Rows<kUnit>::Word;
    const WarpTask task(s, shape);
    if (!task.any) return;
    const int words = Rows<kUnit>::words(s.nbytes), lane = lane_id();
    unsigned char* const memory = shared_memory() + threadIdx.x / 32 * shape.bytes;
    Word* const queries = reinterpret_cast<Word*>(memory);  // (shape.group, words)
    for (int i = lane; i < task.queries * words; i += 32)
        queries[i] = Rows<kUnit>::load(s.queries + (task.first_query + i / words) * s.nbytes, i % words, s.nbytes);
    Sink sink(params, s, task, reinterpret_cast<int*>(queries + shape.group * words), shape.group);
    __syncwarp();

    for (int64_t step = task.first_step; step < task.last_step; ++step) {
        const int64_t base = step * s.stride * kStep;
        const int left = static_cast<int>(s.n - base < kStep ? s.n - base : kStep);
        const uint8_t* const codes = s.database + base * s.nbytes;
        int row[kCodes];  // byte offsets; those behind the end read the last code
#pragma unroll
        for (int r = 0; r < kCodes; ++r) {
            const int code = 32 * r + lane;
            row[r] = (code < left ? code : left - 1) * s.nbytes;
        }
        for (int first = 0; first < task.queries; first += kQueries) {
            const int some = task.queries - first < kQueries ? task.queries - first : kQueries;
            int d[kQueries][kCodes] = {};
            for (int w = 0; w < words; ++w) {
                Word code[kCodes];
#pragma unroll
                for (int r = 0; r < kCodes; ++r) code[r] = Rows<kUnit>::load(codes + row[r], w, s.nbytes);
#pragma unroll
                for (int i = 0; i < kQueries; ++i) {
                    if (i < some) {
                        const Word query = queries[(first + i) * words + w];
#pragma unroll
                        for (int r = 0; r < kCodes; ++r) d[i][r] += popcount(query ^ code[r]);
                    }
                }
            }
            if (left < kStep) {
#pragma unroll
                for (int r = 0; r < kCodes; ++r)
                    if (32 * r + lane >= left)
#pragma unroll
                        for (int i = 0; i < kQueries; ++i) d[i][r] = kFar;
            }
            sink.visit(d, first, some, base);
        }
    }
    sink.finish();
}

using Distances = int[kQueries][kCodes];

// Whether any lane has a distance below its query's limit.
__device__ inline bool any_below(const Distances& d, const int* limits, int queries) {
    bool near = false;
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
        if (i < queries)
#pragma unroll
            for (int r = 0; r < kCodes; ++r) near |= d[i][r] < limits[i];
    return __any_sync(kFullWarp, near);
}

struct TableSink {
    struct Params {
        int* distances;
    };
    __host__ static int64_t bytes_per_query(int, const Params&) { return 0; }

    int* out;
    int64_t n;

    __device__ TableSink(const Params& p, const HammingScan& s, const WarpTask& task, int*, int)
        : out(p.distances + task.first_query * s.n), n(s.n) {}

    __device__ void visit(const Distances& d, int first, int queries, int64_t base) {
#pragma unroll
        for (int i = 0; i < kQueries; ++i)
            if (i < queries)
#pragma unroll
                for (int r = 0; r < kCodes; ++r)
                    if (d[i][r] != kFar) out[(first + i) * n + base + 32 * r + lane_id()] = d[i][r];
    }
    __device__ void finish() {}
};

struct RangeCountSink {
    struct Params {
        int radius;
        int64_t* counts;
    };
    __host__ static int64_t bytes_per_query(int, const Params&) { return sizeof(int); }

    const Params& p;
    const HammingScan& s;
    const WarpTask& task;
    int* found;  // (group,); a range has fewer than 2^31 codes

    __device__ RangeCountSink(const Params& p, const HammingScan& s, const WarpTask& task, int* state, int)
        : p(p), s(s), task(task), found(state) {
        for (int i = lane_id(); i < task.queries; i += 32) found[i] = 0;
    }

    __device__ void visit(const Distances& d, int first, int queries, int64_t) {
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            int mine = 0;
#pragma unroll
            for (int r = 0; r < kCodes; ++r) mine += d[i][r] <= p.radius;
            if (i < queries) {
                const int all = __reduce_add_sync(kFullWarp, mine);
                if (lane_id() == 0) found[first + i] += all;
            }
        }
    }

    __device__ void finish() {
        __syncwarp();
        for (int i = lane_id(); i < task.queries; i += 32) p.counts[task.slot(s, i)] = found[i];
    }
};

struct RangeFillSink {
    struct Params {
        int radius;
        const int64_t* offsets;
        int* distances;
        int64_t* indices;
    };
    __host__ static int64_t bytes_per_query(int, const Params&) { return 2 * sizeof(int); }

    const Params& p;
    const HammingScan& s;
    const WarpTask& task;
    int *found, *limits;  // (group,)

    __device__ RangeFillSink(const Params& p, const HammingScan& s, const WarpTask& task, int* state, int group)
        : p(p), s(s), task(task), found(state), limits(state + group) {
        for (int i = lane_id(); i < task.queries; i += 32) {
            found[i] = 0;
            limits[i] = p.radius + 1;
        }
    }

    __device__ void visit(const Distances& d, int first, int queries, int64_t base) {
        if (!any_below(d, limits + first, queries)) return;
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            if (i < queries) {
                int64_t place = p.offsets[task.slot(s, first + i)] + found[first + i];
                int all = 0;
#pragma unroll
                for (int r = 0; r < kCodes; ++r) {
                    const bool near = d[i][r] <= p.radius;
                    const unsigned who = __ballot_sync(kFullWarp, near);
                    if (near) {
                        const int64_t at = place + all + __popc(who & lanes_below());
                        p.distances[at] = d[i][r];
                        p.indices[at] = base + 32 * r + lane_id();
                    }
                    all += __popc(who);
                }
                __syncwarp();
                if (lane_id() == 0) found[first + i] += all;
                __syncwarp();
            }
        }
    }
    __device__ void finish() {}
};

struct HistogramSink {
    struct Params {
        Labels labels;
        int *items, *relevant;
    };
    __host__ static int64_t bytes_per_query(int nbytes, const Params& p) {
        return (8 * nbytes + 1) * static_cast<int64_t>(sizeof(int)) * (p.labels.bytes ? 2 : 1);
    }

    const Params& p;
    const HammingScan& s;
    const WarpTask& task;
    const int bins;
    int *items, *relevant;  // (group, bins)

    __device__ HistogramSink(const Params& p, const HammingScan& s, const WarpTask& task, int* state, int group)
        : p(p), s(s), task(task), bins(8 * s.nbytes + 1), items(state), relevant(state + group * bins) {
        for (int i = lane_id(); i < (p.labels.bytes ? 2 : 1) * group * bins; i += 32) state[i] = 0;
    }

    __device__ bool is_relevant(const uint8_t* query, const uint8_t* item) const {
        if (p.labels.classes)
            return __ldg(reinterpret_cast<const int*>(query)) == __ldg(reinterpret_cast<const int*>(item));
        int shared = 0;
#pragma unroll 1
        for (int b = 0; b < p.labels.bytes; ++b) shared |= __ldg(query + b) & __ldg(item + b);
        return shared != 0;
    }

    __device__ void visit(const Distances& d, int first, int queries, int64_t base) {
#pragma unroll
        for (int r = 0; r < kCodes; ++r) {
            if (d[0][r] == kFar) continue;
            const uint8_t* const labels = p.labels.database + (base + 32 * r + lane_id()) * p.labels.bytes;
#pragma unroll
            for (int i = 0; i < kQueries; ++i) {
                if (i >= queries) continue;
                const int bin = (first + i) * bins + d[i][r];
                atomicAdd(items + bin, 1);
                const uint8_t* const query = p.labels.queries + (task.first_query + first + i) * p.labels.bytes;
                if (p.labels.bytes && is_relevant(query, labels)) atomicAdd(relevant + bin, 1);
            }
        }
    }

    __device__ void finish() {
        __syncwarp();
        for (int i = 0; i < task.queries; ++i)
            for (int bin = lane_id(); bin < bins; bin += 32) {
                p.items[task.slot(s, i) * bins + bin] = items[i * bins + bin];
                if (p.labels.bytes) p.relevant[task.slot(s, i) * bins + bin] = relevant[i * bins + bin];
            }
    }
};

struct PlaceSink {
    struct Params {
        int64_t k;
        const int* limits;
        const int64_t* first_places;
        int* distances;
        int64_t* indices;
        int64_t row_stride;
    };
    __host__ static int64_t bytes_per_query(int nbytes, const Params&) {
        return (8 * nbytes + 2) * static_cast<int64_t>(sizeof(int));
    }

    const Params& p;
    const HammingScan& s;
    const WarpTask& task;
    const int bins;
    int *limits, *placed;  // (group,), (group, bins)

    __device__ PlaceSink(const Params& p, const HammingScan& s, const WarpTask& task, int* state, int group)
        : p(p), s(s), task(task), bins(8 * s.nbytes + 1), limits(state), placed(state + group) {
        for (int i = lane_id(); i < task.queries; i += 32) limits[i] = p.limits[task.first_query + i];
        for (int i = lane_id(); i < group * bins; i += 32) placed[i] = 0;
    }

    __device__ void visit(const Distances& d, int first, int queries, int64_t base) {
        if (!any_below(d, limits + first, queries)) return;
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            if (i >= queries) continue;
            const int64_t query = task.first_query + first + i;
            const int64_t* const places = p.first_places + task.slot(s, first + i) * bins;
            int* const mine = placed + (first + i) * bins;
#pragma unroll
            for (int r = 0; r < kCodes; ++r) {
                const bool near = d[i][r] < limits[first + i];
                const unsigned peers = __match_any_sync(kFullWarp, near ? d[i][r] : -1);
                const int rank = __popc(peers & lanes_below());
                if (near) {
                    const int64_t at = places[d[i][r]] + mine[d[i][r]] + rank;
                    if (at < p.k) {
                        p.distances[query * p.row_stride + at] = d[i][r];
                        p.indices[query * p.row_stride + at] = base + 32 * r + lane_id();
                    }
                }
                __syncwarp();
                if (near && rank == 0) mine[d[i][r]] += __popc(peers);
                __syncwarp();
            }
        }
    }
    __device__ void finish() {}
};

template <int kUnit, class Sink>
const char* launch_scan_unit(const Queue& queue, const HammingScan& s, const typename Sink::Params& params) {
    using Word = typename Rows<kUnit>::Word;
    const int64_t row = Rows<kUnit>::words(s.nbytes) * static_cast<int64_t>(sizeof(Word));
    const WarpShape shape(1, kGroup, row + Sink::bytes_per_query(s.nbytes, params));
    const int64_t tasks = ceil_div(s.num_queries, shape.group) * s.ranges;
    return launch(scan_kernel<kUnit, Sink>, queue, ceil_div(tasks, shape.warps), 32 * shape.warps,
                  shape.warps * shape.bytes, s, shape, params);
}

template <class Sink>
const char* launch_scan(const Queue& queue, const HammingScan& s, const typename Sink::Params& params) {
    if (s.unit == 8) return launch_scan_unit<8, Sink>(queue, s, params);
    if (s.unit == 4) return launch_scan_unit<4, Sink>(queue, s, params);
    return launch_scan_unit<1, Sink>(queue, s, params);
}

}  // namespace cmr::cuda
