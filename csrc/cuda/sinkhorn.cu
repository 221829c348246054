// Sinkhorn's iterations and IPOT on the GPU: all problems in one launch, each stopped by itself. The maths is that of
// csrc/cpu/sinkhorn_kernel.h.
//
// Scaling    T = u K v with K = exp(a_i + b_j - p C_ij): an iteration is u = mu / K v, v = nu / K^T u. Where it takes
//            u or v out of [1e-12, 1e12] it is thrown away and made in logarithms, and K is made anew with u = v = 1:
//            what K loses to underflow (below 1e-38) is below 1e-14 of a plan, whatever reg is. The first K has row
//            maxima of mu, those of a step of IPOT too, which makes K anew from its potentials instead of multiplying
//            by exp(-C / beta).
// Exponents  a, b and their differences with p C in double, so C / reg may be in the thousands; exponentials and sums
//            of them in float32.
// Layout     One block of threads a problem, about 8 entries a thread. a, b, u and v are in shared memory, 24 bytes a
//            row or column at most; K is there too where the device has room for it, else it is where the plan goes,
//            read through the second-level cache. The cost is read where K is made, and by steps in logarithms.
// Threads    K v: 1 to 32 lanes a row, so that the rows take about one turn; K's stride is an odd multiple of the
//            lanes, so that a warp's rows are in different banks. K^T u: a thread a column, in groups that share the
//            rows and are added up in order. Nothing depends on the order of threads.
// Bound      two loads of K and two of u or v an entry and iteration, all from shared memory; with few or small
//            problems the three barriers of an iteration. Not measured on a GPU yet.
#include "launch.cuh"

namespace cmr::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr float kFar = 1e12f;      // how far scalings may go
enum { kMarginals, kPotentials };  // TransportProblems::stop

struct Layout {
    int threads;
    int lanes;          // that share a row of K v
    int width, groups;  // of K^T u: columns at once, threads that share one
    int stride;         // of K
    bool shared_kernel;
    int bytes;  // of shared memory
};

__device__ float warp_sum(float x) {
    for (int apart = 16; apart; apart /= 2) x += __shfl_xor_sync(kFullWarp, x, apart);
    return x;
}
__device__ float warp_most(float x) {
    for (int apart = 16; apart; apart /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, apart));
    return x;
}
__device__ inline bool is_far(float x) { return !(x < kFar && x > 1 / kFar); }

template <bool kSharedKernel>
struct Transport {
    const TransportProblems& p;
    const Layout& layout;
    const int m, n, tid, warp, warps, lane;
    const float *const cost, *const mu, *const nu;
    float* const plan;
    double *const a, *const b, *const before;
    float *u, *u_next, *v, *v_next;
    float *const partial, *const sums, *const kernel;
    double power = 0;  // p

    __device__ Transport(const TransportProblems& problems, const Layout& given)
        : p(problems),
          layout(given),
          m(static_cast<int>(p.m)),
          n(static_cast<int>(p.n)),
          tid(threadIdx.x),
          warp(tid / 32),
          warps(layout.threads / 32),
          lane(lane_id()),
          cost(p.cost + int64_t{blockIdx.x} * m * n),
          mu(p.mu + blockIdx.x * p.mu_stride),
          nu(p.nu + blockIdx.x * p.nu_stride),
          plan(p.plan + int64_t{blockIdx.x} * m * n),
          a(reinterpret_cast<double*>(shared_memory())),
          b(a + m),
          before(b + n),
          u(reinterpret_cast<float*>(before + n)),
          u_next(u + m),
          v(u_next + m),
          v_next(v + n),
          partial(v_next + n),
          sums(partial + layout.threads),
          kernel(kSharedKernel ? sums + 32 : plan) {}

    // after a barrier; the next sum comes after another
    __device__ float block_total() const {
        float total = 0;
        for (int w = 0; w < warps; ++w) total += sums[w];
        return total;
    }
    __device__ float block_sum(float x) {
        x = warp_sum(x);
        __syncthreads();
        if (lane == 0) sums[warp] = x;
        __syncthreads();
        return block_total();
    }

    __device__ double exponent(int i, int j) const { return b[j] - power * cost[i * n + j]; }

    // Row i of K = exp(a_i + b_j - p C_ij), by a warp, which leaves u = 1.
    __device__ void make_row(int i, double mine) {
        for (int j = lane; j < n; j += 32)
            kernel[i * layout.stride + j] = expf(static_cast<float>(mine + exponent(i, j)));
        if (lane == 0) u[i] = 1;
    }

    __device__ void make_kernel() {
        for (int i = warp; i < m; i += warps) make_row(i, a[i]);
        for (int j = tid; j < n; j += layout.threads) v[j] = 1;
        __syncthreads();
    }

