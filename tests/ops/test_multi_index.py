"""Search tables against the scan and the naive oracle: lengths, ties, duplicates, clusters, giving up, threads."""

import concurrent.futures
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch, _reference, hamming_topk, multi_index
from cmr_fast.ops.multi_index import SearchTables

NATIVE = _dispatch.native()
ISAS = NATIVE.available_isas() if not isinstance(NATIVE, ImportError) else []
KINDS = ("random", "duplicates", "clusters", "few values")


def codes(rng, n, bits, kind="random"):
    values = rng.integers(0, 2, (n, bits), dtype=np.uint8)
    if n and kind != "random":
        values = values[rng.integers(0, max(1, n // 40), n)]
    if kind == "clusters":
        values = values ^ (rng.random((n, bits)) < rng.random(bits) * 0.15)
    if kind == "few values":  # substrings that are all the same but one
        values[:, bits // 3 :] = 1
    return np.packbits(values, axis=1, bitorder="little")


def assert_same(got, expected):
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [1, 5, 8, 13, 16, 17, 24, 31, 40, 64, 65, 72, 100, 128, 129, 256, 500])
def test_equals_a_stable_sort(isa, bits, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    rng = np.random.default_rng(bits)
    for kind in KINDS:
        db = codes(rng, 300, bits, kind)
        q = np.concatenate([codes(rng, 3, bits), db[:4]])
        tables = SearchTables.build(db, bits)
        for k in (1, 7, 310):
            expected = _reference.hamming_topk(q, db, k, bits)
            NATIVE.reset_last_isa()
            assert_same(tables.search(q, k), expected)
            assert NATIVE.last_isa() == isa
            # never giving up walks 2^(bits of a substring) buckets where nothing is near
            if k < 300 and max(length for _, length, *_ in tables._tables) <= 13:
                assert_same(tables.search(q, k, effort=math.inf), expected)


@given(
    bits=st.integers(17, 256),
    length=st.integers(6, 12),
    n=st.integers(0, 400),
    k=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    effort=st.sampled_from([0.0, 0.05, 1.0, 100.0, math.inf]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_scan_however_codes_are_cut_and_whatever_is_given_up(
    bits, length, n, k, kind, effort, threads, seed
):
    rng = np.random.default_rng(seed)
    db = codes(rng, n, bits, kind)
    q = np.concatenate([codes(rng, 9, bits), db[:9]])
    tables = SearchTables.build(db, bits, substrings=-(-bits // length), threads=threads)
    assert_same(tables.search(q, k, threads=threads, effort=effort), hamming_topk(q, db, k, bits=bits))


@given(
    bits=st.integers(1, 16),
    n=st.integers(0, 3000),
    k=st.integers(1, 3100),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_few_bits_are_one_table(bits, n, k, kind, seed):
    rng = np.random.default_rng(seed)
    db, q = codes(rng, n, bits, kind), codes(rng, 5, bits)
    tables = SearchTables.build(db, bits)
    assert len(tables._tables) == 1
    assert_same(tables.search(q, k, effort=math.inf), hamming_topk(q, db, k, bits=bits))


@pytest.mark.parametrize("bits", [24, 64, 96])
def test_ties_at_the_last_distance_go_to_the_lower_index(bits):
    rng = np.random.default_rng(0)
    q = codes(rng, 1, bits)
    ring = np.unpackbits(q, axis=1, bitorder="little").repeat(2000, 0)  # 2000 codes at distance 2, in any table
    for row in ring:
        row[rng.choice(bits, 2, replace=False)] ^= 1
    db = np.packbits(ring, axis=1, bitorder="little")
    tables = SearchTables.build(db, bits, substrings=-(-bits // 10))
    for k in (1, 10, 300):
        distances, indices = tables.search(q, k, effort=math.inf)
        assert (distances == 2).all() and indices[0].tolist() == list(range(k))


def test_clustered_codes_are_found_without_scanning_and_random_ones_are_given_up():
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, (5000, 64), dtype=np.uint8)[rng.integers(0, 5000, 10**6)]
    clustered = np.packbits(centres ^ (rng.random((10**6, 64), np.float32) < 0.03), axis=1, bitorder="little")
    tables = SearchTables.build(clustered)
    _, _, done, cost = tables._search(torch.from_numpy(clustered[:200]), 10, 1, multi_index.EFFORT)
    scan = multi_index.scan_cost_of_one(10**6, 8, 200, 10)
    assert done.float().mean() > 0.95 and cost.mean() < scan / 2
    assert tables.worth_it(10) and multi_index.estimated_cost(clustered, 64, 10) < 0.7

    db, q = codes(rng, 400_000, 128), codes(rng, 200, 128)
    tables = SearchTables.build(db)
    distances, indices, done, cost = tables._search(torch.from_numpy(q), 10, 1, multi_index.EFFORT)
    scan = multi_index.scan_cost_of_one(400_000, 16, 200, 10)
    assert not done.any() and cost.sum() <= 1.1 * multi_index.EFFORT * scan * len(q)
    assert (indices == -1).all() and (distances == 129).all()  # untouched
    assert not tables.worth_it(10) and tables.expected_cost(9) == tables.expected_cost(16)
    assert multi_index.estimated_cost(db, 128, 10) > 0.9
    assert_same(tables.search(q, 10), hamming_topk(q, db, 10))


def test_queries_unlike_the_codes_cost_little_more_than_the_scan():
    """Tables that pay for queries like the codes, asked for others: the account runs dry, the answer stays."""
    rng = np.random.default_rng(0)
    db, q = codes(rng, 100_000, 96, "clusters"), codes(rng, 160, 96)
    tables = SearchTables.build(db)
    *_, done, cost = tables._search(torch.from_numpy(q), 10, 1, multi_index.EFFORT)
    scan = multi_index.scan_cost_of_one(100_000, 12, len(q), 10)
    assert float(cost.sum() + (~done).sum() * scan) <= 1.15 * scan * len(q)
    assert_same(tables.search(q, 10), hamming_topk(q, db, 10))


def test_memory_is_what_the_arrays_take():
    rng = np.random.default_rng(0)
    db = codes(rng, 5000, 64, "duplicates")
    tables = SearchTables.build(db, substrings=6)
    different = len(np.unique(db, axis=0))
    buckets = sum((1 << length) + 2 for _, length, *_ in tables._tables)
    assert tables.nbytes == 4 * 5000 + 4 * (different + 1) + 4 * buckets + 6 * 8 * different + 5 * 4 * different
    assert len(tables) == 5000 and "ntotal=5000" in repr(tables)


def test_threads_and_callers_do_not_change_the_result():
    rng = np.random.default_rng(0)
    db, q = codes(rng, 20_000, 48, "clusters"), codes(rng, 100, 48, "clusters")
    expected = hamming_topk(q, db, 20)
    one, three = SearchTables.build(db, threads=1), SearchTables.build(db, threads=3)
    for a, b in zip(one._tables, three._tables, strict=True):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(a[2:], b[2:], strict=True))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for got in pool.map(lambda i: one.search(q, 20, threads=1 + i % 3), range(12)):
            assert_same(got, expected)


def test_torch_in_torch_out_and_read_only_or_strided_arrays():
    rng = np.random.default_rng(0)
    wide = codes(rng, 500, 96)
    frozen = wide[:, 2:10].copy()
    frozen.flags.writeable = False
    expected = hamming_topk(frozen[:3], frozen, 4)
    assert_same(SearchTables.build(wide[:, 2:10]).search(wide[:3, 2:10], 4), expected)
    assert_same(SearchTables.build(frozen).search(frozen[:3], 4), expected)
    distances, indices = SearchTables.build(torch.from_numpy(wide)).search(torch.from_numpy(wide[:3]), 2)
    assert isinstance(distances, torch.Tensor) and indices.dtype == torch.int64 and distances.dtype == torch.int32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: SearchTables.build(x, substrings=2), "cut into 3 to 64 substrings, got 2"),
        (lambda x: SearchTables.build(x, substrings=65), "got 65"),
        (lambda x: SearchTables.build(x, 50), "57 to 64"),
        (lambda x: SearchTables.build(x.astype(np.int8)), "int8"),
        (lambda x: SearchTables.build(np.full((3, 2), 255, np.uint8), 12), "beyond bit 12"),
        (lambda x: SearchTables.build(x).search(x[:, :4], 1), "q has 4 bytes a code, db has 8"),
        (lambda x: SearchTables.build(x).search(torch.from_numpy(x[:, :4].copy()), 1), "q has 4 bytes"),
        (lambda x: SearchTables.build(x).search(x, 0), "k must be .* got 0"),
        (lambda x: SearchTables.build(x).search(x, 1, effort=-1.0), "effort .* got -1"),
        (lambda x: SearchTables.build(x).search(x, 1, effort=math.nan), "effort .* got nan"),
        (lambda x: SearchTables.build(x[:, :2], 12).search(np.full((1, 2), 255, np.uint8), 1), "q .*beyond bit 12"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(call, message):
    x = codes(np.random.default_rng(0), 30, 64)
    x[:, 1] &= 15
    with pytest.raises(InputError, match=message):
        call(x)


def test_without_the_native_kernels_there_are_no_tables(monkeypatch):
    x = codes(np.random.default_rng(0), multi_index.MIN_CODES, 8)
    assert multi_index.available(x) and not multi_index.available(x[1:])
    monkeypatch.setenv("CMR_FAST_BACKEND", "torch")
    assert not multi_index.available(x)
    monkeypatch.setattr(_dispatch, "native", lambda: ImportError("not built"))
    with pytest.raises(InputError, match=r"native kernels.*not built"):
        SearchTables.build(x)
