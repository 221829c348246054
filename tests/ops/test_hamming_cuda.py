"""The CUDA backend: what it says where it cannot run, and, on a GPU, that it equals the CPU to the last index.

tests/native/test_emulated_hamming.py runs the same kernels on the host, where there is no GPU.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import cmr_fast as cf
from cmr_fast.ops import _dispatch
from cmr_fast.ops.cuda import hamming as hamming_cuda
from cmr_fast.ops.ranking import ranking

BUILT = not isinstance(_dispatch.native_cuda(), ImportError)
REASON = _dispatch.unavailable("cuda", "cuda")
needs_gpu = pytest.mark.skipif(REASON is not None, reason=f"the CUDA kernels cannot run here: {REASON}")


# --- everywhere


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH")
@pytest.mark.skipif(os.environ.get("CMR_FAST_CUDA") == "0", reason="CMR_FAST_CUDA=0")
def test_module_is_built_where_nvcc_is():
    assert BUILT, _dispatch.native_cuda()


def test_importing_and_searching_on_the_cpu_leaves_cuda_alone():
    script = (
        "import sys, numpy as np, cmr_fast as cf\n"
        "x = np.zeros((4, 8), np.uint8)\n"
        "cf.hamming_topk(x, x, 2)\n"
        "assert 'cmr_fast._cuda' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


@pytest.mark.skipif(not BUILT or not shutil.which("readelf"), reason="needs cmr_fast._cuda and readelf")
def test_module_asks_for_no_cuda_or_torch_library():
    found = subprocess.run(["readelf", "-d", _dispatch.native_cuda().__file__], capture_output=True, text=True).stdout
    needed = [line.rsplit("[", 1)[1] for line in found.splitlines() if "NEEDED" in line]
    assert needed and not [name for name in needed if "cuda" in name or "torch" in name or "omp" in name]


def test_reasons_name_what_is_missing(monkeypatch):
    def reason():
        return _dispatch._cuda_unavailable.__wrapped__()

    monkeypatch.setattr(_dispatch, "native_cuda", lambda: ImportError("no such file"))
    assert "was not built" in reason() and "no such file" in reason()
    module = type(sys)("cuda")
    module.device_problem = lambda: "cudaErrorInsufficientDriver"
    monkeypatch.setattr(_dispatch, "native_cuda", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason().startswith("torch ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cudaErrorInsufficientDriver" in reason()
    module.device_problem = lambda: None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 5))[i])
    assert "8.0" in reason() and "7.5" in reason()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 0))
    assert reason() is None


def test_cpu_tensors_refuse_the_cuda_backend():
    x = np.zeros((2, 8), np.uint8)
    with pytest.raises(cf.InputError, match="cuda"):
        cf.hamming_topk(x, x, 1, backend="cuda")
    assert "cpu" in _dispatch.unavailable("cuda", "cpu")


def test_forms_that_cannot_run_raise(monkeypatch):
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", "b2")
    with pytest.raises(cf.InputError, match="popc, b1, int8"):
        hamming_cuda.choose_form(8, 8)
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", "b1")
    with pytest.raises(cf.InputError, match="6 bytes"):
        hamming_cuda.choose_form(6, 1)


# --- on a GPU


@pytest.fixture
def poisoned():
    """torch.empty gives garbage that is far from any answer, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def codes(seed, n, nbytes, kind="random"):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    return torch.from_numpy(x[rng.integers(0, max(1, min(n, 4)), n)] if kind == "tied" and n else x)


def assert_same(on_gpu, on_cpu):
    for got, expected in zip(on_gpu, on_cpu, strict=True):
        assert got.is_cuda and got.dtype == expected.dtype
        np.testing.assert_array_equal(got.cpu().numpy(), expected.numpy())


def assert_topk(q, db, k, kernel=None):
    _dispatch.native_cuda().reset_last_kernel()
    found = cf.hamming_topk(q.cuda(), db.cuda(), k)
    if kernel:
        assert _dispatch.native_cuda().last_kernel() == kernel
    assert_same(found, cf.hamming_topk(q, db, k))


@needs_gpu
@pytest.mark.parametrize("nbytes", [1, 2, 3, 4, 6, 8, 12, 15, 16, 32, 33, 64, 257, 512])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_topk_equals_the_cpu(poisoned, nbytes, kind):
    for n, queries in ((1, 1), (33, 2), (257, 17), (5000, 40)):
        db = codes(n, n, nbytes, kind)
        for k in (1, 10, 300, n + 3):
            assert_topk(codes(1, queries, nbytes, kind), db, k, "popc" if min(k, n) <= 2048 else "place")


@needs_gpu
@pytest.mark.parametrize("form", ["b1", "int8"])
@pytest.mark.parametrize("nbytes", [4, 8, 16, 20, 32, 64, 128, 512])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_tensor_cores_equal_the_cpu(poisoned, monkeypatch, form, nbytes, kind):
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", form)
    for n, queries in ((1, 1), (70, 33), (5000, 70)):
        for k in (1, 100):
            assert_topk(codes(1, queries, nbytes, kind), codes(n, n, nbytes, kind), k, form)


@needs_gpu
@pytest.mark.parametrize("form", ["popc", "b1", "int8"])
@pytest.mark.parametrize(("queries", "k"), [(1, 10), (3, 2048), (300, 100)])
@pytest.mark.parametrize("kind", ["random", "tied", "falling"])
def test_topk_of_a_large_database(poisoned, monkeypatch, form, queries, k, kind):
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", form)
    q, db = codes(1, queries, 8), codes(2, 1_000_000, 8, kind)
    if kind == "falling":
        db = db[cf.hamming_distances(q[:1], db)[0].argsort(descending=True)]
    assert_topk(q, db, k, form)


