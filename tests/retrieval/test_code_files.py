"""Files of codes that others wrote: .u8bin, .bvecs, ann-benchmarks' HDF5; whole, cut off and of other kinds."""

import struct

import numpy as np
import pytest

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.retrieval import _codefiles, read_codes
from cmr_fast.retrieval.index import HammingIndex

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 256, (40, 5), dtype=np.uint8)
BITS = RNG.integers(0, 2, (40, 37), dtype=np.uint8).astype(bool)


def u8bin(codes):
    return struct.pack("<2I", *codes.shape) + codes.tobytes()


def bvecs(codes):
    return b"".join(struct.pack("<i", len(code)) + code.tobytes() for code in codes)


def hdf5(path, distance="hamming", name="train", bits=BITS):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        if distance is not None:
            file.attrs["distance"] = distance
        file[name] = bits
        file["test"] = BITS[:3]
    return path


@pytest.mark.parametrize(("suffix", "written"), [(".u8bin", u8bin), (".bvecs", bvecs)])
@pytest.mark.parametrize("rows", [1, 40])
def test_packed_rows_are_read(tmp_path, monkeypatch, suffix, written, rows):
    monkeypatch.setattr(_codefiles, "_ROWS", 7)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(written(CODES[:rows]))
    bits, codes = read_codes(path)
    np.testing.assert_array_equal(codes, CODES[:rows])
    assert bits == 40
    index = HammingIndex.open(path)
    np.testing.assert_array_equal(index.codes, CODES[:rows])
    assert index.bits == 40 and index.ids.tolist() == list(range(rows))
    with pytest.raises(InputError, match=r"x\.\w+.*beyond bit 36"):
        HammingIndex.open(path, bits=36)


@pytest.mark.parametrize("distance", ["hamming", b"hamming"])
def test_bits_of_ann_benchmarks_are_packed(tmp_path, monkeypatch, distance):
    monkeypatch.setattr(_codefiles, "_ROWS", 7)
    path = hdf5(tmp_path / "x.hdf5", distance)
    index = HammingIndex.open(path)
    assert index.bits == 37
    np.testing.assert_array_equal(index.codes, cf.pack_codes(BITS))
    bits, queries = read_codes(path, "test")
    assert bits == 37
    distances, _ = index.search(queries, 40)
    expected = np.sort((BITS[:3, None] != BITS[None]).sum(axis=2), axis=1)
    np.testing.assert_array_equal(distances, expected)
    with pytest.raises(InputError, match="37 bits, expected 40"):
        HammingIndex.open(path, bits=40)


@pytest.mark.parametrize("suffix", [".u8bin", ".bvecs", ".hdf5"])
def test_cut_off_files_are_one_clear_error(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".hdf5":
        hdf5(path)
    else:
        path.write_bytes((u8bin if suffix == ".u8bin" else bvecs)(CODES[:4]))
    whole = path.read_bytes()
    for size in range(0, len(whole), 97 if suffix == ".hdf5" else 1):
        if suffix == ".bvecs" and size and size % 9 == 0:
            continue  # whole rows: the format does not say how many there are
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"x{suffix}"):
            HammingIndex.open(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.u8bin", u8bin(CODES) + b"\0", "208 bytes for 40 rows of 5 bytes, got 209"),
        ("x.u8bin", struct.pack("<2I", 0, 0), "1 to 512 bytes, got 0"),
        ("x.u8bin", u8bin(np.zeros((1, 513), np.uint8)), "1 to 512 bytes, got 513"),
        ("x.bvecs", bvecs(CODES[:2]) + bvecs(CODES[:1, :4]) + b"\0", "row 2 says 4 bytes, the first 5"),
        ("x.bvecs", struct.pack("<i", -1) + b"\0" * 20, "truncated or no .bvecs file"),
        ("x.bvecs", bvecs(np.zeros((1, 513), np.uint8)), "1 to 512 bytes, got 513"),
        ("x.hdf5", b"PK\3\4" + b"\0" * 100, "expected an HDF5 file, it begins .*zip archive"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        HammingIndex.open(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance": "euclidean"}, "expected the distance 'hamming'.*'euclidean'"),
        ({"distance": None}, "expected the distance 'hamming'.*None"),
        ({"name": "items"}, r"expected 'train' of ann-benchmarks, got \['items', 'test'\]"),
        ({"bits": BITS.astype(np.float32)}, r"expected bits.*float32 \(40, 37\)"),
        ({"bits": BITS[0]}, r"expected bits.*bool \(37,\)"),
        ({"bits": np.full((3, 4), 7)}, "must hold bits"),
    ],
)
def test_other_hdf5_files_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        HammingIndex.open(hdf5(tmp_path / "x.hdf5", **changes))
