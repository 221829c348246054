"""Named arrays out of .mat (v5, v7.3), .h5, .npy, .npz and .pkl files, each read when it is asked for."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmr_fast.errors import InputError

SUFFIXES = (".mat", ".h5", ".hdf5", ".h5py", ".npy", ".npz", ".pkl", ".pickle")
Arrays = dict[str, Callable[[], Any]]
"""Key to a function that reads its value: a numpy array, from pickles also lists and dicts."""

_HDF5 = b"\x89HDF\r\n\x1a\n"


def read_arrays(path: str | os.PathLike[str]) -> Arrays:
    """What the file holds, by key; the format is told by its first bytes, not by its name.

    .mat    v5 by scipy, v7.3 by h5py with the axes turned back, so both give MATLAB's shapes; sparse made dense
    .h5     the data sets; those of groups as group_name
    .npz    its arrays; .npy: one, under the file's stem. No pickles inside
    .pkl    the entries of a dict with string keys, else one value under the file's stem; by `pickles.load`

    Raises InputError for a file that is missing, of no known format, or damaged (some only when a value is read).
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with open(file, "rb") as stream:
        head = stream.read(128)
    if not head:
        raise InputError(f"{file}: is empty")
    if head.startswith(b"MATLAB 5.0 MAT-file"):
        return _guarded(file, "a MATLAB v5 file", _matlab5)
    if head.startswith(b"MATLAB 7.3 MAT-file"):
        return _guarded(file, "a MATLAB v7.3 file", lambda f: _hdf5(f, matlab=True))
    if head.startswith(_HDF5):
        return _guarded(file, "an HDF5 file", lambda f: _hdf5(f, matlab=False))
    if head.startswith(b"\x93NUMPY"):
        return _guarded(file, "a .npy file", lambda f: {f.stem: lambda: np.load(f, allow_pickle=False)})
    if head.startswith(b"PK\x03\x04"):
        return _guarded(file, "a .npz file", _npz)
    if file.suffix in (".pkl", ".pickle"):
        return _pickle(file)
    known = "MATLAB v5 or v7.3, HDF5, .npy, .npz, or a pickle named .pkl"
    raise InputError(f"{file}: expected {known}; it begins with {head[:16]!r}")


def _guarded(file: Path, what: str, reader: Callable[[Path], Arrays]) -> Arrays:
    """`reader`'s arrays; whatever goes wrong in the libraries, now or later, becomes one InputError."""

    def guard(call: Callable[[], Any], part: str) -> Any:
        try:
            return call()
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(
                f"{file}: begins like {what}, but {part} cannot be read ({reason}); damaged or cut short?"
            ) from error

    arrays = guard(lambda: reader(file), "its list of contents")
    return {key: partial(guard, call, key) for key, call in arrays.items()}


def _matlab5(file: Path) -> Arrays:
    import scipy.io
    import scipy.sparse

    def read(key: str) -> np.ndarray:
        value = scipy.io.loadmat(file, variable_names=[key])[key]
        return value.toarray() if scipy.sparse.issparse(value) else value

    return {key: partial(read, key) for key, _, _ in scipy.io.whosmat(file)}


def _hdf5(file: Path, matlab: bool) -> Arrays:
    import h5py

    keys: list[str] = []

    def note(name: str, item: Any) -> None:
        # MATLAB keeps the contents of cell arrays in #refs#, and a sparse matrix as a group of three parts
        inside = any(name.startswith(key + "/") for key in keys)
        if not name.startswith("#") and not inside and (isinstance(item, h5py.Dataset) or _SPARSE in item.attrs):
            keys.append(name)

    # follows no link that leads out of the file
    with h5py.File(file, "r") as opened:
        opened.visititems(note)

    def read(key: str) -> np.ndarray:
        with h5py.File(file, "r") as opened:
            data = opened[key]
            if isinstance(data, h5py.Group):
                return _sparse(data)
            value = data.asstr()[()] if h5py.check_string_dtype(data.dtype) else data[()]
        return np.asarray(value).T if matlab else np.asarray(value)

    return {key.replace("/", "_"): partial(read, key) for key in keys}


_SPARSE = "MATLAB_sparse"


def _sparse(group: Any) -> np.ndarray:
    """A sparse matrix of MATLAB v7.3, stored by columns; one of zeros only has no data and no ir."""
    import scipy.sparse

    ends, rows = group["jc"][()].astype(np.int64), int(group.attrs[_SPARSE])
    values = [group[part][()] if part in group else np.zeros(0) for part in ("data", "ir")]
    matrix = scipy.sparse.csc_matrix((values[0], values[1].astype(np.int64), ends), shape=(rows, len(ends) - 1))
    return matrix.toarray()


def _npz(file: Path) -> Arrays:
    def read(key: str) -> np.ndarray:
        with np.load(file, allow_pickle=False) as opened:
            return opened[key]

    with np.load(file, allow_pickle=False) as opened:
        return {key: partial(read, key) for key in opened.files}


def _pickle(file: Path) -> Arrays:
    from cmr_fast.data import pickles

    value = pickles.load(file)
    # as in train_id_bow.pkl: rows by item id, one value
    by_id = "_id_" in file.stem
    if isinstance(value, dict) and value and not by_id and all(isinstance(key, str) for key in value):
        return {key: partial(value.get, key) for key in value}
    return {file.stem: lambda: value}
