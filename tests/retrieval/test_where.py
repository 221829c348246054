"""Searches among some codes, and the k nearest within a radius, against searches of everything."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import multi_index_range
from cmr_fast.ops.multi_index_range import Sample, Split
from cmr_fast.retrieval import _where


def codes(rng, n, nbytes=8):
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)[rng.integers(0, max(1, n // 5), n)]
    return x ^ np.packbits(rng.random((n, 8 * nbytes)) < 0.03, axis=1)


def tables_at_once(monkeypatch):
    """Tables for every radius below 9, whatever they cost, from the first search on."""
    monkeypatch.setattr(multi_index_range, "MIN_CODES", 1)
    monkeypatch.setattr(multi_index_range, "least_cost", lambda n: 0.0)
    monkeypatch.setattr(Split, "build_cost", 0.0)
    monkeypatch.setattr(
        Sample,
        "best",
        lambda self, radius, memory: Split(self.masks(max(1, radius)), radius, 0.0) if radius < 9 else None,
    )


def expected(index, q, allowed, k, radius):
    """(lims, distances, ids) by radius, and (distances, ids) of the k nearest within it, by the table of distances."""
    distances, ids = cf.hamming_distances(q, index.codes), index.ids
    hits = [np.flatnonzero(allowed & (row <= radius)) for row in distances]
    lims = np.concatenate([[0], np.cumsum([len(rows) for rows in hits])])
    near, named = np.full((len(q), k), index.bits + 1, np.int32), np.full((len(q), k), -1)
    for i, rows in enumerate(hits):
        best = rows[np.argsort(distances[i, rows], kind="stable")][:k]
        near[i, : len(best)], named[i, : len(best)] = distances[i, best], ids[best]
    every = np.concatenate([distances[i, rows] for i, rows in enumerate(hits)])
    return (lims, every, np.concatenate([ids[rows] for rows in hits])), (near, named)


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def index_of(rng, n, own_ids):
    index = cf.HammingIndex(64)
    index.add(codes(rng, n))
    if own_ids:
        index.add(codes(rng, n // 2), rng.permutation(np.arange(10 * n, 10 * n + n // 2)))
    return index


@pytest.mark.parametrize("tables", [False, True])
@given(
    n=st.integers(1, 300),
    own_ids=st.booleans(),
    removed=st.booleans(),
    share=st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0]),
    kind=st.sampled_from(["mask", "ids", "tensor", "list", "range", "none"]),
    k=st.integers(1, 20),
    radius=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_search_of_everything_that_leaves_the_others_out(
    tables, n, own_ids, removed, share, kind, k, radius, seed
):
    rng = np.random.default_rng(seed)
    index = index_of(rng, n, own_ids)
    if removed and n > 4:
        index.remove_ids(rng.choice(index.ids, 3, replace=False))
    index.tables = tables
    q = np.concatenate([index.codes[:5], codes(rng, 3)])
    allowed = rng.random(index.ntotal) < share
    where = None
    if kind == "mask":
        where = allowed
    elif kind == "range":
        first, last = sorted(rng.integers(0, index.ntotal + 1, 2).tolist())
        ids = set(index.ids.tolist())
        while last > first and not ids.issuperset(range(first, last)):
            last -= 1
        where, allowed = range(first, last), (index.ids >= first) & (index.ids < last)
    elif kind == "none":
        allowed = np.ones(index.ntotal, bool)
    else:
        where = rng.permutation(index.ids[allowed])
        where = torch.from_numpy(where) if kind == "tensor" else where.tolist() if kind == "list" else where
    with pytest.MonkeyPatch.context() as patch:
        tables_at_once(patch)
        by_radius, nearest = expected(index, q, allowed, k, radius)
        assert_same(index.range_search(q, radius, where=where), by_radius)
        assert_same(index.search(q, k, radius=radius, where=where), nearest)
        _, everything = expected(index, q, allowed, k, 64)
        assert_same(index.search(q, k, where=where), everything)


def test_tables_are_built_for_the_largest_radius_and_serve_the_smaller(monkeypatch):
    tables_at_once(monkeypatch)
    rng = np.random.default_rng(0)
    index = index_of(rng, 500, False)
    q = codes(rng, 20)
    mask = rng.random(500) < 0.7
    memory = index.memory_usage()["memory"]
    for radius in (2, 5, 3, 0, 20):
        by_radius, nearest = expected(index, q, np.ones(500, bool), 4, radius)
        assert_same(index.range_search(q, radius), by_radius)
        assert_same(index.search(q, 4, radius=radius), nearest)
        by_radius, nearest = expected(index, q, mask, 4, radius)
        assert_same(index.range_search(q, radius, where=mask), by_radius)
        assert_same(index.search(q, 4, radius=radius, where=mask), nearest)
        plan = next(iter(index._plans.values()))
        assert plan.ranges.split.radius == (2 if radius == 2 else 5)
    assert plan._hopeless_radius == 20
    assert index.memory_usage()["memory"] == memory + plan.ranges.nbytes


def test_tables_of_one_radius_wait_until_scanning_has_cost_as_much(monkeypatch):
    rng = np.random.default_rng(0)
    index = cf.HammingIndex(256)
    index.add(rng.integers(0, 256, (30_000, 32), dtype=np.uint8))
    q = index.codes[:4]
    wanted = cf.hamming_range(q, index.codes, 4, tables=False)
    plan = index._plan_of(index._parts[0])
    assert_same(index.range_search(q, 4, threads=1), wanted)
    assert plan.ranges is None and plan._ranged > 0
    plan._ranged = 1e12
    assert_same(index.range_search(q, 4, threads=1), wanted)
    assert plan.ranges is not None and plan.ranges.nbytes <= 1.5 * 32 * 30_000
    index.tables = False
    assert_same(index.range_search(q, 4, threads=1), wanted)


def test_many_rows_are_copied_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    index = index_of(rng, 300, True)
    q, mask = codes(rng, 6), rng.random(450) < 0.5
    wanted = index.search(q, 7, where=mask), index.range_search(q, 20, where=mask)
    monkeypatch.setattr(_where, "_BYTES", 80)
    assert_same(index.search(q, 7, where=mask), wanted[0])
    assert_same(index.range_search(q, 20, where=mask), wanted[1])


def test_what_is_mapped_from_a_file_is_filtered_too(tmp_path):
    rng = np.random.default_rng(0)
    index = cf.HammingIndex(512)
    index.add(codes(rng, 20_000, 64))
    index.save(tmp_path / "x.cmrx")
    opened, mask, q = cf.HammingIndex.load(tmp_path / "x.cmrx"), rng.random(20_000) < 0.1, index.codes[:5]
    assert_same(opened.search(q, 5, where=mask), index.search(q, 5, where=mask))
    assert_same(opened.range_search(q, 40, where=mask), index.range_search(q, 40, where=mask))
    assert opened.search(q, 5, where=[])[1].max() == -1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (np.ones(9, bool), r"where must be \(10,\) bool.* got bool \(9,\)"),
        (np.ones((10, 1), bool), r"got bool \(10, 1\)"),
        ([3, 12, 11], "where must name ids of the index: 2 are not, the first is 11"),
        (range(5, 11), "1 are not, the first is 10"),
        ([3, 3], "where: ids must not repeat"),
        ([1.5], "bool mask, integer ids or a range of them, got float64"),
        ({3}, "got set"),
        (slice(3), "got slice"),
        ("ab", "where must"),
        (range(2**40), r"ids of the index, which are 10 at most, got range\(0, 1099511627776\)"),
        (range(10**30), "which are 10 at most, got range"),
        (range(2**63, 2**63 + 2), "where: ids must be int64, got 9223372036854775809"),
        (torch.ones(10, dtype=torch.bool, device="meta"), r"where must be a dense tensor .*torch.bool \(10,\) on meta"),
        (torch.ones(10, dtype=torch.int64).to_sparse(), "where must be a dense tensor .*sparse_coo"),
        (torch.ones(10, dtype=torch.bfloat16), "where must be a dense tensor .*bfloat16"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(where, message):
    index = cf.HammingIndex(64)
    index.add(np.zeros((10, 8), np.uint8))
    q = np.zeros((1, 8), np.uint8)
    for search in (lambda: index.search(q, 1, where=where), lambda: index.range_search(q, 1, where=where)):
        with pytest.raises(InputError, match=message):
            search()


def test_a_radius_below_0_is_refused():
    index = cf.HammingIndex(64)
    with pytest.raises(InputError, match=r"radius .* got -1"):
        index.search(np.zeros((1, 8), np.uint8), 1, radius=-1)
