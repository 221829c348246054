"""Near-duplicates against a naive walk: groups, what is kept, states of runs that were stopped."""

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
from cmr_fast.retrieval import duplicates

pytest.importorskip("scipy")


def codes(rng, n, nbytes=8, flips=0.02):
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)[rng.integers(0, max(1, n // 4), n)]
    return x ^ np.packbits(rng.random((n, 8 * nbytes)) < flips, axis=1)


def naive(x, radius):
    """Groups by walking from each row that has none yet to all that can be reached."""
    near = cf.hamming_distances(x, x) <= radius
    groups, count = np.full(len(x), -1), 0
    for row in range(len(x)):
        if groups[row] >= 0:
            continue
        reached = [row]
        groups[row] = count
        while reached:
            new = np.flatnonzero(near[reached.pop()] & (groups < 0))
            groups[new] = count
            reached += new.tolist()
        count += 1
    return groups


@given(
    n=st.integers(0, 200),
    nbytes=st.sampled_from([1, 3, 8, 16]),
    radius=st.integers(0, 5),
    flips=st.sampled_from([0.0, 0.02, 0.1]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_naive_walk(n, nbytes, radius, flips, threads, seed):
    x = codes(np.random.default_rng(seed), n, nbytes, flips)
    groups = naive(x, radius)
    for edges, rows in ((1 << 22, 1 << 20), (3, 7)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(duplicates, "_EDGES", edges)
            patch.setattr(duplicates, "_ROWS", rows)
            patch.setattr(duplicates, "_TOGETHER", rows)
            first = cf.near_duplicates(x, radius, threads=threads)
            last = cf.near_duplicates(x, radius, "last", threads=threads)
        np.testing.assert_array_equal(first.groups, groups)
        assert first.kept.tolist() == sorted(np.flatnonzero(groups == g)[0] for g in set(groups.tolist()))
        assert last.kept.tolist() == sorted(np.flatnonzero(groups == g)[-1] for g in set(groups.tolist()))


def test_many_copies_of_one_code_are_cheap_and_tables_are_used():
    rng = np.random.default_rng(0)
    x = np.zeros((60_000, 32), np.uint8)  # 1.8 billion pairs
    x[::6] = rng.integers(0, 256, (10_000, 32), dtype=np.uint8)
    x[7, 0] = 1
    found = cf.near_duplicates(x, 2)
    assert len(found.kept) == 10_001 and found.groups[7] == found.groups[1]


def test_torch_in_torch_out_and_the_torch_path(monkeypatch):
    x = torch.from_numpy(codes(np.random.default_rng(0), 100))
    found = cf.near_duplicates(x, 3)
    assert found.groups.dtype == found.kept.dtype == torch.int64
    monkeypatch.setenv("CMR_FAST_BACKEND", "torch")
    again = cf.near_duplicates(x.numpy(), 3)
    np.testing.assert_array_equal(again.groups, found.groups)
    np.testing.assert_array_equal(again.kept, found.kept)


@pytest.mark.parametrize("by_bucket", [False, True])
def test_a_stopped_run_goes_on_where_it_was(by_bucket, tmp_path, monkeypatch):
    if by_bucket:
        monkeypatch.setattr(multi_index_range, "_FIRST_SLOTS", 8)
        monkeypatch.setattr(
            duplicates, "bucket_join", lambda x, r: BucketJoin(x, Split(Sample(x).masks(r + 1), r, 0.0))
        )
    x = codes(np.random.default_rng(0), 300)
    expected, state = cf.near_duplicates(x, 3), tmp_path / "state"
    monkeypatch.setattr(duplicates, "_SAVED", 0.0)
    seen = []

    def stop(more):
        seen.append(more)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cf.near_duplicates(x, 3, progress=stop, state=str(state))
    rows = []
    again = cf.near_duplicates(x, 3, progress=rows.append, state=str(state))
    assert rows[0] >= (4 if by_bucket else 16) and sum(rows) == 300
    np.testing.assert_array_equal(again.groups, expected.groups)
    for other, radius in ((x, 2), (x[::-1], 3)):
        with pytest.raises(InputError, match="other codes or another radius"):
            cf.near_duplicates(np.ascontiguousarray(other), radius, state=state)
    whole, place = state.read_bytes(), state.read_bytes().rfind(b"PK\x01\x02")  # of the last array in the directory
    encrypted, packed = bytearray(whole), bytearray(whole)
    encrypted[place + 8] ^= 1
    packed[place + 10] ^= 64  # the way it is compressed
    np.save(tmp_path / "array.npy", np.arange(3))
    array = (tmp_path / "array.npy").read_bytes()
    for damaged in (b"PK" + bytes(100), bytes(encrypted), bytes(packed), array, whole[:-30], b""):
        state.write_bytes(damaged)
        with pytest.raises(InputError, match="not the state of an earlier run, or damaged"):
            cf.near_duplicates(x, 3, state=state)
    with pytest.raises(InputError, match="is a folder"):
        cf.near_duplicates(x, 3, state=tmp_path)


def test_scipy_is_asked_for_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.csgraph", None)
    with pytest.raises(InputError, match=r"needs scipy: pip install \"cmr-fast\[train\]\""):
        cf.near_duplicates(np.arange(16, dtype=np.uint8).reshape(2, 8), 1)  # no pair to join
    assert len(cf.near_duplicates(np.zeros((5, 8), np.uint8), 0).kept) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cf.near_duplicates(x, -1), "radius .* got -1"),
        (lambda x: cf.near_duplicates(x, 1, "middle"), "keep must be one of first, last, got 'middle'"),
        (lambda x: cf.near_duplicates(x[0], 1), "codes must be packed codes"),
        (lambda x: cf.near_duplicates(x, 1, threads=0), "threads .* got 0"),
        (lambda x: cf.near_duplicates(x, 1, progress=True), "progress must be called .* got True"),
        (lambda x: cf.near_duplicates(x, 1, state=3), "state must be the path of a file.* got int"),
        (lambda x: cf.near_duplicates("x.npy", 1), r"got str: expected numpy\.load"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(call, message):
    with pytest.raises(InputError, match=message):
        call(np.zeros((5, 8), np.uint8))
