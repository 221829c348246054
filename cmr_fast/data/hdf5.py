"""HDF5 files, MATLAB's v7.3 among them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmr_fast.data._values import DEPTH, Cell, Foreign, dense, plain, rows_of_text, short_names

MAGIC = b"\x89HDF\r\n\x1a\n"
_CLASS, _EMPTY, _OBJECT, _SPARSE = "MATLAB_class", "MATLAB_empty", "MATLAB_object_decode", "MATLAB_sparse"


def is_hdf5(file: Path) -> bool:
    """Whether the mark stands at byte 0, 512, 1024, 2048, …: before it a program may keep a block of its own."""
    size, offset = file.stat().st_size, 0
    with open(file, "rb") as stream:
        while offset + len(MAGIC) <= size:
            stream.seek(offset)
            if stream.read(len(MAGIC)) == MAGIC:
                return True
            offset = max(512, 2 * offset)
    return False


def read_hdf5(file: Path, matlab: bool) -> dict[str, Callable[[], Any]]:
    """Name to a function that reads a data set; those in groups by `short_names`.

    With `matlab`, and where objects name their MATLAB class, axes are turned back, so that shapes are MATLAB's; char
    and cell arrays become text.
    """
    import h5py

    paths: list[str] = []
    classes = [matlab]

    def note(name: str, item: Any) -> None:
        # MATLAB keeps the contents of cell arrays in #refs#, and a sparse matrix as a group of three parts
        inside = any(name.startswith(path + "/") for path in paths)
        classes.append(_CLASS in item.attrs)
        if not name.startswith("#") and not inside and (isinstance(item, h5py.Dataset) or _SPARSE in item.attrs):
            paths.append(name)

    # follows no link that leads out of the file
    with h5py.File(file, "r") as opened:
        opened.visititems(note)
    names = short_names(tuple(path.split("/")) for path in paths)
    return {name: partial(_read, file, "/".join(path), name, any(classes)) for path, name in names.items()}


def _read(file: Path, path: str, name: str, matlab: bool) -> Any:
    import h5py

    with h5py.File(file, "r") as opened:
        return plain(_value(opened, opened[path], matlab, 0), name)


def _value(opened: Any, item: Any, matlab: bool, depth: int) -> Any:
    import h5py

    if depth > DEPTH:
        raise ValueError(f"cells and structs more than {DEPTH} deep")
    kind = item.attrs.get(_CLASS, b"")
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
    if _OBJECT in item.attrs or kind == "function_handle":
        return Foreign(kind or "object")
    if isinstance(item, h5py.Group):
        if _SPARSE in item.attrs:
            return _sparse(item)
        return {name: _value(opened, part, matlab, depth + 1) for name, part in item.items()}
    if item.shape is None:
        return np.zeros((0, 0))
    if item.attrs.get(_EMPTY, 0):
        return _empty(item[()], kind)
    if h5py.check_string_dtype(item.dtype):
        text = np.asarray(item.asstr(errors="replace")[()]).astype(np.str_)
        return text.T if matlab else text
    if h5py.check_ref_dtype(item.dtype) is h5py.Reference:
        refs = np.asarray(item[()]).T
        return Cell([_follow(opened, ref, matlab, depth) for ref in refs.ravel(order="F")], refs.shape)
    value = np.asarray(item[()])
    value = value.T if matlab else value
    return rows_of_text(value) if kind == "char" and value.dtype.kind in "iu" else value


def _follow(opened: Any, ref: Any, matlab: bool, depth: int) -> Any:
    if not ref:
        return np.zeros((0, 0))
    return _value(opened, opened[ref], matlab, depth + 1)


def _empty(sizes: np.ndarray, kind: str) -> Any:
    """An empty array, of which MATLAB keeps the dimensions."""
    shape = tuple(int(size) for size in np.ravel(sizes))
    if not shape or min(shape) < 0 or np.prod(shape, dtype=object):
        raise ValueError(f"an empty array of shape {shape}")
    if kind == "char":
        return rows_of_text(np.zeros(shape, np.uint16))
    if kind == "cell":
        return Cell([], shape)
    return np.zeros(shape)


def _sparse(group: Any) -> np.ndarray:
    """A sparse matrix of MATLAB v7.3; one of zeros only has no data and no ir."""
    ends = group["jc"][()]
    values, rows = (group[part][()] if part in group else np.zeros(0) for part in ("data", "ir"))
    return dense(rows, ends, values, (int(group.attrs[_SPARSE]), len(ends) - 1))
