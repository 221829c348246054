"""faiss's binary index files, read and written without faiss, against faiss where it is installed."""

import struct

import numpy as np
import pytest

from cmr_fast.errors import InputError
from cmr_fast.retrieval.index import HammingIndex

CODES = np.random.default_rng(0).integers(0, 256, (70, 4), dtype=np.uint8)
IDS = np.random.default_rng(1).permutation(1000)[:70]
# 3 codes of 16 bits with ids 7, 5, 9, as faiss 1.15.1 writes them
FLAT = bytes.fromhex("494278461000000002000000030000000000000001010000000600000000000000000102030405")
MAP = bytes.fromhex("49424d701000000002000000030000000000000001010000") + b"\0" + FLAT
MAP += struct.pack("<Q3q", 3, 7, 5, 9)


def made(bits=32, codes=CODES, ids=None):
    index = HammingIndex(bits)
    index.add(codes, ids)
    return index


@pytest.mark.parametrize("fourcc", [b"IBxF", b"IBMp", b"IBM2"])
def test_files_of_faiss_are_read(tmp_path, fourcc):
    path = tmp_path / "faiss"
    path.write_bytes(FLAT if fourcc == b"IBxF" else fourcc + MAP[4:])
    index = HammingIndex.from_faiss(path)
    assert index.bits == 16
    np.testing.assert_array_equal(index.codes, [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(index.ids, [0, 1, 2] if fourcc == b"IBxF" else [7, 5, 9])
    assert index.search(np.array([[2, 3]], dtype=np.uint8), 1)[1] == (1 if fourcc == b"IBxF" else 5)
    index.add(np.array([[9, 9]], dtype=np.uint8))
    assert index.ids[-1] == (3 if fourcc == b"IBxF" else 10)


def test_written_as_faiss_writes(tmp_path):
    path = tmp_path / "faiss"
    rows = np.arange(6, dtype=np.uint8).reshape(3, 2)
    made(16, rows).to_faiss(path)
    assert path.read_bytes() == FLAT
    made(16, rows, [7, 5, 9]).to_faiss(path)
    assert path.read_bytes() == b"IBM2" + MAP[4:]
    made(12, rows & 15).to_faiss(path)
    assert HammingIndex.from_faiss(path).bits == 16
    assert HammingIndex.from_faiss(path, bits=12).bits == 12
    with pytest.raises(InputError, match="beyond bit 9"):
        HammingIndex.from_faiss(path, bits=9)
    HammingIndex(16).to_faiss(path)
    assert len(HammingIndex.from_faiss(path)) == 0


@pytest.mark.parametrize("ids", [None, IDS])
def test_both_ways_with_faiss(tmp_path, ids):
    faiss = pytest.importorskip("faiss")
    mine = made(ids=ids)
    mine.add(CODES[:5] ^ 1, None if ids is None else np.arange(5) + 5000)
    mine.save(tmp_path / "mine")
    mine = HammingIndex.load(tmp_path / "mine")
    mine.to_faiss(tmp_path / "faiss")
    theirs = faiss.read_index_binary(str(tmp_path / "faiss"))
    assert theirs.ntotal == 75 and theirs.d == 32
    np.testing.assert_array_equal(mine.search(CODES[:9], 5)[0], theirs.search(CODES[:9], 5)[0])
    np.testing.assert_array_equal(mine.search(CODES[:9], 1)[1], theirs.search(CODES[:9], 1)[1])
    faiss.write_index_binary(theirs, str(tmp_path / "again"))
    again = HammingIndex.from_faiss(tmp_path / "again")
    np.testing.assert_array_equal(again.codes, mine.codes)
    np.testing.assert_array_equal(again.ids, mine.ids)
    lims, _, found = theirs.range_search(CODES[:9], 8) if ids is None else mine.range_search(CODES[:9], 8)
    got = again.range_search(CODES[:9], 7 if ids is None else 8)  # faiss: distance < radius
    np.testing.assert_array_equal(got[0], lims)
    np.testing.assert_array_equal(np.sort(got[2]), np.sort(found))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "faiss"
    for whole in (FLAT, MAP):
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"truncated|expected a faiss"):
                HammingIndex.from_faiss(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(InputError, match="damaged"):
            HammingIndex.from_faiss(path)
        for field, value in ((4, 24), (8, 3), (12, 2), (12, -1), (25, 5)):
            data = bytearray(whole)
            struct.pack_into("<i", data, field, value)
            path.write_bytes(data)
            with pytest.raises(InputError, match=r"damaged|truncated|expected"):
                HammingIndex.from_faiss(path)
    path.write_bytes(MAP[:-8] + struct.pack("<q", 5))
    with pytest.raises(InputError, match="ids must not repeat"):
        HammingIndex.from_faiss(path)
    path.write_bytes(MAP[:-8] + struct.pack("<q", -5))
    with pytest.raises(InputError, match="ids must be from 0"):
        HammingIndex.from_faiss(path)
    path.write_bytes(b"IBwF" + FLAT[4:])
    with pytest.raises(InputError, match="begins with b'IBwF'"):
        HammingIndex.from_faiss(path)
    with pytest.raises(InputError, match="no faiss file"):
        HammingIndex.from_faiss(tmp_path / "missing")
