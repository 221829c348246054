// cmr_fast._cpu: raw pointers and sizes in, nothing returned that Python must free. The callers in cmr_fast/ops check
// every argument and own every byte, workspace included (but of hamming_topk_of_arrays); the GIL is released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "hamming.h"
#include "info_nce.h"
#include "isa.h"
#include "multi_index.h"
#include "pairwise.h"
#include "pgd.h"
#include "ranking.h"
#include "triplet.h"
#include "sinkhorn.h"

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
    m.def("last_isa", &cmr::last_isa, "The instruction set whose kernel ran last.");

    m.def(
        "environment",
        [](const char* name) -> py::object {
            const char* value = std::getenv(name);
            return value ? py::cast(std::string(value)) : py::none();
        },
        "os.environ.get(name), which takes longer than a small search where the name is not set.");
    m.def(
        "forced",
        [] {
            for (const char* name : {"CMR_FAST_BACKEND", "CMR_FAST_ISA", "CMR_FAST_THREADS"}) {
                const char* value = std::getenv(name);
                if (value && *value) return true;
            }
            return false;
        },
        "Whether the environment chooses a backend, instruction set or number of threads.");
    m.def("reset_last_isa", [] { cmr::set_last_isa("none"); }, "Forget it, so that a test sees what runs next.");

    m.def("hamming_topk_workspace",
          [](const std::string&, int64_t nq, int64_t n, int64_t nbytes, int64_t k, int threads) {
              return cmr::hamming_topk_workspace({nq, n, nbytes, k, threads});
          });
    m.def("hamming_topk", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes,
                             int64_t k, int threads, Address distances, Address indices, Address workspace) {
        py::gil_scoped_release released;
        cmr::hamming_topk(isa, at<uint8_t>(q), at<uint8_t>(db), {nq, n, nbytes, k, threads}, at<int32_t>(distances),
                          at<int64_t>(indices), at<uint8_t>(workspace));
    });
    // A small search takes less time than asking numpy for addresses and a workspace, so this one does it by itself.
    m.def("hamming_topk_of_arrays", [](const std::string& isa, const py::array& q, const py::array& db, int64_t k,
                                       int threads, py::array& distances, py::array& indices) {
        const int64_t nbytes = db.shape(1);
        const cmr::HammingShape shape{q.size() / nbytes, db.shape(0), nbytes, k, threads};
        const auto* queries = static_cast<const uint8_t*>(q.data());
        const auto* codes = static_cast<const uint8_t*>(db.data());
        auto* near = static_cast<int32_t*>(distances.mutable_data());
        auto* places = static_cast<int64_t*>(indices.mutable_data());
        py::gil_scoped_release released;
        const std::unique_ptr<uint8_t[]> workspace(new uint8_t[cmr::hamming_topk_workspace(shape)]);
        cmr::hamming_topk(isa, queries, codes, shape, near, places, workspace.get());
    });
    m.def("hamming_range_splits", [](int64_t nq, int64_t n, int64_t nbytes, int64_t radius, int threads) {
        return cmr::hamming_range_splits({nq, n, nbytes, radius, threads});
    });
    m.def("hamming_range_workspace",
          [](const std::string&, int64_t nq, int64_t n, int64_t nbytes, int64_t radius, int threads) {
              return cmr::hamming_range_workspace({nq, n, nbytes, radius, threads});
          });
    m.def("hamming_range_count", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n,
                                    int64_t nbytes, int64_t radius, int threads, Address offsets, Address workspace) {
        py::gil_scoped_release released;
        cmr::hamming_range_count(isa, at<uint8_t>(q), at<uint8_t>(db), {nq, n, nbytes, radius, threads},
                                 at<int64_t>(offsets), at<uint8_t>(workspace));
    });
    m.def("hamming_range_fill",
          [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes, int64_t radius,
             int threads, Address offsets, Address distances, Address indices, Address workspace) {
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
        "xor, popcount and add alone on cached codes; returns the number of pairs. The limit that bench/ compares "
        "with.");
    m.def("hamming_distances", [](const std::string& isa, Address q, Address db, int64_t nq, int64_t n, int64_t nbytes,
                                  int threads, Address out) {
        py::gil_scoped_release released;
        cmr::hamming_distances(isa, at<uint8_t>(q), at<uint8_t>(db), nq, n, nbytes, threads, at<int32_t>(out));
    });
    m.def("ranking_workspace", [](int64_t nq, int64_t n, int64_t nbytes, int64_t label_bytes, bool classes,
                                  bool ordered, bool curves, int64_t k, int cut, int threads) {
        return cmr::ranking_workspace(
            ranking_shape(nq, n, nbytes, label_bytes, classes, ordered, curves, k, cut, threads));
    });
    m.def("ranking",
          [](const std::string& isa, int64_t nq, int64_t n, int64_t nbytes, int64_t label_bytes, bool classes,
             bool ordered, bool curves, int64_t k, int cut, int threads, Address q, Address db, Address q_labels,
             Address db_labels, Address partners, Address items, Address relevant, Address sums, Address hits,
             Address first, Address tied_before, Address hit_steps, Address recall_steps, Address workspace) {
              py::gil_scoped_release released;
              cmr::ranking(isa, ranking_shape(nq, n, nbytes, label_bytes, classes, ordered, curves, k, cut, threads),
                           {at<uint8_t>(q), at<uint8_t>(db), at<uint8_t>(q_labels), at<uint8_t>(db_labels),
                            at<int64_t>(partners), at<int64_t>(items), at<int64_t>(relevant), at<double>(sums),
                            at<int64_t>(hits), at<int64_t>(first), at<int64_t>(tied_before), at<int64_t>(hit_steps),
                            at<double>(recall_steps)},
                           at<uint8_t>(workspace));
          });

    m.attr("multi_index_entry_bytes") = cmr::kEntryBytes;
    m.def("multi_index_order", [](Address codes, int64_t n, int64_t nbytes, int bits, int key_bits, int threads,
                                  Address offsets, Address entries, Address order, Address sorted) {
        py::gil_scoped_release released;
        cmr::multi_index_order(at<uint8_t>(codes), n, nbytes, bits, key_bits, threads, at<uint32_t>(offsets),
                               at<uint8_t>(entries), at<uint32_t>(order), at<uint8_t>(sorted));
    });
    m.def("multi_index_groups", [](int64_t n, int64_t nbytes, Address sorted, Address starts) {
        py::gil_scoped_release released;
        return cmr::multi_index_groups(n, nbytes, at<uint8_t>(sorted), at<uint32_t>(starts));
    });
    m.def("multi_index_table", [](Address sorted, int64_t num_groups, int64_t nbytes, int bits, int first, int key_bits,
                                  int threads, Address offsets, Address entries, Address groups, Address words) {
        py::gil_scoped_release released;
        cmr::multi_index_table(at<uint8_t>(sorted), num_groups, nbytes, bits, first, key_bits, threads,
                               at<uint32_t>(offsets), at<uint8_t>(entries), at<uint32_t>(groups), at<uint64_t>(words));
    });
    m.def("multi_index_scan_cost", &cmr::multi_index_scan_cost);
    m.def("multi_index_costs", &cmr::multi_index_costs,
          "Of a query, a look-up, a bucket, a word of it and a word let through.");

    m.def("multi_index_workspace", &cmr::multi_index_workspace);
    // tables: (first bit, bits, offsets, groups or 0, words or 0) each
    m.def("multi_index_search", [](const std::string& isa, int64_t n, int64_t nbytes, int bits, Address order,
                                   Address starts, Address different, const std::vector<std::array<Address, 5>>& tables,
                                   Address q, int64_t nq, int64_t k, int threads, double effort, Address distances,
                                   Address indices, Address done, Address cost, Address workspace) {
        py::gil_scoped_release released;
        std::vector<cmr::SubstringTable> each;
        for (const auto& t : tables)
            each.push_back({static_cast<int>(t[0]), static_cast<int>(t[1]), at<uint32_t>(t[2]), at<uint32_t>(t[3]),
                            at<uint64_t>(t[4])});
        cmr::multi_index_search(isa,
                                {n, nbytes, bits, at<uint32_t>(order), at<uint32_t>(starts), at<uint8_t>(different),
                                 each.data(), static_cast<int>(each.size())},
                                {at<uint8_t>(q), nq, k, threads, effort}, at<int32_t>(distances), at<int64_t>(indices),
                                at<uint8_t>(done), at<double>(cost), at<uint8_t>(workspace));
    });

    m.attr("range_slot_bytes") = cmr::kSlotBytes;
    m.attr("range_max_reach") = cmr::kMaxReach;
    m.def("range_table", [](Address codes, int64_t n, int64_t nbytes, Address mask, int bucket_bits, int index_bits,
                            int threads, Address offsets, Address slots_by_bucket, Address slots) {
        py::gil_scoped_release released;
        cmr::range_table(at<uint8_t>(codes), n, nbytes, at<uint64_t>(mask), bucket_bits, index_bits, threads,
                         at<uint32_t>(offsets), at<uint8_t>(slots_by_bucket), at<uint32_t>(slots));
    });
    m.def("range_costs", &cmr::range_costs, "Of a query, a look-up and a code that is compared.");
    m.def("range_workspace", &cmr::range_workspace);
    // index: (codes, n, nbytes, bucket bits, index bits); tables: (mask, places, bits, offsets, slots) each
    using RangeIndexArguments = std::array<int64_t, 5>;
    using RangeTables = std::vector<std::array<Address, 5>>;
    // search: (queries, how many, radius, reach, allowed or 0, after or -1, threads)
    using RangeArguments = std::array<int64_t, 7>;
    const auto with_range = [](const RangeIndexArguments& index, const RangeTables& tables, const RangeArguments& s,
                               double effort, double scan_cost, const auto& body) {
        std::vector<cmr::RangeTable> each;
        for (const auto& t : tables)
            each.push_back({at<uint64_t>(t[0]), at<uint16_t>(t[1]), static_cast<int>(t[2]), at<uint32_t>(t[3]),
                            at<uint32_t>(t[4])});
        const auto address = [](int64_t x) { return static_cast<Address>(x); };
        body(cmr::RangeIndex{at<uint8_t>(address(index[0])), index[1], index[2], static_cast<int>(index[3]),
                             static_cast<int>(index[4]), each.data(), static_cast<int>(each.size())},
             cmr::RangeSearch{{at<uint8_t>(address(s[0])), s[1], static_cast<uint32_t>(s[2]), at<int8_t>(address(s[3])),
                               at<uint32_t>(address(s[4])), s[5], effort, scan_cost},
                              static_cast<int>(s[6])});
    };
    m.def("range_count", [with_range](const std::string& isa, const RangeIndexArguments& index,
                                      const RangeTables& tables, const RangeArguments& s, double effort,
                                      double scan_cost, Address counts, Address done, Address workspace) {
        py::gil_scoped_release released;
        with_range(index, tables, s, effort, scan_cost, [&](const auto& of, const auto& search) {
            cmr::range_count(isa, of, search, at<int64_t>(counts), at<uint8_t>(done), at<uint8_t>(workspace));
        });
    });
    m.def("range_fill", [with_range](const std::string& isa, const RangeIndexArguments& index,
                                     const RangeTables& tables, const RangeArguments& s, Address lims, Address done,
                                     Address distances, Address indices, Address workspace) {
        py::gil_scoped_release released;
        with_range(index, tables, s, 0, 0, [&](const auto& of, const auto& search) {
            cmr::range_fill(isa, of, search, at<int64_t>(lims), at<uint8_t>(done), at<int32_t>(distances),
                            at<int64_t>(indices), at<uint8_t>(workspace));
        });
    });

    // job: (table, first, last, radius, allowed or 0, tasks, threads)
    m.def("range_pairs",
          [with_range](const std::string& isa, const RangeIndexArguments& index, const RangeTables& tables,
                       const RangeArguments& job, Address keys, Address distances, int64_t capacity, Address counts) {
              py::gil_scoped_release released;
              with_range(index, tables, {}, 0, 0, [&](const auto& of, const auto&) {
                  cmr::range_pairs(isa, of,
                                   {static_cast<int>(job[0]), job[1], job[2], static_cast<uint32_t>(job[3]),
                                    at<uint32_t>(static_cast<Address>(job[4]))},
                                   job[5], static_cast<int>(job[6]), at<uint64_t>(keys), at<int32_t>(distances),
                                   capacity, at<int64_t>(counts));
              });
          });

    m.def("triplet_workspace", &cmr::triplet_workspace);
    // Both return whether any pair with a weight is close.
    // points: (x, squared norms of x, y, those of y, width, whether distances come from differences alone)
    using Points = std::tuple<Address, Address, Address, Address, int64_t, bool>;
    const auto triplet_block = [](int64_t rows, int64_t candidates, const cmr::TripletLabels& labels, int64_t self,
                                  cmr::Distance distance, bool wants_e, Address block, const Points& points,
                                  Address losses, Address row_sums, Address close, int threads) {
        const auto& [x, x_squares, y, y_squares, width, exact] = points;
        return cmr::TripletBlock{rows,
                                 candidates,
                                 labels,
                                 self,
                                 distance,
                                 wants_e,
                                 exact,
                                 at<float>(block),
                                 at<float>(x_squares),
                                 at<float>(y_squares),
                                 at<float>(x),
                                 at<float>(y),
                                 width,
                                 at<double>(losses),
                                 at<float>(row_sums),
                                 at<int64_t>(close),
                                 threads};
    };
    m.def("triplet_weigh",
          [triplet_block](const std::string& isa, int threads, int64_t rows, int64_t candidates, int64_t words,
                          bool classes, float margin, int mining, int distance, bool wants_e, int64_t self,
                          Address block, const Points& points, Address x_labels, Address y_labels, Address losses,
                          Address triplets, Address open, Address row_sums, Address close, Address workspace) {
              py::gil_scoped_release released;
              cmr::triplet_margin(
                  isa,
                  triplet_block(rows, candidates, {words, classes, at<int64_t>(x_labels), at<int64_t>(y_labels)}, self,
                                static_cast<cmr::Distance>(distance), wants_e, block, points, losses, row_sums, close,
                                threads),
                  {margin, static_cast<cmr::Mining>(mining), at<int64_t>(triplets), at<int64_t>(open)},
                  at<uint8_t>(workspace));
              return std::any_of(at<int64_t>(close), at<int64_t>(close) + rows, [](int64_t c) { return c != 0; });
          });
    m.def("triplet_acmr",
          [triplet_block](const std::string& isa, int threads, int64_t rows, int64_t candidates, int64_t words,
                          bool classes, float margin, Address near, Address far, int64_t first, bool wants_e,
                          Address block, const Points& points, Address x_labels, Address y_labels, Address losses,
                          Address row_sums, Address close, Address workspace) {
              py::gil_scoped_release released;
              cmr::triplet_acmr(
                  isa,
                  triplet_block(rows, candidates, {words, classes, at<int64_t>(x_labels), at<int64_t>(y_labels)}, -1,
                                cmr::Distance::euclidean, wants_e, block, points, losses, row_sums, close, threads),
                  {margin, at<float>(near), at<float>(far), first}, at<uint8_t>(workspace));
              return std::any_of(at<int64_t>(close), at<int64_t>(close) + rows, [](int64_t c) { return c != 0; });
          });
    m.def("triplet_acmr_factors",
          [](const std::string& isa, int threads, int64_t n, int64_t words, bool classes, Address labels,
             Address planes, double weight, bool mean, Address counts, Address near, Address far) {
              py::gil_scoped_release released;
              cmr::triplet_acmr_factors(isa, {words, classes, at<int64_t>(labels), at<int64_t>(planes)}, n, weight,
                                        mean, threads, at<int64_t>(counts), at<float>(near), at<float>(far));
          });
    m.def("triplet_origin", [](int64_t n, Address x, int64_t m, Address y, int64_t width, Address origin) {
        return cmr::triplet_origin(at<float>(x), n, at<float>(y), m, width, at<float>(origin));
    });
    m.def("triplet_symmetrise", [](const std::string& isa, int threads, int64_t n, Address e, Address row_sums) {
        py::gil_scoped_release released;
        cmr::triplet_symmetrise(isa, n, threads, at<float>(e), at<float>(row_sums));
    });
    m.def("pairwise",
          [](const std::string& isa, Address theta, int64_t rows, int64_t columns, int kind, Address row_labels,
             Address labels, int64_t words, int64_t label_stride, Address s, int64_t s_stride, double positive,
             bool squared, bool gradient, Address row_sums, Address total, int threads) {
              py::gil_scoped_release released;
              cmr::pairwise(isa,
                            {at<float>(theta), rows, columns, static_cast<cmr::Similarity>(kind),
                             at<int32_t>(row_labels), at<int32_t>(labels), words, label_stride, at<void>(s), s_stride,
                             static_cast<float>(positive), squared, gradient, at<double>(row_sums), at<double>(total)},
                            threads);
          });
    // values: (address, per_sample, per_channel) of alpha, eps, low and high
    m.def("pgd_step", [](const std::string& isa, int64_t samples, int64_t channels, int64_t inner, Address x,
                         Address gradient, Address origin, const std::array<std::array<int64_t, 3>, 4>& values,
                         Address broken, int32_t step, bool l2, int threads) {
        py::gil_scoped_release released;
        const auto value = [&](int i) {
            return cmr::PgdValue{at<const float>(static_cast<Address>(values[i][0])), values[i][1], values[i][2]};
        };
        cmr::pgd_step(isa, {samples, channels, inner, at<float>(x), at<const float>(gradient), at<const float>(origin),
                            value(0), value(1), value(2), value(3), at<int32_t>(broken), step, l2, threads});
    });
    m.def("pgd_noise", [](const std::string& isa, uint64_t seed, Address index, int64_t samples, int64_t count,
                          Address out, int threads) {
        py::gil_scoped_release released;
        cmr::pgd_noise(isa, {seed, at<const int64_t>(index), samples, count, at<float>(out), threads});
    });
    // tile: (similarities, bf16, rows, columns, weights or 0, diagonal); a direction: 4 arrays, the first 0 without it
    using Direction = std::array<Address, 4>;
    using Tile = std::tuple<Address, bool, int64_t, int64_t, Address, int64_t>;
    const auto infonce_tile = [](const Tile& t, float scale, float bias) {
        const auto& [s, bf16, rows, cols, weights, diagonal] = t;
        return cmr::SimilarityTile{at<void>(s), bf16, rows, cols, scale, bias, at<float>(weights), diagonal};
    };
    m.def("infonce_scratch", [](int64_t cols) { return cmr::info_nce_scratch(cols); });
    m.def("infonce_forward", [infonce_tile](const std::string& isa, const Tile& t, float scale, const Direction& rows,
                                            const Direction& cols, Address scratch) {
        py::gil_scoped_release released;
        const auto state = [](const Direction& d) {
            return cmr::SoftmaxState{at<float>(d[0]), at<float>(d[1]), at<float>(d[2]), at<float>(d[3])};
        };
        cmr::infonce_kernel(isa).forward(infonce_tile(t, scale, 0), state(rows), state(cols), at<float>(scratch));
    });
    m.def("infonce_gradient", [infonce_tile](const std::string& isa, const Tile& t, float scale, const Direction& rows,
                                             const Direction& cols, Address out) {
        py::gil_scoped_release released;
        const auto state = [](const Direction& d) {
            return cmr::SoftmaxGradient{at<float>(d[0]), at<float>(d[1]), at<float>(d[2]), at<float>(d[3])};
        };
        cmr::infonce_kernel(isa).gradient(infonce_tile(t, scale, 0), state(rows), state(cols), at<void>(out));
    });
    m.def("infonce_sigmoid", [infonce_tile](const std::string& isa, const Tile& t, float scale, float bias,
                                            float positive, float negative, Address sums, Address out) {
        py::gil_scoped_release released;
        cmr::infonce_kernel(isa).sigmoid(infonce_tile(t, scale, bias), positive, negative, at<double>(sums),
                                         at<void>(out));
    });

    m.def("sinkhorn_workspace", [](int64_t problems, int64_t m, int64_t n, bool proximal, int threads) {
        return cmr::sinkhorn_workspace({problems, m, n, 1, 1, 0, cmr::Stop::marginals, proximal, 1, threads});
    });
    m.def("sinkhorn", [](const std::string& isa, int64_t problems, int64_t m, int64_t n, double inverse,
                         int64_t max_iter, double tol, int stop, bool proximal, int64_t inner, int threads,
                         Address cost, Address mu, int64_t mu_stride, Address nu, int64_t nu_stride, Address plan,
                         Address iterations, Address errors, Address workspace) {
        py::gil_scoped_release released;
        cmr::sinkhorn(isa,
                      {problems, m, n, inverse, max_iter, tol, static_cast<cmr::Stop>(stop), proximal, inner, threads},
                      {at<float>(cost), at<float>(mu), at<float>(nu), mu_stride, nu_stride, at<float>(plan),
                       at<int32_t>(iterations), at<float>(errors)},
                      at<uint8_t>(workspace));
    });
}
