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


MANY = np.array([-663323444433213679, 77711, -5, 12, -(2**63), 2**63 - 1, 12, -1, -5], np.int64)


def with_ids(path, ids, bits=32):
    """A file as faiss writes it of IndexBinaryIDMap2 with `ids`."""
    fields = (bits, bits // 8, len(ids), True, 1)
    header = [struct.pack("<4siiq?i", kind, *fields) for kind in (b"IBM2", b"IBxF")]
    codes = CODES[: len(ids), : bits // 8].tobytes()
    count = struct.pack("<Q", len(ids))
    path.write_bytes(b"".join([*header, struct.pack("<Q", len(codes)), codes, count, ids.tobytes()]))
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_ids_of_faiss_are_kept_whatever_they_are(tmp_path, mmap):
    """Negative ones and several codes under one; they go into other files and back."""
    path = with_ids(tmp_path / "faiss", MANY)
    index = HammingIndex.from_faiss(path, mmap=mmap)
    assert index.memory_usage()["mapped"] == (9 * (4 + 8) if mmap else 0)
    np.testing.assert_array_equal(index.ids, MANY)
    np.testing.assert_array_equal(index.search(CODES[:9], 1)[1][:, 0], MANY)
    np.testing.assert_array_equal(index.range_search(CODES[:1], 32)[2], MANY)
    index.save(tmp_path / "ours")
    index.to_faiss(tmp_path / "again")
    HammingIndex.build(tmp_path / "built", [index])
    made(codes=CODES[20:23], ids=[3, 4, 5]).save(tmp_path / "appended")
    HammingIndex.append(tmp_path / "appended", index)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    for name in ("ours", "again", "built", "appended"):
        for in_file in (True, False):
            got = HammingIndex.open(tmp_path / name, mmap=in_file)
            got.verify()
            np.testing.assert_array_equal(got.ids, np.append([3, 4, 5], MANY) if name == "appended" else MANY)
            np.testing.assert_array_equal(got.codes[-9:], CODES[:9])
    with pytest.raises(InputError, match="ids must be new: 9 are in the index already, the first is -66"):
        HammingIndex.append(tmp_path / "ours", index)


def test_an_index_with_ids_of_faiss_goes_on_with_its_own(tmp_path):
    index = HammingIndex.from_faiss(with_ids(tmp_path / "faiss", MANY))
    with pytest.raises(InputError, match="no ids left to count on from"):
        index.add(CODES[:1])
    for ids, message in (([12], "ids must be new"), ([-7], "ids must be from 0"), ([2**63 - 1], "ids must be from 0")):
        with pytest.raises(InputError, match=message):
            index.add(CODES[:1], ids)
    index.add(CODES[:1], [13])
    with pytest.raises(InputError, match="1 are not, the first is -6"):
        index.remove_ids([12, -6])
    assert index.remove_ids([12, -(2**63), 2**63 - 1, -1]) == 5
    np.testing.assert_array_equal(index.ids, [MANY[0], 77711, -5, -5, 13])
    index.add(CODES[:1], [12])
    with pytest.raises(InputError, match="ids must be new"):
        index.add(CODES[:1], [77711])
    few = HammingIndex.from_faiss(with_ids(tmp_path / "few", np.array([-7, -3], np.int64)))
    few.add(CODES[:2])
    np.testing.assert_array_equal(few.ids, [-7, -3, 0, 1])


def test_faiss_agrees_on_ids_of_any_kind(tmp_path):
    faiss = pytest.importorskip("faiss")
    made_by_faiss = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(32))
    made_by_faiss.add_with_ids(CODES[:9], MANY)
    faiss.write_index_binary(made_by_faiss, str(tmp_path / "faiss"))
    index = HammingIndex.from_faiss(tmp_path / "faiss")
    np.testing.assert_array_equal(index.search(CODES[:9], 1)[1], made_by_faiss.search(CODES[:9], 1)[1])
    index.to_faiss(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == with_ids(tmp_path / "ours", MANY).read_bytes()
    back = faiss.read_index_binary(str(tmp_path / "back"))
    np.testing.assert_array_equal(faiss.vector_to_array(faiss.downcast_IndexBinary(back).id_map), MANY)


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
    path.write_bytes(b"IBwF" + FLAT[4:])
    with pytest.raises(InputError, match=f"^{path} is truncated or damaged"):
        HammingIndex.from_faiss(path)
    wide = struct.pack("<4siiq?iQ", b"IBxF", 4104, 513, 0, True, 1, 0)
    path.write_bytes(wide)
    with pytest.raises(InputError, match=f"^{path}: its codes are too wide, expected at most 4096 bits, got 4104"):
        HammingIndex.from_faiss(path)
    with pytest.raises(InputError, match="no faiss file"):
        HammingIndex.from_faiss(tmp_path / "missing")
