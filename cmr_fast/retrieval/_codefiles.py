"""Files of codes that others wrote: .u8bin, .bvecs, and the HDF5 files of ann-benchmarks whose distance is Hamming.

.u8bin     uint32 rows and bytes a row, little-endian, then the rows (big-ann-benchmarks).
.bvecs     each row after its own int32 number of bytes (TEXMEX).
HDF5       "train" and "test", bool (N, bits), one bit a value, by an attribute "distance" of "hamming".

Rows of the first two are taken as packed codes; bits of the third are packed, in blocks.
"""

import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cmr_fast._files import StrPath, as_path, check_regular, named
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import MAX_BITS
from cmr_fast.ops.hamming import pack_codes
from cmr_fast.retrieval._checks import code_length, packed_codes
from cmr_fast.retrieval._formats import CODE_SUFFIXES, HEAD, what_it_is

Dataset = Literal["train", "test"]
_ROWS = 1 << 16
_HDF5 = b"\x89HDF\r\n\x1a\n"


def has_codes(path: StrPath) -> bool:
    """Whether a file is, by its name, one of those that `read_codes` reads."""
    return as_path(path).suffix in CODE_SUFFIXES


def read_codes(path: StrPath, dataset: Dataset = "train", bits: int | None = None) -> tuple[int, np.ndarray]:
    """Bits, and packed codes uint8 (N, nbytes), mapped where the file holds them packed.

    Parameters
    ----------
    path : path
        .u8bin, .bvecs, .hdf5 or .h5.
    dataset : {"train", "test"}
        Of an HDF5 file: what is searched, or the queries.
    bits : int, optional
        The code length that is expected; rows of .u8bin and .bvecs may be a few bits longer.

    Returns
    -------
    bits : int
        Of a code.
    codes : ndarray
        uint8 (N, nbytes).

    Raises
    ------
    InputError
        For a file that is missing, cut off, too wide or something else, saying what it is, and another code length.
    """
    path = as_path(path)
    if not has_codes(path):
        raise InputError(
            f"{path}: expected a name in {', '.join(CODE_SUFFIXES)}; numpy.load and HammingIndex.open read others"
        )
    check_regular(path, "file of codes")
    with named(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEAD)
    if path.suffix in (".hdf5", ".h5"):
        if not head.startswith(_HDF5):
            raise InputError(f"{path}: expected an HDF5 file, it {what_it_is(head)}")
        held, codes = _read_hdf5(path, dataset)
        if bits is not None and code_length(bits) != held:
            raise InputError(f"{path}: its codes have {held} bits, expected {bits}")
        return held, codes
    codes = _read_u8bin(path, head, size) if path.suffix == ".u8bin" else _read_bvecs(path, head, size)
    number = 8 * codes.shape[1] if bits is None else code_length(bits)
    return number, packed_codes(codes, f"{path}", number)


def _read_u8bin(path: Path, head: bytes, size: int) -> np.ndarray:
    if size < 8:
        raise _other(path, head, "uint32 rows and bytes a row first")
    rows, width = struct.unpack_from("<2I", head)
    if size != 8 + rows * width:
        raise _other(path, head, f"{8 + rows * width} bytes for {rows} rows of {width} bytes, got {size}")
    _check_width(path, width)
    return np.memmap(path, np.uint8, "r", 8, (rows, width)) if rows else np.empty((0, width), np.uint8)


def _read_bvecs(path: Path, head: bytes, size: int) -> np.ndarray:
    if size < 4:
        raise _other(path, head, "an int32 of bytes a row first")
    (width,) = struct.unpack_from("<i", head)
    if width < 1 or size % (4 + width):
        raise _other(path, head, f"rows of 4 + {width} bytes, as the first says, got {size} bytes")
    _check_width(path, width)
    rows = np.memmap(path, np.uint8, "r", shape=(size // (4 + width), 4 + width))
    for start in range(0, len(rows), _ROWS):
        other = (rows[start : start + _ROWS, :4] != rows[0, :4]).any(axis=1)
        if other.any():
            row = start + int(other.argmax())
            (seen,) = struct.unpack("<i", rows[row, :4].tobytes())
            raise InputError(f"{path} is truncated or damaged: row {row} says {seen} bytes, the first {width}")
    return rows[:, 4:]


def _read_hdf5(path: Path, dataset: Dataset) -> tuple[int, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f'{path}: HDF5 files need h5py: pip install "cmr-fast[train]"') from error
    try:
        with h5py.File(path, "r") as file:
            distance = file.attrs.get("distance")
            distance = distance.decode() if isinstance(distance, bytes) else distance
            bits = file.get(dataset)
            if not isinstance(bits, h5py.Dataset):
                raise InputError(f"{path}: expected {dataset!r} of ann-benchmarks, got {sorted(file)}")
            if distance != "hamming":
                raise InputError(f"{path}: expected the distance 'hamming' among its attributes, got {distance!r}")
            if bits.ndim != 2 or not 1 <= bits.shape[1] <= MAX_BITS or bits.dtype.kind not in "biu":
                raise InputError(
                    f"{path}: expected bits, bool (N, bits) of 1 to {MAX_BITS} bits, in {dataset!r}, got {bits.dtype} "
                    f"{bits.shape}"
                )
            codes = np.empty((bits.shape[0], -(-bits.shape[1] // 8)), np.uint8)
            for start in range(0, len(codes), _ROWS):
                codes[start : start + _ROWS] = _packed(path, bits[start : start + _ROWS])
            return int(bits.shape[1]), codes
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path} is truncated or damaged: {' '.join(str(error).split())}") from error


def _packed(path: Path, bits: Any) -> np.ndarray:
    try:
        return np.asarray(pack_codes(bits))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _check_width(path: Path, width: int) -> None:
    if not 1 <= width <= MAX_BITS // 8:
        raise InputError(f"{path}: expected rows of 1 to {MAX_BITS // 8} bytes, got {width}")


def _other(path: Path, head: bytes, expected: str) -> InputError:
    return InputError(f"{path} is truncated or no {path.suffix} file: expected {expected}; it {what_it_is(head)}")
