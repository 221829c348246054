"""Index files of others: faiss's IVF, HNSW and hashes, usearch's bits; whole, cut off and of other kinds."""

import struct

import numpy as np
import pytest

from cmr_fast.errors import InputError
from cmr_fast.retrieval import index_kind, read_codes
from cmr_fast.retrieval.index import HammingIndex

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 256, (40, 4), dtype=np.uint8)
KINDS = (
    "ivf",
    "ivf with ids",
    "ivf with a map",
    "hnsw",
    "hash",
    "multi-hash",
    "map of hnsw",
    "map of ivf",
    "empty ivf",
)


def faiss_index(kind):
    faiss = pytest.importorskip("faiss")
    ids = np.arange(40)
    if "ivf" in kind:
        index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(32), 32, 4)
        index.own_fields = False
        index.train(CODES)
        index.quantizer_kept = index.quantizer
    elif "hnsw" in kind:
        index = faiss.IndexBinaryHNSW(32, 4)
    else:
        index = faiss.IndexBinaryHash(32, 6) if kind == "hash" else faiss.IndexBinaryMultiHash(32, 2, 5)
    if kind == "empty ivf":
        return index, ids[:0]
    if kind == "ivf with ids":
        ids = RNG.permutation(1000)[:40] - 7
        index.add_with_ids(CODES, ids)
    elif kind.startswith("map"):
        ids = RNG.permutation(1000)[:40]
        outer = faiss.IndexBinaryIDMap2(index)
        outer.add_with_ids(CODES, ids)
        outer.kept = index
        return outer, ids
    else:
        index.add(CODES)
    if kind == "ivf with a map":
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
    return index, ids


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_ids_of_faiss_are_read(tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    theirs, ids = faiss_index(kind)
    path = tmp_path / "index"
    faiss.write_index_binary(theirs, str(path))
    assert index_kind(path) == "faiss"
    with pytest.warns(UserWarning, match="left aside"):
        index = HammingIndex.open(path)
    order = np.argsort(ids)
    np.testing.assert_array_equal(index.ids, ids[order])
    np.testing.assert_array_equal(index.codes, CODES[order][: len(ids)])
    whole = path.read_bytes()
    for size in range(0, len(whole), 1 if len(whole) < 1000 else 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"truncated|damaged|expected"):
            HammingIndex.from_faiss(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="damaged"):
        HammingIndex.from_faiss(path)


BITS = (98, 1, 14, 15)  # usearch's kinds of metric, scalar, key and slot


def usearch_file(bits, codes, keys, levels=None, removed=0, kinds=BITS, wide=False):
    """As usearch 2.26.6 writes it, connectivity 16 and 32, without links."""
    n = len(codes)
    levels = [0] * n if levels is None else levels
    out = [struct.pack("<2Q" if wide else "<2I", *codes.shape), codes.tobytes()]
    head = struct.pack("<7s3H4B3Q?", b"usearch", 2, 26, 6, *kinds, n - removed, removed, bits, False)
    out += [head.ljust(64, b"\0"), struct.pack("<5Q", n, 16, 32, 0, 0), np.asarray(levels, "<i2").tobytes()]
    for key, level in zip(keys, levels, strict=True):
        out.append(struct.pack("<Qh", key, level) + bytes(4 + 4 * 32 + level * (4 + 4 * 16)))
    return b"".join(out)


# 3 codes of 16 bits with keys 7, 5, 9, as usearch 2.26.6 writes them: the beginning, up to the nodes
REAL = bytes.fromhex(
    "03000000020000005f82c2d9cfeb7573656172636802001a00060062010e0f0300000000000000000000000000000010000000000000"
)


def test_the_head_is_that_of_usearch():
    codes = np.array([[0x5F, 0x82], [0xC2, 0xD9], [0xCF, 0xEB]], np.uint8)
    assert usearch_file(16, codes, [7, 5, 9]).startswith(REAL)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("bits", "n"), [(32, 40), (32, 0), (29, 3), (32, 1)])
