import struct
import zlib

import numpy as np
import pytest
import torch

from cmr_fast.errors import InputError
from cmr_fast.ops import _reference, pack_codes
from cmr_fast.retrieval import index as module
from cmr_fast.retrieval.index import HammingIndex

BITS = 20
REFUSED = "truncated|damaged|version|not a HammingIndex"


def codes(count, seed=0, bits=BITS):
    return pack_codes(np.random.default_rng(seed).integers(0, 2, (count, bits)))


def filled(count=50, ids=None, seed=0):
    index = HammingIndex(BITS)
    index.add(codes(count, seed), ids)
    return index


def assert_same(a, b):
    q = codes(7, seed=99)
    assert (a.bits, a.ntotal) == (b.bits, b.ntotal)
    for left, right in zip(
        (*a.search(q, 9), *a.range_search(q, 8)), (*b.search(q, 9), *b.range_search(q, 8)), strict=True
    ):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("bits", [1, 7, 8, 20, 64, 129])
def test_search_equals_a_stable_sort(bits):
    db, q = codes(40, 1, bits), codes(6, 2, bits)
    index = HammingIndex(bits)
    index.add(db)
    for k in (1, 5, 40, 43):
        distances, ids = index.search(q, k, threads=2)
        want = _reference.hamming_topk(q, db, k, bits)
        np.testing.assert_array_equal(distances, want[0])
        np.testing.assert_array_equal(ids, want[1])
        assert (distances.dtype, ids.dtype) == (np.int32, np.int64)


def test_ids_of_ones_own():
    db, q = codes(30), codes(4, seed=1)
    ids = np.random.default_rng(2).permutation(10**12 + np.arange(30) * 7)
    index = HammingIndex(BITS)
    index.add(db[:10], ids[:10])
    index.add(db[10:], ids[10:].tolist())
    distances, found = index.search(q, 33)
    want = _reference.hamming_topk(q, db, 33, BITS)
    np.testing.assert_array_equal(distances, want[0])
    np.testing.assert_array_equal(found, np.where(want[1] < 0, -1, ids[want[1]]))
    for got, expected in zip(index.range_search(q, 7), _reference.hamming_range(q, db, 7), strict=True):
        np.testing.assert_array_equal(
            got, ids[expected] if expected.dtype == np.int64 and len(expected) != 5 else expected
        )


def test_adding_in_pieces_equals_adding_at_once():
    db = codes(100)
    index = HammingIndex(BITS)
    for piece in np.array_split(db, 17):
        index.add(piece)
    index.add(db[:0])
    assert len(index) == index.ntotal == 100
    assert_same(index, filled(100))


def test_ids_count_on_from_the_highest():
    index = HammingIndex(BITS)
    index.add(codes(2), [10, 3])
    index.add(codes(2, seed=1))
    index.remove_ids([12])
    index.add(codes(1, seed=2))
    lims, _, ids = index.range_search(codes(1), BITS)
    np.testing.assert_array_equal(ids, [10, 3, 11, 13])
    np.testing.assert_array_equal(lims, [0, 4])


def test_removed_codes_are_gone_and_order_stays():
    index = filled(50)
    assert index.remove_ids(torch.tensor([0, 49, 7])) == 3
    assert index.remove_ids([]) == 0
    kept = np.setdiff1d(np.arange(50), [0, 7, 49])
    assert_same(index, filled_with(codes(50)[kept], kept))


def filled_with(rows, ids):
    index = HammingIndex(BITS)
    index.add(rows, ids)
    return index


def test_empty_index():
    index = HammingIndex(BITS)
    distances, ids = index.search(codes(2), 3)
    assert (distances == BITS + 1).all() and (ids == -1).all()
    lims, _, ids = index.range_search(codes(2), 3)
    assert lims.tolist() == [0, 0, 0] and len(ids) == 0


