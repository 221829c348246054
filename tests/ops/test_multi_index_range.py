"""Tables for a known radius against the scan: bits, radii, duplicates, dead bits, filters, giving up, threads."""

import concurrent.futures
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import _reference, multi_index_range
from cmr_fast.ops.multi_index_range import RangeTables, Sample, Split, kept, reaches, scan_range

KINDS = ("random", "duplicates", "clusters", "dead bits")


def codes(rng, n, nbytes, kind="random"):
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    if n and kind != "random":
        x = x[rng.integers(0, max(1, n // 40), n)]
    if kind == "clusters":
        x = x ^ np.packbits(rng.random((n, 8 * nbytes)) < 0.04, axis=1)
    if kind == "dead bits":
        x = x ^ np.packbits(rng.random((n, 8 * nbytes)) < 0.1, axis=1)
        x[:, : nbytes // 2] = 7
    return x


def tables_of(db, count, radius=0, threads=1):
    database = torch.from_numpy(db)
    return RangeTables(database, Split(Sample(database).masks(count), radius, 0.0), threads)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("nbytes", [1, 2, 3, 7, 8, 9, 16, 33, 512])
def test_equals_the_naive_oracle(isa, nbytes, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    rng = np.random.default_rng(nbytes)
    for kind in KINDS:
        db = codes(rng, 300 if nbytes < 64 else 80, nbytes, kind)
        q = np.concatenate([codes(rng, 3, nbytes), db[:70]])
        for radius, count in ((0, 1), (1, 1), (2, 2), (3, 4), (5, 4)):
            count = min(count, 8 * nbytes) if nbytes < 64 else max(count, radius)  # C(1024, 2) look-ups are many
            expected = [torch.from_numpy(x) for x in _reference.hamming_range(q, db, radius)]
            NATIVE.reset_last_isa()
            assert_same(tables_of(db, count).range_search(torch.from_numpy(q), radius, effort=math.inf), expected)
            assert NATIVE.last_isa() == ("avx2" if isa == "avx512bw" else isa)


@given(
    nbytes=st.sampled_from([1, 2, 4, 5, 8, 12, 16, 32, 40, 64, 128]),
    n=st.integers(0, 500),
    queries=st.integers(0, 140),
    radius=st.integers(0, 9),
    extra=st.integers(-2, 3),
    kind=st.sampled_from(KINDS),
    effort=st.sampled_from([0.0, 0.05, 1.0, 100.0, math.inf]),
    after=st.sampled_from([None, 0, 3, 450]),
    filtered=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_scan_however_codes_are_cut_and_whatever_is_given_up(
    nbytes, n, queries, radius, extra, kind, effort, after, filtered, threads, seed
):
    rng = np.random.default_rng(seed)
    db = codes(rng, n, nbytes, kind)
    q = torch.from_numpy(np.concatenate([codes(rng, queries, nbytes), db[:40]]))
    count = min(max(1, -(-(radius + 1) // 3), radius + 1 + extra), 8 * nbytes)  # up to 2 bits of a substring differ
    tables = tables_of(db, count, radius, threads)
    allowed = torch.from_numpy(rng.random(n) < 0.5) if filtered else None
    asked = torch.from_numpy(rng.random(len(q)) < 0.7) if filtered else None
    lims, distances, indices = scan_range(q, torch.from_numpy(db), min(radius, 8 * nbytes), 1)
    own = torch.full((len(q),), -1) if after is None else torch.arange(len(q)) + after
    expected = kept((lims, distances, indices), allowed, own if asked is None else torch.where(asked, own, n))
    got = tables.range_search(q, radius, threads, allowed=allowed, after=after, asked=asked, effort=effort)
    assert_same(got, expected)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_tables_of_many_codes_are_built_in_passes(few, threads):
    rng = np.random.default_rng(0)
    db = rng.integers(0, 256, ((1 << 20) + 77, 4), dtype=np.uint8)
    if few:  # one range holds more than a pass does
        db[: 3 << 18] = db[0]
    q = torch.from_numpy(np.concatenate([db[::150_000][few:], db[-1:]]))
    got = tables_of(db, 1, 0, threads).range_search(q, 0, threads, effort=math.inf)
    assert_same(got, scan_range(q, torch.from_numpy(db), 0, 1))


@given(
    nbytes=st.sampled_from([8, 16, 32]),
    radius=st.integers(0, 4),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_masks_permuted_bits_permuted_rows_and_split_databases_change_nothing_else(nbytes, radius, kind, seed):
    rng = np.random.default_rng(seed)
    db = codes(rng, 400, nbytes, kind)
    q = torch.from_numpy(db[::7].copy())
    count = radius + 1

    def found(database, queries):
        database = np.ascontiguousarray(database)
        hits = tables_of(database, count, radius).range_search(queries.contiguous(), radius, 1)
        return [x.numpy() for x in hits]

    plain = found(db, q)
    mask = rng.integers(0, 256, nbytes, dtype=np.uint8)
    assert_same(found(db ^ mask, q ^ torch.from_numpy(mask)), plain)
    places = rng.permutation(8 * nbytes)
    turned = [np.packbits(np.unpackbits(x, axis=1)[:, places], axis=1) for x in (db, q.numpy())]
    assert_same(found(turned[0], torch.from_numpy(turned[1])), plain)
    order = rng.permutation(len(db))
    lims, distances, indices = found(db[order], q)
    for i in range(len(q)):
        here, there = slice(*lims[i : i + 2]), slice(*plain[0][i : i + 2])
        by_row = np.argsort(order[indices[here]])
        np.testing.assert_array_equal(order[indices[here]][by_row], plain[2][there])
        np.testing.assert_array_equal(distances[here][by_row], plain[1][there])
    halves = [found(db[:150], q), found(db[150:], q)]
    for i in range(len(q)):
        parts = [half[2][slice(*half[0][i : i + 2])] + at for half, at in zip(halves, (0, 150), strict=True)]
        np.testing.assert_array_equal(np.concatenate(parts), plain[2][slice(*plain[0][i : i + 2])])


@given(radius=st.integers(0, 300), count=st.integers(1, 128))
def test_the_pigeonhole_principle_holds(radius, count):
    reach = reaches(radius, count)
    assert len(reach) == count and sum(flips + 1 for flips in reach) == radius + 1
    assert min(reach) >= -1 and max(reach) - min(reach) <= 1


@given(nbytes=st.integers(1, 64), count=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_bit_is_in_one_substring_and_dead_bits_are_shared_out(nbytes, count, seed):
    count = min(count, 8 * nbytes)
    sample = Sample(torch.from_numpy(codes(np.random.default_rng(seed), 200, nbytes, "dead bits")))
    bits = np.unpackbits(sample.masks(count), axis=1)
    assert (bits.sum(axis=0) == 1).all()
    assert np.ptp(bits.sum(axis=1)) <= 2
    assert np.ptp(bits[:, : 8 * (nbytes // 2)].sum(axis=1)) <= 2


def test_a_range_search_of_many_queries_makes_tables_and_few_scan(monkeypatch):
    rng = np.random.default_rng(0)
    db = codes(rng, 20_000, 32)
    built = []
    monkeypatch.setattr(multi_index_range, "least_cost", lambda n: 0.0)
    monkeypatch.setattr(
        multi_index_range, "RangeTables", lambda *args: built.append(len(args[1].masks)) or RangeTables(*args)
    )
    q = db[:3000] ^ np.eye(32, dtype=np.uint8)[0]
    expected = cf.hamming_range(q, db, 4, tables=False, threads=1)
    assert not built
    assert_same(cf.hamming_range(q, db, 4, threads=1), expected)
    assert built == [5]
    for radius in (100, 4):  # a radius that tables do not pay for, and too few queries to build any
        assert_same(cf.hamming_range(q[:2], db, radius), cf.hamming_range(q[:2], db, radius, tables=False))
    assert built == [5]


def test_memory_stays_within_what_is_allowed(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(multi_index_range, "scan_cost", lambda *_: 1e9)  # tables pay with every instruction set
    for nbytes, radius, least in ((8, 4, 2), (16, 8, 3), (32, 8, 8), (64, 16, 15)):
        db = torch.from_numpy(codes(rng, 100_000, nbytes))
        split = Sample(db).best(radius, 1.5)
        tables = RangeTables(db, split, 1)
        assert tables.nbytes <= 1.5 * db.numel() + 10_000 and len(split.masks) >= least, (nbytes, len(split.masks))


def test_more_hits_than_are_kept_are_searched_again(monkeypatch):
    rng = np.random.default_rng(0)
    db = np.repeat(codes(rng, 5, 8), 2000, axis=0)
    q = torch.from_numpy(db[::100].copy())
    monkeypatch.setattr(multi_index_range, "scan_range", None)  # not that way
    got = tables_of(db, 2, 1).range_search(q, 1, 1, effort=math.inf)
    assert len(got[2]) == 2000 * len(q)
    assert_same(got, scan_range(q, torch.from_numpy(db), 1, 1))


def test_threads_and_callers_do_not_change_tables_or_results():
    rng = np.random.default_rng(0)
    db = codes(rng, 200_000, 8, "clusters")
    one, three = tables_of(db, 3, 2, 1), tables_of(db, 3, 2, 3)
    for a, b in zip(one._tables, three._tables, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    q = torch.from_numpy(db[:300])
    expected = one.range_search(q, 2, 1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda i: one.range_search(q, 2, 1 + i % 3), range(8)):
            assert_same(got, expected)


def test_bad_input_is_refused():
    x = np.zeros((5, 8), np.uint8)
    with pytest.raises(InputError, match="tables must be True or False, got 1"):
        cf.hamming_range(x, x, 1, tables=1)
