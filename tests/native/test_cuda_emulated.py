"""The CUDA kernels compiled as plain C++ (cuda_shim.h) and driven by the code that drives them on a GPU.

What this cannot see: what the compiler and the device do, real races between warps, speed. The tensor-core forms run
with the instructions' documented register layout written out in the shim.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast import ops
from cmr_fast.ops import _dispatch, _hamming_cuda, _reference, pgd, pgd_noise, pgd_step_, triplet

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
WARPS, WORKSPACE = 64, 1 << 30


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The module built with g++, in place of cmr_fast._cuda, and a pretended device of 64 warps."""
    pybind11 = pytest.importorskip("pybind11")
    if not shutil.which("g++"):
        pytest.skip("g++ not found")
    out = tmp_path_factory.mktemp("emulated") / f"cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = "-std=c++17 -O1 -g1 -fPIC -shared -fvisibility=hidden -fsanitize=undefined -fno-sanitize-recover=all -x c++"
    sources = [*map(str, sorted(CSRC.glob("*.cu"))), str(CSRC / "module.cpp")]
    defines = ["-DCMR_CUDA_MODULE=cuda_emulated", *(f"-I{path}" for path in include)]
    command = ["g++", *flags.split(), *defines, *sources, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("cuda_emulated", out)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "native_cuda", lambda: module)
        patch.setattr(_hamming_cuda, "device_of", lambda tensor: _hamming_cuda.Device(0, 0, WARPS, WORKSPACE))
        yield module


@pytest.fixture(params=["forward", "reverse"])
def order(request, monkeypatch):
    """Threads between two barriers run in either order: the results must not depend on it."""
    monkeypatch.setenv("CMR_SHIM_ORDER", request.param)


def codes(rng, n, nbytes, kind="random"):
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    if kind == "tied" and n:
        x = x[rng.integers(0, min(n, 4), n)]
    if kind == "near":  # most bits equal, so that distances are small and often the same
        x = (x & rng.integers(0, 256, x.shape, dtype=np.uint8) & 17).astype(np.uint8)
    return x


def assert_topk(q, db, k):
    bits = 8 * db.shape[1]
    distances = torch.full((len(q), k), bits + 1, dtype=torch.int32)
    indices = torch.full((len(q), k), -1)
    _hamming_cuda.topk(torch.from_numpy(q), torch.from_numpy(db), k, distances, indices)
    expected = _reference.hamming_topk(q, db, k, bits)
    np.testing.assert_array_equal(distances.numpy(), expected[0])
    np.testing.assert_array_equal(indices.numpy(), expected[1])


@pytest.mark.parametrize("nbytes", [1, 3, 4, 8, 12, 15, 16, 33, 64])
@pytest.mark.parametrize("kind", ["random", "tied", "near"])
def test_topk(emulated, nbytes, kind):
    rng = np.random.default_rng(nbytes)
    for n, queries in ((1, 1), (255, 3), (600, 17)):
        db = codes(rng, n, nbytes, kind)
        for k in (7, n + 3):
            assert_topk(codes(rng, queries, nbytes, kind), db, k)
    assert emulated.last_kernel() == "popc"


@pytest.mark.parametrize("form", ["b1", "int8"])
@pytest.mark.parametrize("nbytes", [4, 8, 16, 20, 32, 64])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_topk_by_tensor_cores(emulated, form, nbytes, kind, monkeypatch):
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", form)
    rng = np.random.default_rng(nbytes)
    for n, queries, k in ((1, 1, 1), (70, 33, 80), (1000, 5, 20)):
        assert_topk(codes(rng, queries, nbytes, kind), codes(rng, n, nbytes, kind), k)
    assert emulated.last_kernel() == form


@pytest.mark.parametrize("form", ["popc", "b1", "int8"])
@pytest.mark.parametrize("direction", [1, -1])
def test_lists_that_fill_up_keep_the_nearest(emulated, order, form, direction, monkeypatch):
    """Distances that fall (or rise) with the index: every list is cut down several times."""
    monkeypatch.setenv("CMR_FAST_CUDA_FORM", form)
    rng = np.random.default_rng(0)
    q, db = codes(rng, 1, 4), codes(rng, 6000, 4)
    db = db[np.argsort(_reference.hamming_distances(q, db)[0], kind="stable")[::direction]].copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_hamming_cuda, "device_of", lambda tensor: _hamming_cuda.Device(0, 0, 1, WORKSPACE))
        assert_topk(q, db, 40)


