// Many small entropic transport problems at once, by Sinkhorn's iterations or the proximal ones (IPOT).
// See sinkhorn_kernel.h for the maths, the layout and the bound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace cmr {

enum class Stop : int { marginals = 0, potentials = 1 };

struct SinkhornShape {
    int64_t problems, m, n;
    double inverse;    // 1 / reg, or 1 / beta
    int64_t max_iter;  // 1 or more
    double tol;        // below it a problem is done; 0: never
    Stop stop;
    bool proximal;  // IPOT
    int64_t inner;  // its inner iterations
    int threads;

    int64_t rows() const { return (m + 3) / 4 * 4; }
    int64_t slots() const { return (m + 15) / 16 * 16; }  // the widest vector
    int64_t stride() const { return (n + 15) / 16 * 16; }
};

// All memory belongs to the caller.
struct SinkhornData {
    const float* cost;             // (problems, m, n), finite
    const float *mu, *nu;          // (problems, m) and (problems, n), or one row for all: not negative
    int64_t mu_stride, nu_stride;  // 0: one row
    float* plan;                   // (problems, m, n)
    int32_t* iterations;           // (problems,)
    float* errors;                 // (problems,) sum_i |sum_j plan_ij - mu_i|
};

namespace {  // each kernel file has its own

// What one problem is worked in.
struct SinkhornScratch {
    float *kernel, *step;                                                       // (rows, stride); step: IPOT's
    float *u, *u_next, *mu, *sums, *u_product, *u_logs;                         // slots each
    float *v, *v_next, *nu, *columns, *x, *most, *v_product, *v_logs, *v_made;  // stride each
    double *a, *a_next;                                                         // slots each
    double *b, *b_next, *before, *from;                                         // stride each

    // Lays all of it out from `base` on, an address that 64 divides; returns how many bytes it takes.
    int64_t lay_out(const SinkhornShape& s, uintptr_t base) {
        uintptr_t at = base;
        const auto take = [&at](auto*& p, int64_t count) {
            p = reinterpret_cast<std::decay_t<decltype(p)>>(at);
            at += (static_cast<uintptr_t>(count) * sizeof *p + 63) / 64 * 64;
        };
        take(kernel, s.rows() * s.stride());
        step = nullptr;
        if (s.proximal) take(step, s.rows() * s.stride());
        for (float** p : {&u, &u_next, &mu, &sums, &u_product, &u_logs}) take(*p, s.slots());
        for (float** p : {&v, &v_next, &nu, &columns, &x, &most, &v_product, &v_logs, &v_made}) take(*p, s.stride());
        for (double** p : {&a, &a_next}) take(*p, s.slots());
        for (double** p : {&b, &b_next, &before, &from}) take(*p, s.stride());
        return static_cast<int64_t>(at - base);
    }
};

}  // namespace

struct SinkhornKernel {
    void (*solve)(const SinkhornShape&, const SinkhornData&, int64_t problem, uint8_t* scratch);
};

extern const SinkhornKernel sinkhorn_portable;
#if defined(__x86_64__)
extern const SinkhornKernel sinkhorn_avx2;
extern const SinkhornKernel sinkhorn_avx512;
#endif

size_t sinkhorn_scratch(const SinkhornShape&);  // of one slot, in bytes
size_t sinkhorn_workspace(const SinkhornShape&);
void sinkhorn(const std::string& isa, const SinkhornShape&, const SinkhornData&, uint8_t* workspace);

}  // namespace cmr
