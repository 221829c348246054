// cmr_fast._cuda: device addresses, sizes and a stream in; a launch that fails raises with the error's name. The
// callers in cmr_fast/ops check every argument and own every byte. Nothing here waits for the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

namespace py = pybind11;
using namespace cmr::cuda;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(const char* what, const char* error) {
    if (error) throw std::runtime_error(std::string(what) + ": launch failed with " + error);
}

}  // namespace

#ifndef CMR_CUDA_MODULE
#define CMR_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(CMR_CUDA_MODULE, m) {
    m.doc() = "CUDA kernels of cmr_fast.";
    m.attr("STEP") = kStep;
    m.attr("GROUP") = kGroup;
    m.attr("TENSOR_GROUP") = kTensorGroup;
    m.def("device_problem", &device_problem, "The CUDA runtime's error that keeps it from any device, or None.");
    m.def("last_kernel", &last_kernel, "The kernel that was queued last.");
    m.def("reset_last_kernel", [] { set_last_kernel("none"); }, "Forget it, so that a test sees what runs next.");

    py::class_<Queue>(m, "Queue", py::module_local())
        .def(py::init([](int device, Address stream) { return Queue{device, stream}; }), py::arg("device"),
             py::arg("stream"));
    py::class_<HammingScan>(m, "HammingScan", py::module_local())
        .def(py::init([](Address queries, Address database, int64_t num_queries, int64_t n, int nbytes, int unit,
                         int64_t ranges, int64_t range_steps, int64_t stride) {
                 return HammingScan{at<uint8_t>(queries),
                                    at<uint8_t>(database),
                                    num_queries,
                                    n,
                                    nbytes,
                                    unit,
                                    ranges,
                                    range_steps,
                                    stride};
             }),
             py::arg("queries"), py::arg("database"), py::arg("num_queries"), py::arg("n"), py::arg("nbytes"),
             py::arg("unit"), py::arg("ranges"), py::arg("range_steps"), py::arg("stride") = 1);

    m.def("hamming_lists", [](const Queue& queue, const HammingScan& scan, const std::string& form, int64_t k,
                              int64_t capacity, Address limits, Address keys, Address counts) {
        const Form which = form == "b1" ? Form::b1 : form == "int8" ? Form::int8 : Form::popc;
        check("hamming_lists",
              hamming_lists(queue, scan, which, k, capacity, at<int>(limits), at<uint64_t>(keys), at<int>(counts)));
    });
    m.def("hamming_merge",
          [](const Queue& queue, int64_t num_queries, int64_t ranges, int nbytes, int64_t k, int64_t capacity,
             Address keys, Address counts, Address limits, Address distances, Address indices, int64_t row_stride) {
              check("hamming_merge",
                    hamming_merge(queue, num_queries, ranges, nbytes, k, capacity, at<uint64_t>(keys), at<int>(counts),
                                  at<int>(limits), at<int>(distances), at<int64_t>(indices), row_stride));
          });
    m.def("hamming_histogram",
          [](const Queue& queue, const HammingScan& scan, Address query_labels, Address database_labels,
             int label_bytes, bool classes, Address items, Address relevant) {
              const Labels labels{at<uint8_t>(query_labels), at<uint8_t>(database_labels), label_bytes, classes};
              check("hamming_histogram", hamming_histogram(queue, scan, labels, at<int>(items), at<int>(relevant)));
          });
    m.def("hamming_place", [](const Queue& queue, const HammingScan& scan, int64_t k, Address limits,
                              Address first_places, Address distances, Address indices, int64_t row_stride) {
        check("hamming_place", hamming_place(queue, scan, k, at<int>(limits), at<int64_t>(first_places),
                                             at<int>(distances), at<int64_t>(indices), row_stride));
    });
    m.def("hamming_range_count", [](const Queue& queue, const HammingScan& scan, int radius, Address counts) {
        check("hamming_range_count", hamming_range_count(queue, scan, radius, at<int64_t>(counts)));
    });
    m.def("hamming_range_fill", [](const Queue& queue, const HammingScan& scan, int radius, Address offsets,
                                   Address distances, Address indices) {
        check("hamming_range_fill",
              hamming_range_fill(queue, scan, radius, at<int64_t>(offsets), at<int>(distances), at<int64_t>(indices)));
    });
    m.def("hamming_arithmetic", [](const Queue& queue, int64_t blocks, int rounds, Address out) {
        check("hamming_arithmetic", hamming_arithmetic(queue, blocks, rounds, at<int>(out)));
    });
    m.def("hamming_table", [](const Queue& queue, const HammingScan& scan, Address distances) {
        check("hamming_table", hamming_table(queue, scan, at<int>(distances)));
    });

    // points: (x, squared norms of x, y, those of y, width, whether distances come from differences alone)
    using Points = std::tuple<Address, Address, Address, Address, int64_t, bool>;
    m.def("triplet_weigh",
          [](const Queue& queue, int64_t rows, int64_t candidates, int64_t words, bool classes, float margin,
             int mining, int distance, bool wants_e, int64_t self, Address block, const Points& points,
             Address x_labels, Address y_labels, Address losses, Address triplets, Address open, Address row_sums) {
              const auto& [x, x_squares, y, y_squares, width, exact] = points;
              check("triplet_weigh", triplet_weigh(queue, {rows,
                                                           candidates,
                                                           words,
                                                           classes,
                                                           margin,
                                                           mining,
                                                           distance,
                                                           wants_e,
                                                           self,
                                                           at<float>(block),
                                                           at<float>(x_squares),
                                                           at<float>(y_squares),
                                                           at<float>(x),
                                                           at<float>(y),
                                                           width,
                                                           exact,
                                                           at<int64_t>(x_labels),
                                                           at<int64_t>(y_labels),
                                                           at<double>(losses),
                                                           at<int64_t>(triplets),
                                                           at<int64_t>(open),
                                                           at<float>(row_sums)}));
          });

    m.def("pgd_workspace", &pgd_workspace, "Bytes that an L2 step of samples of so many elements needs.");
    // values: (address, per_sample, per_channel) of alpha, eps, low and high
    m.def("pgd_step", [](const Queue& queue, int64_t samples, int64_t channels, int64_t inner, Address x,
                         Address gradient, Address origin, const std::array<std::array<int64_t, 3>, 4>& values,
                         Address broken, int step, bool l2, Address workspace) {
        const auto value = [&](int i) {
            return PgdValue{at<const float>(static_cast<Address>(values[i][0])), values[i][1], values[i][2]};
        };
        check("pgd_step",
              pgd_step(queue,
                       {samples, channels, inner, at<float>(x), at<const float>(gradient), at<const float>(origin),
                        value(0), value(1), value(2), value(3), at<int>(broken), step, l2},
                       at<void>(workspace)));
    });
    m.def("pgd_noise",
          [](const Queue& queue, uint64_t seed, Address index, int64_t samples, int64_t count, Address out) {
              check("pgd_noise", pgd_noise(queue, {seed, at<const int64_t>(index), samples, count, at<float>(out)}));
          });

    m.attr("MOST_TRANSPORTED") = kMostTransported;
    m.def("sinkhorn",
          [](const Queue& queue, int64_t problems, int64_t rows, int64_t columns, double inverse, int64_t max_iter,
             double tol, int stop, bool proximal, int64_t inner, Address cost, Address mu, int64_t mu_stride,
             Address nu, int64_t nu_stride, Address plan, Address iterations, Address errors) {
              check("sinkhorn", sinkhorn(queue, {problems, rows, columns, inverse, max_iter, tol, stop, proximal, inner,
                                                 at<float>(cost), at<float>(mu), at<float>(nu), mu_stride, nu_stride,
                                                 at<float>(plan), at<int32_t>(iterations), at<float>(errors)}));
          });
}