def test_limits_from_a_sample_change_nothing(emulated):
    rng = np.random.default_rng(0)
    q = codes(rng, 2, 2)
    for db in (
        codes(rng, 70_000, 2),
        np.repeat(q, 35_000, 0),
        np.concatenate([np.full((69_990, 2), ~q[0]), q[[0] * 9]]),
    ):
        assert_topk(q, db, 30)


@pytest.mark.parametrize("nbytes", [1, 8, 20, 512])
def test_topk_by_counting(emulated, order, nbytes, monkeypatch):
    monkeypatch.setattr(_hamming_cuda, "MOST_LISTED", 10)
    rng = np.random.default_rng(nbytes)
    queries = 3 if nbytes == 512 else 19
    for kind in ("random", "tied"):
        for n in (300, 2600):
            for k in (11, n, n + 5):
                assert_topk(codes(rng, queries, nbytes, kind), codes(rng, n, nbytes, kind), k)
    assert emulated.last_kernel() == "place"


def test_little_workspace_means_batches_not_other_results(emulated, monkeypatch):
    rng = np.random.default_rng(0)
    q, db = codes(rng, 21, 8), codes(rng, 5000, 8)
    for workspace in (1, 20_000):
        monkeypatch.setattr(_hamming_cuda, "device_of", lambda tensor, w=workspace: _hamming_cuda.Device(0, 0, 64, w))
        assert_topk(q, db, 9)
        assert_topk(q[:3], db, 4000)


@pytest.mark.parametrize("nbytes", [1, 4, 6, 8, 32, 129])
def test_range_and_table(emulated, order, nbytes):
    rng = np.random.default_rng(nbytes)
    q, db = codes(rng, 9, nbytes), codes(rng, 2700, nbytes)
    tensors = torch.from_numpy(q), torch.from_numpy(db)
    for radius in (0, 4 * nbytes - 1, 8 * nbytes, 10**6):
        expected = _reference.hamming_range(q, db, radius)
        for got, want in zip(_hamming_cuda.range_search(*tensors, radius), expected, strict=True):
            np.testing.assert_array_equal(got.numpy(), want)
    out = torch.full((len(q), len(db)), -7, dtype=torch.int32)
    _hamming_cuda.table(*tensors, out)
    np.testing.assert_array_equal(out.numpy(), _reference.hamming_distances(q, db))


@pytest.mark.parametrize("nbytes", [1, 8, 24, 512])
def test_histograms(emulated, nbytes):
    rng = np.random.default_rng(nbytes)
    q, db = codes(rng, 5, nbytes), codes(rng, 2500, nbytes)
    distances = _reference.hamming_distances(q, db)
    bits = [rng.integers(0, 256, (len(x), 3), dtype=np.uint8) & 0x21 for x in (q, db)]
    classes = [rng.integers(0, 4, len(x), dtype=np.int32) for x in (q, db)]
    for labels, shared in (
        (bits, (bits[0][:, None] & bits[1][None]).any(axis=2)),
        (classes, classes[0][:, None] == classes[1][None]),
    ):
        items, relevant = torch.full((2, len(q), 8 * nbytes + 1), -5)
        _hamming_cuda.histograms(*(torch.from_numpy(x) for x in (q, db, *labels)), items, relevant)
        for row in range(len(q)):
            for got, chosen in ((items, slice(None)), (relevant, shared[row])):
                expected = np.bincount(distances[row][chosen], minlength=8 * nbytes + 1)
                np.testing.assert_array_equal(got[row], expected)


