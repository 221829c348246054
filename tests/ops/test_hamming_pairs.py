"""Joins against the table of distances: every pair once, in order, in one piece or in blocks."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import multi_index_range
from cmr_fast.ops.multi_index_range import BucketJoin, Sample, Split

JOINS = sys.modules["cmr_fast.ops.hamming_pairs"]  # the function of this name hides it


def codes(rng, n, nbytes, copies=3, flips=0.03):
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    if n:
        x = x[rng.integers(0, max(1, n // copies), n)]
    return x ^ np.packbits(rng.random((n, 8 * nbytes)) < flips, axis=1)


def naive(x, radius, other=None):
    distances = cf.hamming_distances(x, x if other is None else other)
    near = distances <= radius
    if other is None:
        near = np.triu(near, 1)
    return np.concatenate([[0], near.sum(axis=1).cumsum()]), distances[near], np.nonzero(near)[1]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    n=st.integers(0, 250),
    others=st.one_of(st.none(), st.integers(0, 300)),
    nbytes=st.sampled_from([1, 2, 5, 8, 16, 32]),
    radius=st.integers(0, 6),
    way=st.sampled_from(["scan", "rows", "buckets"]),
    threads=st.integers(1, 3),
    rows=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_table_of_distances(n, others, nbytes, radius, way, threads, rows, seed):
    rng = np.random.default_rng(seed)
    x = codes(rng, n, nbytes)
    other = None if others is None else np.concatenate([x[:20], codes(rng, others, nbytes)])
    expected = naive(x, radius, other)
    if n == 0 and way == "buckets":
        way = "rows"

    def buckets(db, radius):
        return BucketJoin(db, Split(Sample(db).masks(radius + 1), radius, 0.0))

    with pytest.MonkeyPatch.context() as patch:
        asked = []
        made = lambda db, r: asked.append(r) or buckets(db, r) if way == "buckets" else None  # noqa: E731
        patch.setattr(JOINS, "bucket_join", made)
        if way != "scan":  # tables whatever they cost
            count = min(max(1, radius), 8 * nbytes)
            patch.setattr(JOINS, "available", lambda db: True)
            patch.setattr(JOINS, "scan_cost", lambda *_: 1e18)
            patch.setattr(Sample, "best", lambda self, *_: asked.append(1) or Split(self.masks(count), radius, 0.0))
        assert_same(cf.hamming_pairs(x, radius, other, threads=threads), expected)
        blocks = list(cf.hamming_pair_blocks(x, radius, other, rows=rows, threads=threads))
    assert len(asked) == (0 if way == "scan" or n == 0 else 2)
    assert [block.first for block in blocks] == list(np.cumsum([0, *(len(b.lims) - 1 for b in blocks)])[:-1])
    assert all(len(block.lims) - 1 <= rows for block in blocks)
    if blocks:
        starts = np.cumsum([0, *(b.lims[-1] for b in blocks)])
        lims = np.concatenate([*(b.lims[:-1] + at for b, at in zip(blocks, starts, strict=False)), starts[-1:]])
        got = lims, np.concatenate([b.distances for b in blocks]), np.concatenate([b.indices for b in blocks])
        assert_same(got, expected)
    else:
        assert n == 0


def test_large_joins_look_up_and_equal_the_scan():
    x = codes(np.random.default_rng(0), 6000, 32, flips=0.01)
    assert_same(cf.hamming_pairs(x, 4, threads=1), naive(x, 4))
    assert JOINS.bucket_join(torch.from_numpy(x).repeat(4, 1), 4) is not None


def test_a_bucket_join_goes_on_from_anywhere_and_finds_all_of_a_heavy_bucket(monkeypatch):
    monkeypatch.setattr(multi_index_range, "_FIRST_SLOTS", 8)
    monkeypatch.setattr(multi_index_range, "_PAIRS", 100)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(np.concatenate([np.zeros((90, 8), np.uint8), codes(rng, 200, 8)])[rng.permutation(290)])
    allowed = torch.from_numpy(rng.random(290) < 0.8)
    buckets = BucketJoin(x, Split(Sample(x).masks(4), 3, 0.0))
    steps = list(buckets.pairs(3, 2, allowed=allowed))
    keys = torch.cat([keys for _, keys, _ in steps])
    lims, distances, indices = naive(x.numpy(), 3)
    rows = np.repeat(np.arange(290), np.diff(lims))
    both = allowed.numpy()[rows] & allowed.numpy()[indices]
    wanted = (rows << 32 | indices)[both]
    order = np.argsort(keys.numpy())
    np.testing.assert_array_equal(keys.numpy()[order], wanted)
    np.testing.assert_array_equal(torch.cat([near for _, _, near in steps]).numpy()[order], distances[both])
    for stop in (0, 5, len(steps) - 1):
        rest = sum(len(k) for _, k, _ in buckets.pairs(3, 1, allowed=allowed, start=steps[stop][0]))
        assert rest == len(keys) - sum(len(k) for _, k, _ in steps[: stop + 1])


def test_blocks_go_on_from_any_row():
    x = codes(np.random.default_rng(0), 500, 8)
    lims, distances, indices = cf.hamming_pairs(x, 3)
    for start in (0, 1, 17, 499, 500, 600):
        rest = list(cf.hamming_pair_blocks(x, 3, start=start))
        at = lims[min(start, 500)]
        assert_same(
            (
                np.concatenate([np.empty(0, np.int32), *(b.distances for b in rest)]),
                np.concatenate([np.empty(0, np.int64), *(b.indices for b in rest)]),
            ),
            (distances[at:], indices[at:]),
        )


def test_torch_in_torch_out_and_the_torch_path(monkeypatch):
    x = torch.from_numpy(codes(np.random.default_rng(0), 300, 8))
    got = cf.hamming_pairs(x, 3)
    assert all(isinstance(t, torch.Tensor) for t in got)
    assert isinstance(next(cf.hamming_pair_blocks(x, 3)).lims, torch.Tensor)
    assert_same(got, naive(x.numpy(), 3))
    monkeypatch.setenv("CMR_FAST_BACKEND", "torch")
    assert_same(cf.hamming_pairs(x, 3), got)


def test_results_that_do_not_fit_are_refused_with_the_count_and_the_way_out():
    x = np.zeros((2000, 8), np.uint8)
    with pytest.raises(
        InputError, match=r"at most max_pairs = 1000, got \d+ in the first 16 of 2000 rows.*pair_blocks"
    ):
        cf.hamming_pairs(x, 0, max_pairs=1000)
    assert cf.hamming_pairs(x[:46], 0, max_pairs=46 * 45 // 2)[0][-1] == 46 * 45 // 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cf.hamming_pairs(x, -1), "radius .* got -1"),
        (lambda x: cf.hamming_pairs(x, 1.5), "radius .* got 1.5"),
        (lambda x: cf.hamming_pairs(x, 1, x[:, :4]), "codes and other must have the same bits"),
        (lambda x: cf.hamming_pairs(x, x, 1), "other must be a numpy array or a torch tensor, got int"),
        (lambda x: cf.hamming_pairs(x.view(np.uint64), 1), r"uint64 \(5, 1\): words of packed bits .*view\(uint8\)"),
        (lambda x: cf.hamming_pairs(x.astype(np.int8), 1), "int8"),
        (lambda x: cf.hamming_pairs(x, 1, max_pairs=-1), "max_pairs .* got -1"),
        (lambda x: cf.hamming_pair_blocks(x, 1, rows=0), "rows .* got 0"),
        (lambda x: cf.hamming_pair_blocks(x, 1, start=-1), "start .* got -1"),
        (lambda x: cf.hamming_pairs(x, 1, threads=0), "threads .* got 0"),
        (lambda x: cf.hamming_pairs(x, 1, torch.from_numpy(x)), "both be numpy"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(call, message):
    with pytest.raises(InputError, match=message):
        call(np.zeros((5, 8), np.uint8))
