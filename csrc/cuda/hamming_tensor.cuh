// Candidate lists by tensor cores: d(a, b) = |a| + |b| - 2 |a & b|, and |a & b| is a product of 0/1 vectors.
//
// Layout   A warp multiplies 32 queries (two tiles of 16 rows) by 64 codes (eight tiles of 8 columns; four for int8) at
//          a time, 128 bits by 128 bits. Lane 4 g + t holds word t of row g (and of row g + 8) and of column g: packed
//          codes are in the order that the b1 instruction wants, 16 contiguous bytes a code. The int8 form spreads the
//          same words in registers: byte j of part s is bit 8 j + s of the word, the same permutation on both sides.
// Result   Lane 4 g + t has columns 2 t and 2 t + 1 of rows g and g + 8. The four lanes of a row append its candidates
//          in index order, places from ballots; eight rows at once.
// Bound    Two integer operations a pair in the test against the limit, five for int8 at 128 bits; see the header of
//          hamming_scan.cuh for what popcounts cost. b1 multiplies by `and` because processors after 8.x have no `xor`
//          form of their own; from 10.0 on `and` is emulated too, and int8 is the portable one.
#pragma once

#include "hamming_topk.cuh"

namespace cmr::cuda {

constexpr int kRowTiles = kTensorGroup / 16;

// c (16 x 8) += a (16 x 128 bits) and b (128 bits x 8), counted
__device__ inline void multiply_b1(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
#else
    emulated::multiply_b1(c, a0, a1, b);
#endif
}

// c (16 x 8) += a (16 x 32) b (32 x 8), signed bytes
__device__ inline void multiply_int8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    emulated::multiply_int8(c, a0, a1, a2, a3, b0, b1);
#endif
}

__device__ inline void spread(uint32_t word, uint32_t (&parts)[8]) {
#pragma unroll
    for (int s = 0; s < 8; ++s) parts[s] = word >> s & 0x01010101u;
}

// Words of a row in shared memory: whole chunks of four, and an odd number of chunks, so that rows fall in other banks.
__host__ __device__ constexpr int padded_words(int nbytes) {
    const int chunks = static_cast<int>(ceil_div(nbytes, 16));
    return 4 * (chunks % 2 ? chunks : chunks + 1);
}

template <bool kInt8>
__global__ void __launch_bounds__(32 * kWarps, 2)
    tensor_kernel(const __grid_constant__ HammingScan s, const __grid_constant__ WarpShape shape,
                  const __grid_constant__ ListParams p) {
    constexpr int kColumnTiles = kInt8 ? 4 : 8, kBlock = 8 * kColumnTiles;
    const WarpTask task(s, shape);
    if (!task.any) return;
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const int words = s.nbytes / 4, padded = padded_words(s.nbytes);
    const unsigned row_lanes = 0xfu << (lane & ~3), before = row_lanes & lanes_below();
    uint32_t* const queries = reinterpret_cast<uint32_t*>(shared_memory() + threadIdx.x / 32 * shape.bytes);
    int* const limits = reinterpret_cast<int*>(queries + kTensorGroup * padded);  // (kTensorGroup,) each
    int* const counts = limits + kTensorGroup;
    int* const sizes = counts + kTensorGroup;  // bits set in a query

    for (int i = lane; i < kTensorGroup * padded; i += 32) {
        const int row = i / padded, word = i % padded;
        const uint8_t* const code = s.queries + (task.first_query + row) * s.nbytes;
        const bool there = row < task.queries && word < words;
        queries[i] = there ? __ldg(reinterpret_cast<const uint32_t*>(code) + word) : 0;
    }
    __syncwarp();
    {
        int size = 0;
        for (int w = 0; w < words; ++w) size += __popc(queries[lane * padded + w]);
        sizes[lane] = size;
        counts[lane] = 0;
        limits[lane] = lane < task.queries ? p.limits[task.first_query + lane] : 0;  // 0: nothing is below it
    }
    __syncwarp();
    int limit[kRowTiles][2], size[kRowTiles][2];  // of rows g and g + 8 of each tile
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            limit[m][h] = limits[16 * m + 8 * h + g];
            size[m][h] = sizes[16 * m + 8 * h + g];
        }

    for (int64_t block = task.first_step * (kStep / kBlock); block < task.last_step * (kStep / kBlock); ++block) {
        const int64_t base = block / (kStep / kBlock) * s.stride * kStep + block % (kStep / kBlock) * kBlock;
        if (base >= s.n) break;
        const int left = static_cast<int>(s.n - base < kBlock ? s.n - base : kBlock);
        const uint8_t* const codes = s.database + base * s.nbytes;
        int both[kRowTiles][kColumnTiles][4] = {}, code_size[kColumnTiles] = {};
        for (int chunk = 0; 4 * chunk < words; ++chunk) {
            uint32_t code[kColumnTiles];
#pragma unroll
            for (int c = 0; c < kColumnTiles; ++c) {
                const int row = 8 * c + g < left ? 8 * c + g : left - 1;
                code[c] = 4 * chunk + t < words
                              ? __ldg(reinterpret_cast<const uint32_t*>(codes + row * s.nbytes) + 4 * chunk + t)
                              : 0;
            }
            uint32_t query[kRowTiles][2];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) query[m][h] = queries[(16 * m + 8 * h + g) * padded + 4 * chunk + t];
#pragma unroll
            for (int c = 0; c < kColumnTiles; ++c) code_size[c] += __popc(code[c]);
            if constexpr (kInt8) {
                uint32_t a[kRowTiles][2][8];
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) spread(query[m][h], a[m][h]);
#pragma unroll
                for (int c = 0; c < kColumnTiles; ++c) {
                    uint32_t b[8];
                    spread(code[c], b);
#pragma unroll
                    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                        for (int q = 0; q < 8; q += 2)
                            multiply_int8(both[m][c], a[m][0][q], a[m][1][q], a[m][0][q + 1], a[m][1][q + 1], b[q],
                                          b[q + 1]);
                }
            } else {
#pragma unroll
                for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
                    for (int m = 0; m < kRowTiles; ++m) multiply_b1(both[m][c], query[m][0], query[m][1], code[c]);
            }
        }

        int column_size[kColumnTiles][2];  // bits set in codes 2 t and 2 t + 1 of each tile
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
            int sum = code_size[c];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                column_size[c][j] = __shfl_sync(kFullWarp, sum, 4 * (2 * t + j));
                if (8 * c + 2 * t + j >= left) column_size[c][j] = kFar;
            }
        }
        bool near = false;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        near |= column_size[c][j] - 2 * both[m][c][2 * h + j] < limit[m][h] - size[m][h];
        if (!__any_sync(kFullWarp, near)) continue;

