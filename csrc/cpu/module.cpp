// cmr_fast._cpu: raw pointers and sizes in, nothing returned that Python must free. The callers in cmr_fast/ops check
// every argument and own every byte, workspace included; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "hamming.h"
#include "isa.h"
#include "ranking.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

cmr::RankingShape ranking_shape(int64_t nq, int64_t n, int64_t nbytes, int64_t label_bytes, bool classes, bool ordered,
                                bool curves, int64_t k, int cut, int threads) {
    return {nq, n, nbytes, label_bytes, classes, ordered, curves, k, static_cast<cmr::Cut>(cut), threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Native CPU kernels of cmr_fast.";
    m.def("available_isas", &cmr::available_isas, "Instruction sets of this build and processor, best first.");
    m.def("last_isa", &cmr::hamming_last_isa, "The instruction set whose kernel ran last.");

    m.def("reset_last_isa", [] { cmr::hamming_set_last_isa("none"); }, "Forget it, so that a test sees what runs next.");

    m.def("hamming_topk_workspace", [](const std::string&, int64_t nq, int64_t n, int64_t nbytes, int64_t k, int threads) {
        return cmr::hamming_topk_workspace({nq, n, nbytes, k, threads});
    });
    m.def("hamming_topk", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes, int64_t k,
                             int threads, Address distances, Address indices, Address workspace) {
        py::gil_scoped_release released;
        cmr::hamming_topk(isa, at<uint8_t>(q), at<uint8_t>(db), {nq, n, nbytes, k, threads}, at<int32_t>(distances),
                          at<int64_t>(indices), at<uint8_t>(workspace));
    });
    m.def("hamming_range_splits", [](int64_t nq, int64_t n, int64_t nbytes, int64_t radius, int threads) {
        return cmr::hamming_range_splits({nq, n, nbytes, radius, threads});
    });
    m.def("hamming_range_workspace",
          [](const std::string&, int64_t nq, int64_t n, int64_t nbytes, int64_t radius, int threads) {
              return cmr::hamming_range_workspace({nq, n, nbytes, radius, threads});
          });
    m.def("hamming_range_count", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes,
                                    int64_t radius, int threads, Address offsets, Address workspace) {
        py::gil_scoped_release released;
        cmr::hamming_range_count(isa, at<uint8_t>(q), at<uint8_t>(db), {nq, n, nbytes, radius, threads},
                                 at<int64_t>(offsets), at<uint8_t>(workspace));
    });
    m.def("hamming_range_fill", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes,
                                   int64_t radius, int threads, Address offsets, Address distances, Address indices,
                                   Address workspace) {
        py::gil_scoped_release released;
        cmr::hamming_range_fill(isa, at<uint8_t>(q), at<uint8_t>(db), {nq, n, nbytes, radius, threads},
                                at<int64_t>(offsets), at<int32_t>(distances), at<int64_t>(indices),
                                at<uint8_t>(workspace));
    });
    m.def(
        "hamming_arithmetic",
        [](const std::string& isa, int64_t nbytes, int64_t rounds) {
            py::gil_scoped_release released;
            return cmr::hamming_arithmetic(isa, nbytes, rounds);
        },
        "xor, popcount and add alone on cached codes; returns the number of pairs. The limit that bench/ compares with.");
    m.def("hamming_distances", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes,
                                  int threads, Address out) {
        py::gil_scoped_release released;
        cmr::hamming_distances(isa, at<uint8_t>(q), at<uint8_t>(db), nq, n, nbytes, threads, at<int32_t>(out));
    });
    m.def("ranking_workspace", [](int64_t nq, int64_t n, int64_t nbytes, int64_t label_bytes, bool classes, bool ordered,
                                  bool curves, int64_t k, int cut, int threads) {
        return cmr::ranking_workspace(
            ranking_shape(nq, n, nbytes, label_bytes, classes, ordered, curves, k, cut, threads));
    });
    m.def("ranking", [](const std::string& isa, int64_t nq, int64_t n, int64_t nbytes, int64_t label_bytes, bool classes,
                        bool ordered, bool curves, int64_t k, int cut, int threads, Address q, Address db,
                        Address q_labels, Address db_labels, Address partners, Address items, Address relevant,
                        Address sums, Address hits, Address first, Address tied_before, Address hit_steps,
                        Address recall_steps, Address workspace) {
        py::gil_scoped_release released;
        cmr::ranking(isa, ranking_shape(nq, n, nbytes, label_bytes, classes, ordered, curves, k, cut, threads),
                     {at<uint8_t>(q), at<uint8_t>(db), at<uint8_t>(q_labels), at<uint8_t>(db_labels),
                      at<int64_t>(partners), at<int64_t>(items), at<int64_t>(relevant), at<double>(sums),
                      at<int64_t>(hits), at<int64_t>(first), at<int64_t>(tied_before), at<int64_t>(hit_steps),
                      at<double>(recall_steps)},
                     at<uint8_t>(workspace));
    });
}