def test_torch_in_torch_out():
    index = HammingIndex(BITS)
    index.add(torch.from_numpy(codes(50)), torch.arange(50))
    q = codes(3, seed=4)
    found = index.search(torch.from_numpy(q), 5)
    assert all(isinstance(x, torch.Tensor) for x in (*found, *index.range_search(torch.from_numpy(q), 4)))
    np.testing.assert_array_equal(found[1].numpy(), filled().search(q, 5)[1])


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("count", [0, 1, 50])
@pytest.mark.parametrize("own_ids", [True, False])
def test_saved_and_loaded(tmp_path, monkeypatch, mmap, count, own_ids):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    path = tmp_path / "codes.idx"
    index = filled(count, np.arange(count)[::-1] * 3 if own_ids else None)
    index.save(path)
    loaded = HammingIndex.load(path, mmap=mmap)
    loaded.verify()
    assert_same(index, loaded)
    for one in (index, loaded):
        one.add(codes(4, seed=5))
    assert_same(index, loaded)
    if count:
        for one in (index, loaded):
            one.remove_ids([0])
    assert_same(index, loaded)
    loaded.save(path)
    assert_same(index, HammingIndex.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["codes.idx"]


def test_a_mapped_index_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "codes.idx"
    filled().save(path)
    mapped = HammingIndex.load(path)
    mapped.save(path)
    assert_same(mapped, filled())
    assert_same(HammingIndex.load(path, mmap=False), filled())


@pytest.mark.parametrize("mmap", [True, False])
def test_truncated_and_long_files_are_refused(tmp_path, monkeypatch, mmap):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    path = tmp_path / "codes.idx"
    filled(50, np.arange(50) * 2).save(path)
    whole = path.read_bytes()
    for size in [0, 5, 8, 100, 127, 128, 140, 300, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=REFUSED):
            HammingIndex.load(path, mmap=mmap)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="too long"):
        HammingIndex.load(path, mmap=mmap)


def test_every_flipped_bit_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    path = tmp_path / "codes.idx"
    filled(30, np.arange(30) * 2).save(path)
    whole = path.read_bytes()
    codes_at = len(whole) - 30 * 3
    for byte in range(len(whole)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=REFUSED):
            HammingIndex.load(path, mmap=False)
        if byte >= codes_at:
            mapped = HammingIndex.load(path, mmap=True)
            with pytest.raises(InputError, match="1 of 2 blocks fail"):
                mapped.verify()
        else:
            with pytest.raises(InputError, match=REFUSED):
                HammingIndex.load(path, mmap=True)


def test_files_of_others_and_of_the_future_are_refused(tmp_path):
    path = tmp_path / "codes.idx"
    path.write_bytes(b"IBxF" + bytes(500))
    with pytest.raises(InputError, match="not a HammingIndex file"):
        HammingIndex.load(path)
    with pytest.raises(InputError, match="no index file"):
        HammingIndex.load(tmp_path / "missing")
    filled().save(path)
    whole = bytearray(path.read_bytes())
    struct.pack_into("<I", whole, 8, 2)
    struct.pack_into("<I", whole, 124, zlib.crc32(whole[:124]))
    path.write_bytes(whole)
    with pytest.raises(InputError, match="version 2"):
        HammingIndex.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "codes.idx"
    filled().save(path)
    broken = filled(60)

    def full(*_):
        raise OSError("disk")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk"):
        broken.save(path)
    monkeypatch.undo()
    assert_same(HammingIndex.load(path, mmap=False), filled())
    assert [p.name for p in tmp_path.iterdir()] == ["codes.idx"]


BAD_CALLS = {
    "from 1 to 4096, got 0": lambda index: HammingIndex(0),
    "got 4097": lambda index: HammingIndex(4097),
    "got 2.0": lambda index: HammingIndex(2.0),
    "must have 20 bits": lambda index: index.add(codes(3, bits=32)),
    "q must have 20 bits": lambda index: index.search(codes(3, bits=12), 1),
    "bits set beyond bit 20": lambda index: index.add(codes(30, bits=24)),
    "uint8": lambda index: index.add(codes(3).astype(np.int8)),
    "got list": lambda index: index.range_search([[1, 2, 3]], 1),
    "k must be": lambda index: index.search(codes(3), 0),
    "radius must be": lambda index: index.range_search(codes(3), -1),
    "ids must be integers \\(3,\\)": lambda index: index.add(codes(3), [100, 101]),
    "got float64": lambda index: index.add(codes(1), [0.5]),
    "2 are in the index already, the first is 49": lambda index: index.add(codes(3), [49, 50, 2]),
    "must not repeat: 1 do, the first is 70": lambda index: index.add(codes(3), [70, 71, 70]),
    "got -1 to": lambda index: index.add(codes(1), [-1]),
    "2 are not, the first is 50": lambda index: index.remove_ids([4, 50, 60]),
    "the first is 4": lambda index: index.remove_ids([4, 4]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_refused_and_changes_nothing(message):
    index = filled()
    with pytest.raises(InputError, match=message):
        BAD_CALLS[message](index)
    assert_same(index, filled())


def test_the_last_id_leaves_none_to_count_on_from():
    index = HammingIndex(BITS)
    index.add(codes(1), [2**63 - 2])
    with pytest.raises(InputError, match="no ids left"):
        index.add(codes(1))
