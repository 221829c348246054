"""Named arrays out of .mat (v4, v5 to v7, v7.3), .h5, .npy, .npz and .pkl files, each read when it is asked for."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmr_fast.data import formats, pickles
from cmr_fast.data.hdf5 import MAGIC, is_hdf5, read_hdf5
from cmr_fast.data.matlab import is_matlab4, is_matlab5, read_matlab4, read_matlab5
from cmr_fast.errors import InputError

SUFFIXES = (".mat", ".h5", ".hdf5", ".h5py", ".npy", ".npz", ".pkl", ".pickle")
Arrays = dict[str, Callable[[], Any]]
"""Key to a function that reads its value: a numpy array, from pickles also lists and dicts."""

_KNOWN = "MATLAB v5 or v7.3, HDF5, .npy, .npz, a pickle named .pkl, or MATLAB v4"


def read_arrays(path: str | os.PathLike[str]) -> Arrays:
    """What a file holds, by key; the format is told by its first bytes, not by its name.

    - .mat: v4 and v5 by `matlab`, v7.3 by h5py with the axes turned back, so all give MATLAB's shapes; sparse made
      dense, char matrices and cell arrays of text as text, structs by their fields
    - .h5: the data sets; those of groups by `_values.short_names`
    - .npz: its arrays; .npy: one, under the file's stem. No pickles inside
    - .pkl: the entries of a dict with string keys, else one value under the file's stem; by `pickles.load`

    Parameters
    ----------
    path : str or path
        The file.

    Returns
    -------
    dict of str to function
        Each reads one value: a numpy array of numbers or text, or lists and dicts.

    Raises
    ------
    InputError
        For a file that is missing, of no known format, or damaged (some only when a value is read).
    """
    file = Path(path)
    head = formats.first_bytes(file)
    if refused := formats.refusal(file, head):
        raise InputError(f"{file}: expected {_KNOWN}; it begins with {head[:16]!r} and {refused}")
    if is_matlab5(head):
        return guarded(file, "a MATLAB v5 file", read_matlab5)
    if head.startswith(b"MATLAB 7.3 MAT-file") or is_hdf5(file):
        matlab = not head.startswith(MAGIC)
        what = "a MATLAB v7.3 file" if matlab else "an HDF5 file"
        return guarded(file, what, lambda f: read_hdf5(f, matlab=matlab and head.startswith(b"MATLAB")))
    if head.startswith(b"MATLAB 5.0 MAT-file"):
        raise InputError(f"{file}: begins like a MATLAB v5 file, but its header is not one; damaged or cut short?")
    if head.startswith(b"\x93NUMPY"):
        return guarded(file, "a .npy file", lambda f: {f.stem: lambda: np.load(f, allow_pickle=False)})
    if head.startswith(b"PK\x03\x04"):
        return guarded(file, "a .npz file", _npz)
    if file.suffix.lower() in (".pkl", ".pickle"):
        return _pickle(file)
    if is_matlab4(head, file.stat().st_size):
        return guarded(file, "a MATLAB v4 file", read_matlab4)
    raise InputError(f"{file}: expected {_KNOWN}; it begins with {head[:16]!r}")


def guarded(file: Path, what: str, reader: Callable[[Path], Arrays]) -> Arrays:
    """`reader`'s arrays; whatever goes wrong in it or in the libraries, now or later, becomes one InputError."""

    def damaged(part: str, error: BaseException) -> InputError:
        reason = (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]
        return InputError(f"{file}: begins like {what}, but {part} cannot be read ({reason}); damaged or cut short?")

    def guard(call: Callable[[], Any], part: str) -> Any:
        try:
            return call()
        except InputError as error:
            message = str(error)
            raise InputError(message if message.startswith(str(file)) else f"{file}: {message}") from error.__cause__
        except ValueError as error:
            if "Object arrays cannot be loaded" in str(error):
                raise InputError(f"{file}: {part} {formats.OBJECTS}") from error
            raise damaged(part, error) from error
        except (Exception, RecursionError, MemoryError) as error:
            raise damaged(part, error) from error

    arrays = guard(lambda: reader(file), "its list of contents")
    return {key: partial(guard, call, key) for key, call in arrays.items()}


def _npz(file: Path) -> Arrays:
    if refused := formats.zip_refusal(file):
        raise InputError(refused)

    def read(key: str) -> np.ndarray:
        with np.load(file, allow_pickle=False) as opened:
            return np.asarray(opened[key])

    with np.load(file, allow_pickle=False) as opened:
        return {key: partial(read, key) for key in opened.files}


def _pickle(file: Path) -> Arrays:
    value = pickles.load(file)
    # as in train_id_bow.pkl: rows by item id, one value
    by_id = "_id_" in file.stem
    if isinstance(value, dict) and value and not by_id and all(isinstance(key, str) for key in value):
        return {key: partial(value.get, key) for key in value}
    return {file.stem: lambda: value}
