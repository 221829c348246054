"""When an index builds search tables, and that nobody can tell by the results."""

import threading

import numpy as np
import pytest

from cmr_fast.ops import hamming_topk, multi_index
from cmr_fast.retrieval._plan import SearchPlan
from cmr_fast.retrieval.index import HammingIndex


def clustered(rng, n, bits=64):
    centres = rng.integers(0, 2, (max(1, n // 200), bits), dtype=np.uint8)
    values = centres[rng.integers(0, len(centres), n)] ^ (rng.random((n, bits)) < 0.03)
    return np.packbits(values, axis=1, bitorder="little")


@pytest.fixture
def cheap(monkeypatch):
    """Tables cost nothing to build: the first search is one too many without them."""
    monkeypatch.setattr(multi_index, "MIN_CODES", 1)
    monkeypatch.setattr(multi_index, "build_cost", lambda n, bits: 0.0)
    monkeypatch.setattr(multi_index, "estimated_cost", lambda *_: 0.0)
    monkeypatch.setattr(multi_index.SearchTables, "worth_it", lambda self, k: True)


def test_tables_are_built_once_scanning_has_cost_as_much(monkeypatch):
    rng = np.random.default_rng(0)
    db = clustered(rng, 100_000)
    plan = SearchPlan()
    cost = multi_index.build_cost(len(db), 64)
    per_search = multi_index.scan_cost(*db.shape, 50, 5)
    searches = int(cost / per_search)
    expected = hamming_topk(db[:50], db, 5)
    monkeypatch.setattr(multi_index, "estimated_cost", lambda *_: 0.0)
    plan._scanned = (searches - 2) * per_search
    for i in range(4):
        got = plan.topk(db[:50], db, 5, 64, 1)
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])
        assert (plan.tables is not None) == (i >= 2), i
    assert plan.nbytes == plan.tables.nbytes > 0


def test_random_codes_keep_the_scan_and_are_not_looked_at_again(monkeypatch):
    rng = np.random.default_rng(0)
    db = rng.integers(0, 256, (100_000, 16), dtype=np.uint8)
    monkeypatch.setattr(multi_index, "build_cost", lambda n, bits: 0.0)
    plan = SearchPlan()
    plan.topk(db[:3], db, 10, 128, 1)
    assert plan.tables is None and plan._hopeless == 10
    looked = []
    monkeypatch.setattr(multi_index, "estimated_cost", lambda *_: looked.append(1) or 1.0)
    plan.topk(db[:3], db, 11, 128, 1)
    assert not looked
    plan.topk(db[:3], db, 9, 128, 1)
    assert looked and plan._hopeless == 9


@pytest.mark.parametrize("bits", [12, 40, 64, 100])
def test_an_index_gives_the_same_answers_with_tables(cheap, bits):
    rng = np.random.default_rng(bits)
    db, q = clustered(rng, 3000, bits), clustered(rng, 20, bits)
    plain, index = HammingIndex(bits), HammingIndex(bits)
    plain.tables = False
    ids = rng.permutation(10_000)[:3000]
    for each in (plain, index):
        each.add(db[:2000], ids[:2000])
    before = index.memory_usage()["memory"]
    for change in (
        lambda each: None,
        lambda each: each.add(db[2000:], ids[2000:]),
        lambda each: each.remove_ids(ids[100:200]),
    ):
        for each in (plain, index):
            change(each)
        for k in (1, 30, 3100):
            for got, expected in zip(index.search(q, k), plain.search(q, k), strict=True):
                np.testing.assert_array_equal(got, expected)
        assert all(index._plans[part].tables is not None for part in index._parts)
        assert not plain._plans
    assert index.memory_usage()["memory"] > before


def test_a_mapped_file_is_never_copied_into_tables(cheap, tmp_path):
    rng = np.random.default_rng(0)
    index = HammingIndex(64)
    index.add(clustered(rng, 200_000))
    index.save(tmp_path / "index")
    mapped = HammingIndex.load(tmp_path / "index")
    mapped.search(clustered(rng, 5), 3)
    assert mapped.memory_usage()["mapped"] > 0
    assert not mapped._plans


def test_while_one_thread_builds_the_others_scan(cheap, monkeypatch):
    rng = np.random.default_rng(0)
    db = clustered(rng, 3000)
    building, finish = threading.Event(), threading.Event()
    build = multi_index.SearchTables.build

    def slow(*args, **options):
        building.set()
        assert finish.wait(30)
        return build(*args, **options)

    monkeypatch.setattr(multi_index.SearchTables, "build", slow)
    plan = SearchPlan()
    builder = threading.Thread(target=plan.topk, args=(db[:3], db, 5, 64, 1))
    builder.start()
    assert building.wait(30)
    found = plan.topk(db[:3], db, 5, 64, 1)
    assert plan.tables is None
    np.testing.assert_array_equal(found[1], hamming_topk(db[:3], db, 5)[1])
    finish.set()
    builder.join()
    assert plan.tables is not None