@needs_gpu
@pytest.mark.parametrize("k", [2049, 50_000, 200_000])
def test_large_k(poisoned, k):
    assert_topk(codes(1, 20, 8), codes(2, 200_000, 8), k, "place")


@needs_gpu
@pytest.mark.parametrize("nbytes", [1, 6, 8, 32, 129, 512])
def test_range_table_and_histograms_equal_the_cpu(poisoned, nbytes):
    q, db = codes(1, 19, nbytes), codes(2, 30_000, nbytes)
    for radius in (0, 4 * nbytes - 3, 4 * nbytes, 8 * nbytes, 10**6):
        assert_same(cf.hamming_range(q.cuda(), db.cuda(), radius), cf.hamming_range(q, db, radius))
    assert_same([cf.hamming_distances(q.cuda(), db.cuda())], [cf.hamming_distances(q, db)])
    bits = [codes(seed, len(x), 3) & 0x21 for seed, x in enumerate((q, db))]
    classes = [codes(seed, len(x), 1)[:, 0].int() % 4 for seed, x in enumerate((q, db))]
    for labels in (bits, classes):
        found = ranking(q.cuda(), db.cuda(), *(x.cuda() for x in labels), order=False)
        assert _dispatch.native_cuda().last_kernel() == "histogram"
        assert_same(found[:2], ranking(q, db, *labels, order=False)[:2])


@needs_gpu
def test_results_do_not_change_from_run_to_run():
    q, db = codes(1, 50, 4).cuda(), codes(2, 400_000, 4).cuda()
    first = cf.hamming_topk(q, db, 500)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(cf.hamming_topk(q, db, 500), first, strict=True))


@needs_gpu
@pytest.mark.parametrize("k", [20, 3000])
def test_capture_in_a_graph(k):
    q, db = codes(1, 16, 8), codes(2, 300_000, 8)
    held, on_gpu = q.cuda(), db.cuda()
    cf.hamming_topk(held, on_gpu, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cf.hamming_topk(held, on_gpu, k)
    for seed in (3, 4):
        other = codes(seed, 16, 8)
        held.copy_(other)
        graph.replay()
        assert_same(found, cf.hamming_topk(other, db, k))


@needs_gpu
def test_runs_on_the_current_stream():
    q, db = codes(1, 16, 8), codes(2, 300_000, 8)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        held = torch.zeros((16, 8), dtype=torch.uint8, device="cuda")
        on_gpu = db.cuda()
        torch.cuda._sleep(20_000_000)  # work on another stream would read the zeros
        held.copy_(q.cuda())
        found = cf.hamming_topk(held, on_gpu, 9)
    stream.synchronize()
    assert_same(found, cf.hamming_topk(q, db, 9))


@needs_gpu
def test_databases_of_more_than_two_gigabytes():
    n, nbytes = 300_000_000, 8
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free GPU memory")
    db = torch.randint(0, 256, (n, nbytes), dtype=torch.uint8, device="cuda")
    q = codes(1, 3, nbytes).cuda()
    places = [7, 2**31 // nbytes - 1, 2**31 // nbytes, n - 2, n - 1]
    db[places] = q[1]
    distances, indices = cf.hamming_topk(q, db, 5)
    assert indices[1].tolist() == places and distances[1].tolist() == [0] * 5
    lims, _, hits = cf.hamming_range(q, db, 0)
    assert hits[lims[1] : lims[2]].tolist() == places


@needs_gpu
def test_chosen_explained_and_forced(monkeypatch):
    x = codes(1, 100, 8).cuda()
    assert cf.explain("hamming_topk", x).backend == "cuda"
    ours, portable = cf.hamming_topk(x, x, 5), cf.hamming_topk(x, x, 5, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(ours, portable, strict=True))


@needs_gpu
def test_a_ranking_in_order_takes_the_portable_path():
    x, labels = codes(1, 100, 8).cuda(), codes(2, 100, 1).cuda()
    assert_same(ranking(x, x, labels, labels)[:2], ranking(x.cpu(), x.cpu(), labels.cpu(), labels.cpu())[:2])
    with pytest.raises(cf.InputError, match="order=False"):
        ranking(x, x, labels, labels, backend="cuda")


@needs_gpu
def test_opcheck_and_compile():
    x = codes(1, 60, 8).cuda()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.cmr_fast.hamming_topk.default, (x, x, 3, 64, None, None), test_utils=tests)
    got = torch.compile(lambda q, db: cf.hamming_topk(q, db, 2)[0] + 1, fullgraph=True, backend="aot_eager")(x, x)
    assert torch.equal(got, cf.hamming_topk(x, x, 2)[0] + 1)


@needs_gpu
@pytest.mark.parametrize("form", ["popc", "b1", "int8"])
def test_one_small_case_of_everything(monkeypatch, form):
    """What bench/gpu_check.sh runs under compute-sanitizer."""
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", form)
    q, db = codes(1, 20, 16), codes(2, 4000, 16)
    assert_topk(q, db, 50)
    assert_topk(q, db, 3000)
    assert_same(cf.hamming_range(q.cuda(), db.cuda(), 50), cf.hamming_range(q, db, 50))
    assert_same([cf.hamming_distances(q.cuda(), db.cuda())], [cf.hamming_distances(q, db)])
