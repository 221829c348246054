"""Streams of single queries: what HammingIndex.search finds, into arrays that are made once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.errors import InputError
from cmr_fast.ops import multi_index
from cmr_fast.retrieval.index import HammingIndex


def codes(rng, n, bits):
    return np.packbits(rng.integers(0, 2, (n, bits), dtype=np.uint8), axis=1, bitorder="little")


def assert_same(searcher, index, queries, k):
    for q in queries:
        for one in (q, q[None]):
            got = searcher.search(one)
            for a, b in zip(got, index.search(q[None], k), strict=True):
                np.testing.assert_array_equal(a, b[0] if one.ndim == 1 else b)
                assert a.dtype == b.dtype


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 60),
    st.integers(1, 80),
    st.sampled_from(["counted", "later", "own"]),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_finds_what_a_search_finds(bits, n, k, ids, threads, seed):
    rng = np.random.default_rng(seed)
    index = HammingIndex(bits)
    searcher = index.searcher(k, threads)
    queries = codes(rng, 3, bits)
    assert_same(searcher, index, queries, k)
    names = {"counted": None, "later": np.arange(n) + 7, "own": rng.permutation(1000)[:n]}[ids]
    index.add(codes(rng, n, bits), names)
    assert_same(searcher, index, queries, k)
    index.add(codes(rng, 20, bits))
    assert_same(searcher, index, queries, k)
    index.remove_ids(index.ids[3:])
    assert_same(searcher, index, queries, k)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([8, 16, 20, 32, 64, 72, 256, 328]),
    st.integers(0, 150),
    st.integers(0, 4),
    st.integers(1, 170),
    st.sampled_from(["counted", "later", "own"]),
    st.integers(0, 2**32),
)
def test_a_small_search_at_once_finds_what_threads_and_filters_find(bits, n, queries, k, ids, seed):
    rng = np.random.default_rng(seed)
    index = HammingIndex(bits)
    index.add(codes(rng, n, bits), {"counted": None, "later": np.arange(n) + 7, "own": rng.permutation(1000)[:n]}[ids])
    q = codes(rng, queries, bits)
    at_once = index.search(q, k)
    for other in (index.search(q, k, threads=2), index.search(q, k, where=np.ones(n, bool))):
        for a, b in zip(at_once, other, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize(
    ("name", "value"), [("CMR_FAST_BACKEND", "gpu"), ("CMR_FAST_ISA", "mmx"), ("CMR_FAST_THREADS", "0")]
)
def test_a_small_search_obeys_settings(monkeypatch, name, value):
    index = HammingIndex(64)
    index.add(np.zeros((4, 8), np.uint8))
    q = np.zeros((1, 8), np.uint8)
    index.search(q, 2)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}"):
        index.search(q, 2)
    monkeypatch.setenv(name, "")
    assert index.search(q, 2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_mapped_parts_and_other_backends(tmp_path, monkeypatch, backend):
    monkeypatch.setenv("CMR_FAST_BACKEND", backend)
    rng = np.random.default_rng(0)
    made = HammingIndex(2048)
    made.add(codes(rng, 6000, 2048))
    made.save(tmp_path / "index")
    index = HammingIndex.load(tmp_path / "index")
    assert index.memory_usage()["mapped"] > 0
    searcher = index.searcher(5)
    assert_same(searcher, index, codes(rng, 2, 2048), 5)
    index.add(codes(rng, 10, 2048))
    assert_same(searcher, index, made.codes[:2], 5)


def test_tables_serve_it_too(monkeypatch):
    monkeypatch.setattr(multi_index, "MIN_CODES", 1)
    monkeypatch.setattr(multi_index, "build_cost", lambda n, bits: 0.0)
    monkeypatch.setattr(multi_index, "estimated_cost", lambda *_: 0.0)
    monkeypatch.setattr(multi_index.SearchTables, "worth_it", lambda self, k: True)
    rng = np.random.default_rng(0)
    index, scan = HammingIndex(64), HammingIndex(64)
    for each in (index, scan):
        each.add(codes(np.random.default_rng(1), 3000, 64))
    scan.tables = False
    searcher = index.searcher(4)
    assert_same(searcher, scan, codes(rng, 3, 64), 4)
    assert index._plan_of(index._parts[0]).tables is not None
    index.tables = False
    assert_same(searcher, scan, codes(rng, 3, 64), 4)


def test_results_are_overwritten_by_the_next_call():
    rng = np.random.default_rng(0)
    index = HammingIndex(64)
    index.add(codes(rng, 50, 64))
    searcher, q = index.searcher(3), index.codes[:2]
    first = searcher.search(q[0])
    assert first[1][0] == 0
    second = searcher.search(q[1])
    assert first[0] is second[0] and first[1] is second[1] and first[1][0] == 1


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (np.zeros((2, 3), np.uint8), "one packed code.*got 2"),
        (np.zeros((0, 3), np.uint8), "one packed code.*got 0"),
        (np.zeros((3, 1), np.uint8), "must have 20 bits"),
        (np.zeros((1, 1, 3), np.uint8), "packed codes"),
        (np.zeros(4, np.uint8), "must have 20 bits"),
        (np.zeros(3, np.int64), "uint8"),
        (np.full(3, 255, np.uint8), "beyond bit 20"),
        (torch.zeros(3, dtype=torch.uint8), "numpy array"),
        ([1, 2, 3], "numpy array"),
    ],
)
def test_anything_but_one_code_is_refused(q, message):
    index = HammingIndex(20)
    index.add(np.zeros((4, 3), np.uint8))
    searcher = index.searcher(2)
    with pytest.raises(InputError, match=message):
        searcher.search(q)
    assert searcher.search(np.zeros(3, np.uint8))[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("k", "threads", "message"), [(0, None, "k must be"), (1.5, None, "k must"), (1, 0, "threads")]
)
def test_counts_are_checked(k, threads, message):
    with pytest.raises(InputError, match=message):
        HammingIndex(20).searcher(k, threads)
