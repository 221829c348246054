"""Hamming search by the CUDA kernels, emulated on the host (conftest.py)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.ops import _reference
from cmr_fast.ops.cuda import hamming as hamming_cuda


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
    hamming_cuda.topk(torch.from_numpy(q), torch.from_numpy(db), k, distances, indices)
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
        patch.setattr(hamming_cuda, "device_of", lambda tensor: hamming_cuda.Device(1, 1 << 30))
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
    monkeypatch.setattr(hamming_cuda, "MOST_LISTED", 10)
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
        monkeypatch.setattr(hamming_cuda, "device_of", lambda tensor, w=workspace: hamming_cuda.Device(64, w))
        assert_topk(q, db, 9)
        assert_topk(q[:3], db, 4000)


@pytest.mark.parametrize("nbytes", [1, 4, 6, 8, 32, 129])
def test_range_and_table(emulated, order, nbytes):
    rng = np.random.default_rng(nbytes)
    q, db = codes(rng, 9, nbytes), codes(rng, 2700, nbytes)
    tensors = torch.from_numpy(q), torch.from_numpy(db)
    for radius in (0, 4 * nbytes - 1, 8 * nbytes, 10**6):
        expected = _reference.hamming_range(q, db, radius)
        for got, want in zip(hamming_cuda.range_search(*tensors, radius), expected, strict=True):
            np.testing.assert_array_equal(got.numpy(), want)
    out = torch.full((len(q), len(db)), -7, dtype=torch.int32)
    hamming_cuda.table(*tensors, out)
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
        hamming_cuda.histograms(*(torch.from_numpy(x) for x in (q, db, *labels)), items, relevant)
        for row in range(len(q)):
            for got, chosen in ((items, slice(None)), (relevant, shared[row])):
                expected = np.bincount(distances[row][chosen], minlength=8 * nbytes + 1)
                np.testing.assert_array_equal(got[row], expected)


@given(
    nbytes=st.integers(1, 40), n=st.integers(1, 2000), queries=st.integers(1, 20), k=st.integers(1, 700),
    values=st.integers(1, 256), warps=st.integers(1, 200), seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(hamming_cuda.FORMS), order=st.sampled_from(["forward", "reverse"]),
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
        patch.setattr(hamming_cuda, "device_of", lambda tensor: hamming_cuda.Device(warps, 1 << 30))
        assert_topk(q, db, k)


def test_nothing_to_search(emulated):
    empty, some = torch.empty((0, 8), dtype=torch.uint8), torch.zeros((3, 8), dtype=torch.uint8)
    for q, db in ((empty, some), (some, empty)):
        lims, distances, indices = hamming_cuda.range_search(q, db, 5)
        assert len(lims) == len(q) + 1 and not lims.any() and len(distances) == len(indices) == 0
        hamming_cuda.topk(q, db, 1, torch.empty((len(q), 1), dtype=torch.int32), torch.empty((len(q), 1)).long())
        hamming_cuda.table(q, db, torch.empty((len(q), len(db)), dtype=torch.int32))
        items, relevant = torch.full((2, len(q), 65), -5)
        hamming_cuda.histograms(q, db, q[:, :1], db[:, :1], items, relevant)
        assert not items.any() and not relevant.any()


def test_codes_at_odd_addresses(emulated):
    rng = np.random.default_rng(0)
    q, db = codes(rng, 3, 8), codes(rng, 400, 8)
    raw = torch.zeros(db.size + 1, dtype=torch.uint8)
    raw[1:] = torch.from_numpy(db.reshape(-1))
    lims, _, indices = hamming_cuda.range_search(torch.from_numpy(q), raw[1:].view(400, 8), 28)
    expected = _reference.hamming_range(q, db, 28)
    np.testing.assert_array_equal(lims.numpy(), expected[0])
    np.testing.assert_array_equal(indices.numpy(), expected[2])
