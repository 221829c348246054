// The host side of the CUDA kernels, for module.cpp: no CUDA header, no libtorch.
//
// Every function queues work on `queue` and returns at once: nullptr, or what the launch failed with. Nothing is
// allocated and nothing is waited for, so any sequence of calls can be captured in a CUDA graph. All addresses are
// device memory that the caller owns.
#pragma once

#include <cstdint>

namespace cmr::cuda {

struct Queue {
    int device;
    uintptr_t stream;
};

// Queries (num_queries, nbytes) against a database (n, nbytes), in `ranges` runs of `range_steps` steps of kStep codes.
struct HammingScan {
    const uint8_t* queries;
    const uint8_t* database;
    int64_t num_queries, n;
    int nbytes;
    int unit;  // bytes of one load, 8, 4 or 1: divides nbytes and both addresses
    int64_t ranges, range_steps;
    int64_t stride;  // looks at every stride-th step of the database: 1 is all of it, more is a sample
};

constexpr int kStep = 256;
constexpr int kGroup = 16;        // queries that a warp compares with the codes it has loaded, popc kernels
constexpr int kTensorGroup = 32;  // the same, tensor-core kernels

enum class Form { popc, b1, int8 };

// Top-k, first half: for every (query, range) the codes that can be among the k nearest, in index order, at most
// `capacity` keys (distance << 48 | index) each: keys (num_queries, ranges, capacity), counts (num_queries, ranges).
// A code is looked at where its distance is below limits[query]; limits hold 8 * nbytes + 1 or less.
// capacity is at least k + kStep, or at least the codes of a range.
const char* hamming_lists(const Queue& queue, const HammingScan& scan, Form form, int64_t k, int64_t capacity,
                          const int* limits, uint64_t* keys, int* counts);

// Top-k, second half: a stable counting sort of a query's lists. Writes the first k to distances and indices, rows of
// row_stride; or, where `limits` is given, one more than the k-th distance there (unchanged where there are fewer).
const char* hamming_merge(const Queue& queue, int64_t num_queries, int64_t ranges, int nbytes, int64_t k,
                          int64_t capacity, const uint64_t* keys, const int* counts, int* limits, int* distances,
                          int64_t* indices, int64_t row_stride);

// Histograms per (query, range): items (num_queries, ranges, 8 * nbytes + 1), and, where labels are given, of the
// relevant ones: relevant, of the same shape. Relevant is what shares a label bit with the query, or has its class.
struct Labels {
    const uint8_t* queries;  // rows of `bytes`; none where bytes is 0
    const uint8_t* database;
    int bytes;
    bool classes;  // rows are one int32
};
const char* hamming_histogram(const Queue& queue, const HammingScan& scan, const Labels& labels, int* items,
                              int* relevant);

// Top-k for any k, after a histogram: first_places (num_queries, ranges, 8 * nbytes + 1) says where the first code of
// a range at a distance goes in its query's row. Distances of limits[query] or more are left out.
const char* hamming_place(const Queue& queue, const HammingScan& scan, int64_t k, const int* limits,
                          const int64_t* first_places, int* distances, int64_t* indices, int64_t row_stride);

// Range search: counts (num_queries, ranges), then, after a running sum over them, the hits in index order.
const char* hamming_range_count(const Queue& queue, const HammingScan& scan, int radius, int64_t* counts);
const char* hamming_range_fill(const Queue& queue, const HammingScan& scan, int radius, const int64_t* offsets,
                               int* distances, int64_t* indices);

// distances (num_queries, n)
const char* hamming_table(const Queue& queue, const HammingScan& scan, int* distances);

// xor, popcount and addition of 32-bit words alone, 8 * rounds for each of 256 * blocks threads: what a benchmark calls
// the limit. out (256 * blocks,).
const char* hamming_arithmetic(const Queue& queue, int64_t blocks, int rounds, int* out);

// A block of anchors of a triplet loss: inner products with all candidates in, the weight of each distance in the loss
// over that distance out, in place (csrc/cpu/triplet_kernel.h). At most 4096 candidates.
struct TripletRows {
    int64_t rows, candidates, words;  // words of a row of packed labels; 1 for class ids
    bool classes;
    float margin;
    int mining, distance;  // all, hard, hard_negative, semihard; euclidean, squared, dot
    bool wants_e;
    int64_t self;  // the candidate that is row 0's own item; -1: anchors are no candidates
    float* block;  // (rows, candidates)
    const float *x_squares, *y_squares;
    const float *x, *y;  // (rows, width), (candidates, width)
    int64_t width;
    bool exact;                          // every distance from differences: no products come in
    const int64_t *x_labels, *y_labels;  // (rows, words), (words, candidates)
    double* losses;                      // (rows,)
    int64_t *triplets, *open;            // (rows,)
    float* row_sums;                     // (rows,) of the block, where wants_e
};
const char* triplet_weigh(const Queue& queue, const TripletRows& rows);

// A step of a projected gradient attack, in place, and the noise that it starts from (csrc/cpu/pgd_kernel.h). A value
// holds for every (sample, channel); a stride of 0 repeats it.
struct PgdValue {
    const float* at;
    int64_t per_sample, per_channel;
};
struct PgdStep {
    int64_t samples, channels, inner;  // x is (samples, channels, inner)
    float* x;
    const float *gradient, *origin;
    PgdValue alpha, eps, low, high;
    int* broken;  // (samples,), or null: `step` is written where it is negative and a gradient is not finite
    int step;
    bool l2;
};
struct PgdNoise {
    uint64_t seed;
    const int64_t* index;  // (samples,)
    int64_t samples, count;
    float* out;  // (samples, count) in (-1, 1)
};
int64_t pgd_workspace(int64_t samples, int64_t elements);  // bytes that an L2 step needs for samples of so many
const char* pgd_step(const Queue& queue, const PgdStep& step, void* workspace);
const char* pgd_noise(const Queue& queue, const PgdNoise& noise);

// Entropic transport problems by Sinkhorn's iterations or, where `proximal`, by IPOT (sinkhorn.cu).
struct TransportProblems {
    int64_t problems, m, n;
    double inverse;  // 1 / reg, or 1 / beta
    int64_t max_iter;
    double tol;  // below it a problem is done; 0: never
    int stop;    // marginals, potentials
    bool proximal;
    int64_t inner;                 // IPOT's inner iterations
    const float *cost, *mu, *nu;   // (problems, m, n); (problems, m) and (problems, n), or one row for all
    int64_t mu_stride, nu_stride;  // 0: one row
    float* plan;                   // (problems, m, n)
    int32_t* iterations;           // (problems,)
    float* errors;                 // (problems,) sum_i |sum_j plan_ij - mu_i|
};
constexpr int64_t kMostTransported = 2048;  // m + n: what a problem keeps for each is in shared memory
const char* sinkhorn(const Queue& queue, const TransportProblems& problems);

// Why no device can be used (an error's name), or nullptr.
const char* device_problem();

// The kernel that was queued last: "popc", "b1", "int8", "histogram", "place", "range", "table", "linf", "l2" or
// "noise".
const char* last_kernel();
void set_last_kernel(const char* name);

}  // namespace cmr::cuda