    // The same with the a that makes mu_i the most of row i.
    __device__ void make_first_kernel() {
        for (int i = warp; i < m; i += warps) {
            float most = -INFINITY;
            for (int j = lane; j < n; j += 32) most = fmaxf(most, static_cast<float>(exponent(i, j)));
            most = warp_most(most);
            const double mine = mu[i] == 0 || most == -INFINITY ? -INFINITY : log(static_cast<double>(mu[i])) - most;
            if (lane == 0) a[i] = mine;
            make_row(i, mine);
        }
        for (int j = tid; j < n; j += layout.threads) v[j] = 1;
        __syncthreads();
    }

    // u_next and v_next; whether none of them is far from 1. `change` is what a problem is stopped by: a and b were 0
    // before the first step, not what K is made of.
    __device__ bool scaled(bool first, float& change) {
        bool far = false;
        float moved = 0;
        const int k = tid % layout.lanes, together = layout.threads / layout.lanes;
        for (int start = 0; start < m; start += together) {
            const int i = start + tid / layout.lanes;
            float sum = 0;
            if (i < m) {
                const float* const row = kernel + i * layout.stride;
#pragma unroll 4
                for (int j = k; j < n; j += layout.lanes) sum = fmaf(row[j], v[j], sum);
            }
            for (int apart = layout.lanes / 2; apart; apart /= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
            if (i >= m || k != 0) continue;
            const float mass = mu[i], scaling = mass == 0 ? 0 : mass / sum;
            u_next[i] = scaling;
            if (mass == 0) continue;
            far |= is_far(scaling);
            if (p.tol == 0) continue;
            if (p.stop == kMarginals) moved += fabsf((first ? static_cast<float>(exp(-a[i])) : u[i]) * sum - mass);
            else moved += static_cast<float>(fabs(first ? a[i] + logf(scaling) : logf(scaling / u[i])) / p.inverse);
        }
        moved = warp_sum(moved);
        __syncthreads();  // of the sums before: all have read them
        if (lane == 0) sums[warp] = moved;
        const int column = tid % layout.width, group = tid / layout.width;
        for (int start = 0; start < n; start += layout.width) {
            const int j = start + column;
            if (start) __syncthreads();
            float sum = 0;
            if (j < n && group < layout.groups) {
#pragma unroll 8
                for (int i = group; i < m; i += layout.groups)
                    sum = fmaf(kernel[i * layout.stride + j], u_next[i], sum);
            }
            partial[tid] = sum;
            __syncthreads();
            if (group != 0 || j >= n) continue;
            for (int g = 1; g < layout.groups; ++g) sum += partial[g * layout.width + column];
            const float mass = nu[j], scaling = mass == 0 ? 0 : mass / sum;
            v_next[j] = scaling;
            far |= mass != 0 && is_far(scaling);
        }
        const bool within = !__syncthreads_or(far);
        if (within && p.tol > 0) change = block_total();
        return within;
    }

    __device__ void accept() {
        float* const was_u = u;
        u = u_next, u_next = was_u;
        float* const was_v = v;
        v = v_next, v_next = was_v;
    }

    __device__ void absorb() {
        for (int i = tid; i < m; i += layout.threads) a[i] += logf(u[i]);
        for (int j = tid; j < n; j += layout.threads) b[j] += logf(v[j]);
        __syncthreads();
    }

    // New a from b, new b from a; returns the change.
    __device__ float logarithmic() {
        float moved = 0;
        for (int i = warp; i < m; i += warps) {
            float most = -INFINITY, sum = 0;
            for (int j = lane; j < n; j += 32) most = fmaxf(most, static_cast<float>(exponent(i, j)));
            most = warp_most(most);
            if (mu[i] == 0 || most == -INFINITY) {
                if (lane == 0) a[i] = -INFINITY;
                continue;
            }
            for (int j = lane; j < n; j += 32) sum += expf(static_cast<float>(exponent(i, j) - most));
            sum = warp_sum(sum);
            if (lane != 0) continue;
            const double lse = most + log(static_cast<double>(sum)), mass = mu[i], was = a[i];
            a[i] = log(mass) - lse;
            moved +=
                static_cast<float>(p.stop == kMarginals ? fabs(exp(was + lse) - mass) : fabs(a[i] - was) / p.inverse);
        }
        const float change = block_sum(moved);
        const int column = tid % layout.width, group = tid / layout.width;
        for (int start = 0; start < n; start += layout.width) {
            const int j = start + column;
            const bool live = j < n && group < layout.groups;
            float most = -INFINITY, sum = 0;
            if (live)
                for (int i = group; i < m; i += layout.groups)
                    most = fmaxf(most, static_cast<float>(a[i] - power * cost[i * n + j]));
            partial[tid] = most;
            __syncthreads();
            if (live)
                for (int g = 0; g < layout.groups; ++g) most = fmaxf(most, partial[g * layout.width + column]);
            __syncthreads();
            if (live && most > -INFINITY)
                for (int i = group; i < m; i += layout.groups)
                    sum += expf(static_cast<float>((a[i] - power * cost[i * n + j]) - most));
            partial[tid] = sum;
            __syncthreads();
            if (live && group == 0) {
                for (int g = 1; g < layout.groups; ++g) sum += partial[g * layout.width + column];
                const bool nothing = nu[j] == 0 || most == -INFINITY;
                b[j] = nothing ? -INFINITY : log(static_cast<double>(nu[j])) - (most + log(static_cast<double>(sum)));
            }
            __syncthreads();
        }
        return change;
    }

    __device__ int sinkhorn() {
        power = p.inverse;
        make_first_kernel();
        float change = INFINITY;
        int done = 0;
        while (done < p.max_iter && !(change < p.tol)) {
            const bool first = done++ == 0;
            if (scaled(first, change)) {
                accept();
                continue;
            }
            absorb();
            if (first) {
                for (int i = tid; i < m; i += layout.threads) a[i] = 0;
                __syncthreads();
            }
            change = logarithmic();
            make_kernel();
        }
        return done;
    }

    // In step t the potentials start from 2 b - before, as T is multiplied by the scaling of the columns once more.
    __device__ int proximal() {
        for (int t = 1; t <= p.max_iter; ++t) {
            power = t * p.inverse;
            for (int j = tid; j < n; j += layout.threads) {
                const double next = nu[j] == 0 ? -INFINITY : 2 * b[j] - before[j];
                before[j] = b[j];
                b[j] = next;
            }
            __syncthreads();
            make_first_kernel();
            float change = 0;  // IPOT makes all of its steps
            bool within = true;
            for (int k = 0; k < p.inner && within; ++k) {
                within = scaled(false, change);
                if (within) accept();
            }
            if (within) {
                absorb();
                continue;
            }
            for (int k = 0; k < p.inner; ++k) logarithmic();
            if (t == p.max_iter) make_kernel();
        }
        return static_cast<int>(p.max_iter);
    }

    __device__ void solve() {
        for (int j = tid; j < n; j += layout.threads) b[j] = before[j] = nu[j] == 0 ? -INFINITY : 0;
        __syncthreads();
        const int done = p.proximal ? proximal() : sinkhorn();
        float apart = 0;
        for (int i = warp; i < m; i += warps) {
            float sum = 0;
            for (int j = lane; j < n; j += 32) {
                const float t = kernel[i * layout.stride + j] * u[i] * v[j];
                plan[i * n + j] = t;
                sum += t;
            }
            sum = warp_sum(sum);
            if (lane == 0) apart += fabsf(sum - mu[i]);
        }
        apart = block_sum(apart);
        if (tid != 0) return;
        p.iterations[blockIdx.x] = done;
        p.errors[blockIdx.x] = apart;
    }
};

template <bool kSharedKernel>
__global__ void __launch_bounds__(kMostThreads)
    transport_kernel(const TransportProblems problems, const Layout layout) {
    Transport<kSharedKernel>(problems, layout).solve();
}

Layout lay_out(int m, int n, int most_bytes) {
    Layout to{};
    to.threads = 32;
    while (to.threads < kMostThreads && to.threads * 8 < m * n) to.threads *= 2;
    to.lanes = 32;
    while (to.lanes > 1 && to.lanes * m > to.threads) to.lanes /= 2;
    to.width = n < to.threads ? (n + 31) / 32 * 32 : to.threads;
    to.groups = to.threads / to.width;
    to.stride = to.lanes == 32 ? n : to.lanes * ((n + to.lanes - 1) / to.lanes | 1);
    const auto size = [](int count, size_t each) { return count * static_cast<int>(each); };
    to.bytes = size(m + 2 * n, sizeof(double)) + size(2 * m + 2 * n + to.threads + 32, sizeof(float));
    const int kernel = size(m * to.stride, sizeof(float));
    to.shared_kernel = to.bytes + kernel <= most_bytes;
    if (to.shared_kernel) {
        to.bytes += kernel;
    } else {
        to.lanes = 32;  // rows are read from global memory: whole lines of them
        to.stride = n;
    }
    return to;
}

}  // namespace

const char* sinkhorn(const Queue& queue, const TransportProblems& problems) {
    if (problems.m + problems.n > kMostTransported) return "too many rows and columns";
    int most_bytes = 0;
    if (const char* error = most_shared_bytes(queue.device, most_bytes)) return error;
    const Layout layout = lay_out(static_cast<int>(problems.m), static_cast<int>(problems.n), most_bytes);
    return launch(layout.shared_kernel ? transport_kernel<true> : transport_kernel<false>, queue, problems.problems,
                  layout.threads, layout.bytes, problems, layout);
}

}  // namespace cmr::cuda