def test_codes_and_keys_of_usearch_are_read(tmp_path, bits, n, wide):
    keys = RNG.permutation(1000)[:n]
    path = tmp_path / "index"
    levels = (np.arange(n) % 7 == 3) * 2
    path.write_bytes(usearch_file(bits, CODES[:n], keys.tolist(), levels.tolist(), wide=wide))
    assert index_kind(path) == "usearch"
    index = HammingIndex.open(path)
    assert index.bits == 32
    np.testing.assert_array_equal(index.codes, CODES[:n][np.argsort(keys)])
    np.testing.assert_array_equal(index.ids, np.sort(keys))
    index.add(CODES[:1])
    whole = path.read_bytes()
    for size in range(0, len(whole), 1 if len(whole) < 1000 else 13):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"truncated|damaged|not a HammingIndex file"):
            HammingIndex.open(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="damaged"):
        HammingIndex.open(path)


def test_removed_codes_of_usearch_are_left_out(tmp_path):
    path = tmp_path / "index"
    path.write_bytes(usearch_file(32, CODES[:4], [3, 2**64 - 1, 1, 8], removed=1))
    index = HammingIndex.open(path)
    np.testing.assert_array_equal(index.codes, CODES[[2, 0, 3]])
    assert index.ids.tolist() == [1, 3, 8]
    path.write_bytes(usearch_file(32, CODES[:4], [3, 4, 1, 8], removed=1))
    with pytest.raises(InputError, match="4 keys where its head says 3"):
        HammingIndex.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": (99, 11, 14, 15)}, "index of bits.*got usearch 2, dtype f32, metric cos, keys u64, slots u32"),
        ({"kinds": (98, 1, 14, 16)}, "index of bits"),
        ({"bits": 33}, "33 bits in 4 bytes"),
        ({"keys": [1, 2, 2**63]}, "below 2\\^63"),
        ({"levels": [0, -1, 0]}, "damaged"),
    ],
)
def test_other_files_of_usearch_are_refused(tmp_path, changes, message):
    path = tmp_path / "index"
    path.write_bytes(usearch_file(**{"bits": 32, "codes": CODES[:3], "keys": [1, 2, 3], **changes}))
    with pytest.raises(InputError, match=message):
        HammingIndex.open(path)


def test_other_readers_name_the_one_that_reads_it(tmp_path):
    path = tmp_path / "index"
    path.write_bytes(usearch_file(32, CODES[:3], [1, 2, 3]))
    (tmp_path / "x.u8bin").write_bytes(np.array([3, 4], "<u4").tobytes() + CODES[:3].tobytes())
    for read in (HammingIndex.load, HammingIndex.from_faiss):
        with pytest.raises(InputError, match=r"an index of usearch, which HammingIndex.open reads"):
            read(path)
        with pytest.raises(InputError, match=r"codes in \.u8bin, which HammingIndex.open reads"):
            read(tmp_path / "x.u8bin")
    with pytest.raises(InputError, match=r"expected a name in \.u8bin, .*numpy.load"):
        read_codes(tmp_path / "index.npy")


def test_a_graph_of_more_links_than_a_file_holds_is_damaged(tmp_path):
    path, whole = tmp_path / "index", usearch_file(32, CODES[:3], [1, 2, 3])
    at = whole.find(b"usearch") + 64
    for place in (at + 8, at + 16):  # connectivity of the upper levels, and of the base
        path.write_bytes(whole[:place] + struct.pack("<Q", 2**61) + whole[place + 8 :])
        with pytest.raises(InputError, match=r"damaged.* 2305843009213693952 "):
            HammingIndex.open(path)


@pytest.mark.parametrize("fourcc", [b"IBHf", b"IBHm"])
def test_a_header_of_more_codes_than_the_file_holds_is_refused_before_they_are_counted(tmp_path, fourcc):
    path = tmp_path / "index"
    path.write_bytes(struct.pack("<4siiq?i", fourcc, 32, 4, 2**45, True, 1) + bytes(100))
    with pytest.raises(InputError, match="truncated or damaged: its header says 35184372088832 codes of 4 bytes"):
        HammingIndex.open(path)


def test_usearch_itself(tmp_path):
    usearch = pytest.importorskip("usearch.index")
    index = usearch.Index(ndim=32, metric=usearch.MetricKind.Hamming, dtype=usearch.ScalarKind.B1)
    keys = np.arange(40) * 3 + 1
    index.add(keys, CODES)
    index.remove(4)
    index.save(tmp_path / "index")
    ours = HammingIndex.open(tmp_path / "index")
    np.testing.assert_array_equal(ours.ids, np.delete(keys, 1))
    np.testing.assert_array_equal(ours.codes, np.delete(CODES, 1, axis=0))