#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 16 * m + 8 * h + g;
                uint64_t* const keys = p.keys + task.slot(s, row < task.queries ? row : 0) * p.capacity;
                int count = counts[row];
#pragma unroll
                for (int c = 0; c < kColumnTiles; ++c) {
                    const int d0 = size[m][h] + column_size[c][0] - 2 * both[m][c][2 * h];
                    const int d1 = size[m][h] + column_size[c][1] - 2 * both[m][c][2 * h + 1];
                    const bool near0 = d0 < limit[m][h], near1 = d1 < limit[m][h];
                    const unsigned who0 = __ballot_sync(kFullWarp, near0), who1 = __ballot_sync(kFullWarp, near1);
                    const int at = count + __popc(who0 & before) + __popc(who1 & before);
                    const int64_t index = base + 8 * c + 2 * t;
                    if (near0) keys[at] = make_key(d0, index);
                    if (near1) keys[at + near0] = make_key(d1, index + 1);
                    count += __popc(who0 & row_lanes) + __popc(who1 & row_lanes);
                }
                if (t == 0) counts[row] = count;
                __syncwarp();
                unsigned full = __ballot_sync(kFullWarp, t == 0 && count > p.capacity - kStep);
                while (full) {
                    const int r = 16 * m + 8 * h + (__ffs(full) - 1) / 4;
                    const ListState list = compact(p.keys + task.slot(s, r) * p.capacity, counts[r], limits[r], p.k);
                    if (lane == 0) {
                        counts[r] = list.count;
                        limits[r] = list.limit;
                    }
                    full &= full - 1;
                }
                __syncwarp();
                limit[m][h] = limits[row];
            }
        }
    }
    __syncwarp();
    if (lane < task.queries) p.counts[task.slot(s, lane)] = counts[lane];
}

inline const char* launch_tensor(const Queue& queue, const HammingScan& s, bool int8, const ListParams& params) {
    const int64_t row = padded_words(s.nbytes) * int64_t{4} + 3 * static_cast<int64_t>(sizeof(int));
    const WarpShape shape(kTensorGroup, kTensorGroup, row);
    const int64_t tasks = ceil_div(s.num_queries, shape.group) * s.ranges;
    return launch(int8 ? tensor_kernel<true> : tensor_kernel<false>, queue, ceil_div(tasks, shape.warps),
                  32 * shape.warps, shape.warps * shape.bytes, s, shape, params);
}

}  // namespace cmr::cuda