@given(
    nbytes=st.integers(1, 40), n=st.integers(1, 2000), queries=st.integers(1, 20), k=st.integers(1, 700),
    values=st.integers(1, 256), warps=st.integers(1, 200), seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(_hamming_cuda.FORMS), order=st.sampled_from(["forward", "reverse"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_topk_on_arbitrary_shapes(emulated, nbytes, n, queries, k, values, warps, seed, form, order):
    rng = np.random.default_rng(seed)
    if form != "popc":
        nbytes = 4 * -(-nbytes // 4)
    q = rng.integers(0, values, (queries, nbytes), dtype=np.uint8)
    db = rng.integers(0, values, (n, nbytes), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_FAST_CUDA_FORM", form)
        patch.setenv("CMR_SHIM_ORDER", order)
        patch.setattr(_hamming_cuda, "device_of", lambda tensor: _hamming_cuda.Device(0, 0, warps, WORKSPACE))
        assert_topk(q, db, k)


def test_nothing_to_search(emulated):
    empty, some = torch.empty((0, 8), dtype=torch.uint8), torch.zeros((3, 8), dtype=torch.uint8)
    for q, db in ((empty, some), (some, empty)):
        lims, distances, indices = _hamming_cuda.range_search(q, db, 5)
        assert len(lims) == len(q) + 1 and not lims.any() and len(distances) == len(indices) == 0
        _hamming_cuda.topk(q, db, 1, torch.empty((len(q), 1), dtype=torch.int32), torch.empty((len(q), 1)).long())
        _hamming_cuda.table(q, db, torch.empty((len(q), len(db)), dtype=torch.int32))
        items, relevant = torch.full((2, len(q), 65), -5)
        _hamming_cuda.histograms(q, db, q[:, :1], db[:, :1], items, relevant)
        assert not items.any() and not relevant.any()


def test_codes_at_odd_addresses(emulated):
    rng = np.random.default_rng(0)
    q, db = codes(rng, 3, 8), codes(rng, 400, 8)
    raw = torch.zeros(db.size + 1, dtype=torch.uint8)
    raw[1:] = torch.from_numpy(db.reshape(-1))
    lims, _, indices = _hamming_cuda.range_search(torch.from_numpy(q), raw[1:].view(400, 8), 28)
    expected = _reference.hamming_range(q, db, 28)
    np.testing.assert_array_equal(lims.numpy(), expected[0])
    np.testing.assert_array_equal(indices.numpy(), expected[2])


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", triplet.DISTANCES)
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_triplets_are_those_of_the_cpu(emulated, order, mining, distance, cross, monkeypatch):
    """Losses, gradients, ties: the same weights, so the same bits but for the order of float64 sums."""
    rng = np.random.default_rng(0)
    for n, others, classes in ((1, 1, 2), (7, 5, 2), (70, 300, 3), (40, 33, None)):
        x = torch.from_numpy(rng.integers(-2, 3, (n, 4)).astype(np.float32))
        other = torch.from_numpy(rng.integers(-2, 3, (others, 4)).astype(np.float32)) if cross else None
        mine, theirs = (
            torch.from_numpy(rng.random((count, 70)) < 0.01 if classes is None else rng.integers(0, classes, count))
            for count in (n, others)
        )
        results = []
        for backend in ("cuda", "cpp"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_dispatch, "choose_backend", lambda *_, chosen=backend: chosen)
                a, b = x.clone().requires_grad_(), None if other is None else other.clone().requires_grad_()
                loss = triplet.triplet_margin(
                    a, mine, 0.5, mining=mining, distance=distance, other=b, other_labels=theirs if cross else None
                )
                loss.backward()
                results.append((loss.detach(), a.grad, *([b.grad] if cross else [])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_triplets_of_as_many_candidates_as_a_row_may_have(emulated):
    rng = np.random.default_rng(1)
    x, other = (torch.from_numpy(rng.standard_normal((n, 8)).astype(np.float32)) for n in (3, 4096))
    mine, theirs = torch.zeros(3, dtype=torch.int64), torch.from_numpy((rng.random(4096) < 0.4).astype(np.int64))
    for mining in triplet.MINING:
        losses = []
        for backend in ("cuda", "cpp"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_dispatch, "choose_backend", lambda *_, chosen=backend: chosen)
                losses.append(triplet.triplet_margin(x, mine, 0.1, mining=mining, other=other, other_labels=theirs))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def pgd_problem(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator)
    x = (origin + 0.3 * (torch.rand(shape, generator=generator) - 0.5)).clamp(0, 1)
    gradient = torch.randn(shape, generator=generator)
    gradient[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return x, gradient, origin


def on_backend(backend, x, *rest, **options):
    """x moved by one backend, on a copy at an address that a load of 4 may take or may not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: backend)
        patch.setattr(pgd, "_queue", lambda _: _dispatch.native_cuda().Queue(0, 0))
        return pgd_step_(x.clone(), *rest, **options)


PGD_SHAPES = [(1, 1), (3,), (2, 3, 1), (5, 3, 4, 4), (3, 2, 7, 5), (1, 3, 33), (2, 17), (70, 3, 9, 9), (1, 3, 96, 97)]
PGD_SHAPES += [(1, 525_000), (0, 3), (2, 0), (3, 2, 0)]


def pgd_values(shape):
    """alpha, eps and bounds for all, of every sample, of every channel and of both."""
    rng = np.random.default_rng(0)
    channels = shape[1] if len(shape) > 1 else 1
    for kind in ((1, 1), (shape[0], 1), (1, channels), (shape[0], channels)):
        alpha, eps, low, high = (
            torch.from_numpy(rng.uniform(a, b, kind).astype(np.float32))
            for a, b in ((0.05, 0.3), (0.05, 0.3), (0, 0.1), (0.9, 1))
        )
        yield {"alpha": alpha, "eps": eps, "bounds": (low, high)}


@pytest.mark.parametrize("shape", PGD_SHAPES)
def test_sign_steps_have_the_bits_of_torch_and_of_the_cpu(emulated, order, shape):
    tensors = pgd_problem(shape)
    for values in pgd_values(shape):
        emulated.reset_last_kernel()
        got, portable, native = (on_backend(b, *tensors, **values) for b in ("cuda", "torch", "cpp"))
        assert torch.equal(got, portable)
        assert torch.equal(got.view(torch.int32), native.view(torch.int32))
        assert emulated.last_kernel() == ("linf" if got.numel() else "none")


@pytest.mark.parametrize("shape", PGD_SHAPES)
def test_l2_steps_against_float64(emulated, order, shape):
    tensors = pgd_problem(shape)
    if not tensors[0].numel():
        return
    for values in pgd_values(shape):
        if values["alpha"].shape[1] > 1:
            values |= {"alpha": values["alpha"][:, :1], "eps": values["eps"][:, :1]}
        got = on_backend("cuda", *tensors, norm="l2", **values)
        alpha, eps, low, high = (v.numpy() for v in (values["alpha"], values["eps"], *values["bounds"]))
        want = _reference.pgd_step(*(t.numpy() for t in tensors), alpha, eps, low, high, "l2")
        # operands below 2, at most six roundings
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=6 * 2**-24)
        assert emulated.last_kernel() == "l2"


def test_gradients_of_any_size_give_a_step_of_the_same(emulated):
    x, gradient, origin = pgd_problem((4, 2, 3), 5)
    gradient[0] = 0
    gradient[1] *= 1e-41  # 0.05 over their norm is no float32
    gradient[2] *= 1e37
    x = origin.clone()
    moved = on_backend("cuda", x, gradient, origin, alpha=0.05, eps=1.0, bounds=(-5.0, 5.0), norm="l2")
    assert torch.equal(moved[0], x[0])
    torch.testing.assert_close((moved - x)[1:].flatten(1).norm(dim=1), torch.full((3,), 0.05), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_addresses_that_a_wide_load_cannot_take(emulated, norm):
    """The same bits, and nothing before or after x is touched."""
    shape = (3, 5, 20)
    x, gradient, origin = pgd_problem(shape)
    want = on_backend("cuda", x, gradient, origin, alpha=0.1, eps=0.12, norm=norm)
    raw = torch.full((x.numel() + 8,), 7.0)
    raw[3 : 3 + x.numel()] = x.flatten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: "cuda")
        patch.setattr(pgd, "_queue", lambda _: emulated.Queue(0, 0))
        moved = pgd_step_(raw[3 : 3 + x.numel()].view(shape), gradient, origin, alpha=0.1, eps=0.12, norm=norm)
    assert moved.data_ptr() == raw.data_ptr() + 12 and torch.equal(moved, want)
    assert (raw[:3] == 7).all() and (raw[3 + x.numel() :] == 7).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 2500)])
def test_gradients_that_are_not_finite(emulated, order, norm, shape):
    x, gradient, origin = pgd_problem(shape, 4)
    flat = gradient.view(6, -1)
    flat[1, -1] = torch.nan
    flat[2, 3], flat[2, 40] = torch.inf, -torch.inf
    flat[4, 50] = -torch.inf
    flat[5] = torch.nan
    for step in (0, 7, -2):
        results = []
        for backend in ("cuda", "torch"):
            broken = torch.tensor([-1, -1, -5, -1, 2, -1], dtype=torch.int32)
            moved = on_backend(backend, x, gradient, origin, alpha=0.1, eps=0.2, norm=norm, broken=broken, step=step)
            results.append((moved, broken))
        assert results[0][1].tolist() == results[1][1].tolist() == [-1, step, step, -1, 2, step]
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0 if norm == "linf" else 6 * 2**-24)
        assert torch.equal(on_backend("cuda", x, gradient, origin, alpha=0.1, eps=0.2, norm=norm), results[0][0])
    if norm == "l2":
        assert torch.equal(results[0][0][[1, 2, 4, 5]], x[[1, 2, 4, 5]])


def test_gradients_and_origins_that_are_not_contiguous(emulated):
    x, gradient, origin = pgd_problem((2, 3, 4, 5), 6)
    strided = gradient.contiguous(memory_format=torch.channels_last), origin.mT.contiguous().mT
    for norm in ("linf", "l2"):
        got, want = (on_backend("cuda", x, *t, alpha=0.1, eps=0.05, norm=norm) for t in (strided, (gradient, origin)))
        assert torch.equal(got, want)


def test_a_sample_has_the_same_bits_in_every_batch(emulated):
    x, gradient, origin = pgd_problem((5, 3, 40, 41), 7)
    whole = on_backend("cuda", x, gradient, origin, alpha=0.5, eps=0.6, norm="l2")
    for i in range(5):
        alone = on_backend("cuda", x[i : i + 1], gradient[i : i + 1], origin[i : i + 1], alpha=0.5, eps=0.6, norm="l2")
        assert torch.equal(alone[0], whole[i])


@given(
    samples=st.integers(0, 9), channels=st.integers(1, 5), inner=st.integers(0, 700), each=st.integers(0, 3),
    norm=st.sampled_from(pgd.NORMS), order=st.sampled_from(["forward", "reverse"]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_steps_of_arbitrary_shapes(emulated, samples, channels, inner, each, norm, order, seed):
    tensors = pgd_problem((samples, channels, inner), seed)
    values = list(pgd_values((samples, channels, inner)))[each]
    if norm == "l2":
        values |= {"alpha": values["alpha"][:, :1], "eps": values["eps"][:, :1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_SHIM_ORDER", order)
        got, want = (on_backend(b, *tensors, norm=norm, **values) for b in ("cuda", "torch"))
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else 6 * 2**-24)


@given(
    seed=st.integers(0, 2**64 - 1), index=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    count=st.integers(0, 5000),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_noise_has_the_bits_of_the_cpu(emulated, seed, index, count):
    index = torch.tensor(index, dtype=torch.int64)
    want = pgd_noise(index, count, seed=seed, backend="cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: "cuda")
        patch.setattr(pgd, "_queue", lambda _: emulated.Queue(0, 0))
        emulated.reset_last_kernel()
        assert torch.equal(pgd_noise(index, count, seed=seed), want)
    assert emulated.last_kernel() == "noise"


# --- transport


def solved(backend, solve):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: backend)
        return solve()


def problems(seed, count, m, n, high=2.0):
    return (high * np.random.default_rng(seed).random((count, m, n))).astype(np.float32)


def masses(seed, count, size, zeros=0):
    x = np.random.default_rng(seed).random((count, size)) + 0.1
    x[:, :zeros] = 0
    return (x / x.sum(axis=1, keepdims=True)).astype(np.float32)


def assert_transported(got, want):
    """In units of a mean entry. Exponents are made in double, so no error grows with cost / reg."""
    scale = want.mean() or 1.0
    np.testing.assert_allclose(got / scale, want / scale, rtol=3e-5, atol=3e-5)


def assert_all_transported(cost, reg, iterations, mu=None, nu=None, inner=None):
    """inner: IPOT. Against logarithms in double; masses (count, size)."""
    count, m, n = cost.shape
    options = {"max_iter": iterations, "mu": mu, "nu": nu, "details": True}
    if inner is None:
        found = solved("cuda", lambda: ops.sinkhorn(cost, reg, tol=0, **options))
    else:
        found = solved("cuda", lambda: ops.ipot(cost, reg, inner=inner, **options))
    rows = np.full((count, m), 1 / m) if mu is None else np.broadcast_to(mu, (count, m))
    columns = np.full((count, n), 1 / n) if nu is None else np.broadcast_to(nu, (count, n))
    assert (found.iterations == iterations).all()
    for i in range(count):
        some = np.ix_(rows[i] > 0, columns[i] > 0)  # without mass: zeros, which IPOT as it is written divides by
        case = cost[i][some], reg, rows[i][rows[i] > 0], columns[i][columns[i] > 0], iterations
        want = np.zeros((m, n))
        want[some] = _reference.sinkhorn(*case)[0] if inner is None else _reference.ipot(*case, inner)
        assert_transported(found.plan[i], want)
        assert found.error[i] == pytest.approx(np.abs(want.sum(axis=1) - rows[i]).sum(), abs=2e-5)


TRANSPORTED = [(1, 1), (1, 5), (7, 3), (32, 32), (33, 65)]


@pytest.mark.parametrize("reg", [1.0, 0.05, 0.001])
@pytest.mark.parametrize(("m", "n"), TRANSPORTED)
def test_sinkhorn_equals_logarithms_in_double(emulated, order, m, n, reg):
    for iterations in (1, 2, 30):
        assert_all_transported(problems(m, 2, m, n), reg, iterations)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize(("m", "n"), TRANSPORTED)
def test_ipot_equals_its_algorithm_in_double(emulated, order, m, n, inner):
    for beta, iterations in ((1.0, 20), (0.05, 1), (0.05, 7)):
        assert_all_transported(problems(n, 2, m, n) - np.float32(0.5), beta, iterations, inner=inner)


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
@pytest.mark.parametrize("tol", [0.03, 1e-3])
def test_every_problem_stops_when_torch_stops_it(emulated, order, stop, tol):
    cost = problems(5, 5, 15, 17) * np.array([0, 0.1, 0.5, 1, 3], np.float32)[:, None, None]
    found = {}
    for backend in ("cuda", "torch"):

        def call():
            return ops.sinkhorn(cost, 0.1, tol=tol, stop=stop, max_iter=60, details=True)

        found[backend] = solved(backend, call)
    counts = found["torch"].iterations
    assert len(set(counts.tolist())) > 2
    np.testing.assert_array_equal(found["cuda"].iterations, counts)
    np.testing.assert_allclose(found["cuda"].error, found["torch"].error, atol=1e-6)
    np.testing.assert_allclose(found["cuda"].plan, found["torch"].plan, rtol=1e-4, atol=1e-7)
    for i in range(5):
        alone = solved("cuda", lambda i=i: ops.sinkhorn(cost[i], 0.1, tol=tol, stop=stop, max_iter=60))
        np.testing.assert_array_equal(alone, found["cuda"].plan[i])


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
def test_steps_in_logarithms_stop_as_well(emulated, stop):
    """reg so small that the first steps are not scalings; also a tol that the first step is below."""
    cost = problems(6, 3, 9, 6)
    for reg, tol in ((0.004, 0.02), (0.004, 100.0), (1.0, 100.0)):

        def call(reg=reg, tol=tol):
            return ops.sinkhorn(cost, reg, tol=tol, stop=stop, max_iter=200, details=True)

        ours, theirs = solved("cuda", call), solved("torch", call)
        np.testing.assert_array_equal(ours.iterations, theirs.iterations)
        np.testing.assert_allclose(ours.plan, theirs.plan, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("stop", ["marginals", "potentials"])
def test_first_step_is_compared_with_potentials_of_zero(emulated, stop):
    """Zero potentials are the answer, or off by a little: not what the first kernel is made of."""
    off = np.array([0, 1e-4, 0.02], np.float32)[:, None, None]
    cost, mu, nu = problems(17, 3, 3, 4) * off, np.full(3, 4, np.float32), np.full(4, 3, np.float32)

    def call():
        return ops.sinkhorn(cost, 1.0, mu=mu, nu=nu, tol=1e-3, stop=stop, max_iter=9, details=True)

    ours, theirs = solved("cuda", call), solved("torch", call)
    assert ours.iterations.tolist() == theirs.iterations.tolist() and ours.iterations[0] == 1 < ours.iterations[2]


@pytest.mark.parametrize(("m", "n", "shared"), [(240, 250, 227 << 10), (33, 65, 8 << 10), (40, 31, 4 << 10)])
def test_kernels_that_do_not_fit_in_shared_memory(emulated, order, m, n, shared, monkeypatch):
    monkeypatch.setenv("CMR_SHIM_SHARED", str(shared))
    assert 4 * m * n > shared
    cost, mu, nu = problems(7, 1, m, n), masses(1, 1, m, zeros=3), masses(2, 1, n, zeros=1)
    assert_all_transported(cost, 0.1, 3, mu, nu)
    assert_all_transported(cost, 0.001, 2, mu, nu)
    assert_all_transported(cost, 0.5, 2, mu, nu, inner=2)


def test_more_columns_than_threads_and_more_rows_than_lanes(emulated, order):
    """A block takes several turns of rows, or of columns."""
    for m, n in ((1500, 2), (2, 1500), (1100, 30)):
        cost, mu, nu = problems(8, 1, m, n), masses(1, 1, m), masses(2, 1, n)
        assert_all_transported(cost, 0.3, 2, mu, nu)
        assert_all_transported(cost, 0.002, 1, mu, nu)


def test_more_rows_and_columns_than_the_kernel_takes(emulated):
    most = importlib.import_module("cmr_fast.ops.sinkhorn").MAX_CUDA_SIDES
    assert most == emulated.MOST_TRANSPORTED
    assert_all_transported(problems(9, 1, most - 1, 1), 0.3, 1)
    with pytest.raises(RuntimeError, match="too many rows and columns"):
        solved("cuda", lambda: ops.sinkhorn(problems(9, 1, most, 1), 0.3, max_iter=1))


@pytest.mark.parametrize("reg", [1.0, 0.001])
def test_masses_of_their_own_and_none(emulated, order, reg):
    cost = problems(10, 3, 10, 11)
    for mu, nu in (
        (masses(2, 3, 10), masses(3, 3, 11)),
        (masses(2, 3, 10)[0], masses(3, 3, 11)),
        (masses(2, 3, 10, zeros=4), masses(3, 3, 11, zeros=3)),
        (masses(2, 3, 10, zeros=9), None),
    ):
        assert_all_transported(cost, reg, 25, mu, nu)
        assert_all_transported(cost, max(reg, 0.05), 8, mu, nu, inner=2)
        options = {"mu": mu, "nu": nu, "max_iter": 40}
        for plans in (
            solved("cuda", lambda o=options: ops.sinkhorn(cost, reg, tol=0, **o)),
            solved("cuda", lambda o=options: ops.ipot(cost, max(reg, 0.01), **o)),
        ):
            assert np.isfinite(plans).all()
            assert not plans[np.broadcast_to(mu == 0, (3, 10))].any()
            np.testing.assert_allclose(
                plans.sum(axis=1), np.broadcast_to(1 / 11 if nu is None else nu, (3, 11)), atol=1e-6
            )


def test_no_problems_and_no_mass(emulated):
    none = np.zeros(3, np.float32)
    for solve in (lambda *x, **o: ops.sinkhorn(*x, tol=0, **o), ops.ipot):
        assert solved("cuda", lambda s=solve: s(np.zeros((0, 3, 4), np.float32), 0.1)).shape == (0, 3, 4)

        def call(s=solve):
            return s(problems(11, 2, 3, 3), 0.1, mu=none, nu=none, max_iter=5)

        assert not solved("cuda", call).any()


@pytest.mark.parametrize(("reg", "beta"), [(1e-3, 1e-3), (1e-4, 1e-2)])
def test_where_the_exponentials_themselves_would_be_zero(emulated, reg, beta):
    cost = problems(12, 2, 24, 20)
    plans = solved("cuda", lambda: ops.sinkhorn(cost, reg, max_iter=150, tol=0))
    proximal = solved("cuda", lambda: ops.ipot(cost, beta, max_iter=100))
    for plan, found in zip(plans, proximal, strict=True):
        np.testing.assert_allclose(plan.sum(axis=0), 1 / 20, rtol=1e-5)
        np.testing.assert_allclose(found.sum(axis=0), 1 / 20, rtol=1e-5)
    cost[:, :, 3] += 40
    cost[:, 5] -= 30
    for offset in (1000, -1000):
        assert_all_transported(cost + np.float32(offset), 0.1, 25)


def test_converged_plans_have_their_marginals(emulated):
    cost = problems(13, 2, 16, 20)
    for reg in (0.5, 0.05):
        found = solved("cuda", lambda reg=reg: ops.sinkhorn(cost, reg, max_iter=3000, details=True))
        assert (found.iterations < 3000).all() and (found.error < 1e-4).all()
        np.testing.assert_allclose(found.plan.sum(axis=2), 1 / 16, atol=1e-4 / 16)
        np.testing.assert_allclose(found.plan.sum(axis=1), 1 / 20, atol=1e-4 / 20)


def test_values_that_are_not_finite_stay_in_their_problem(emulated):
    cost = torch.from_numpy(problems(14, 3, 6, 7))

    def call():
        return ops.sinkhorn(cost, 0.1, max_iter=20)

    want = solved("cuda", call)
    cost[1, 2, 3] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("cmr_fast.ops.sinkhorn"), "_check_values", lambda *_: None)
        found = solved("cuda", call)
    assert not found[1].isfinite().all()
    assert torch.equal(found[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(emulated, dtype):
    cost = torch.from_numpy(problems(15, 2, 12, 10)).to(dtype)
    half, single = (solved("cuda", lambda c=c: ops.sinkhorn(c, 0.1, max_iter=20, tol=0)) for c in (cost, cost.float()))
    assert half.dtype == dtype and single.dtype == torch.float32
    # uniform masses are rounded to the type of cost
    torch.testing.assert_close(half.float(), single, rtol=2e-2, atol=1e-5)


def test_same_bits_in_any_order_of_threads(emulated, monkeypatch):
    cost = problems(16, 2, 40, 33)
    calls = [lambda: ops.sinkhorn(cost, 0.003, max_iter=20), lambda: ops.ipot(cost, 0.5, max_iter=5)]
    for call in calls:
        plans = []
        for direction in ("forward", "reverse"):
            monkeypatch.setenv("CMR_SHIM_ORDER", direction)
            plans.append(solved("cuda", call))
        np.testing.assert_array_equal(*plans)


@given(
    m=st.integers(1, 40), n=st.integers(1, 40), count=st.integers(0, 2), log_reg=st.floats(-3, 1),
    iterations=st.integers(1, 20), high=st.floats(0, 3), seed=st.integers(0, 2**31), shared=st.sampled_from([4, 227]),
    order=st.sampled_from(["forward", "reverse"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_arbitrary_transport(emulated, m, n, count, log_reg, iterations, high, seed, shared, order):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_SHIM_ORDER", order)
        patch.setenv("CMR_SHIM_SHARED", str(shared << 10))
        cost, mu, nu = problems(seed, count, m, n, high), masses(seed, count, m), masses(seed + 1, count, n)
        assert_all_transported(cost, 10**log_reg, iterations, mu, nu)
