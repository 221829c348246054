"""HDF5 files, MATLAB's v7.3 among them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmr_fast.data._values import DEPTH, Cell, Foreign, decoded, dense, plain, rows_of_text, short_names

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

    paths: list[tuple[str, ...]] = []
    classes = [matlab]

    def walk(group: Any, path: tuple[str, ...], above: frozenset[Any]) -> None:
        for name in group:
            # MATLAB keeps the contents of cell arrays in #refs#; a link may lead out of the file, or round in it
            if name.startswith("#") or not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            classes.append(_CLASS in item.attrs)
            if isinstance(item, h5py.Dataset) or _SPARSE in item.attrs:
                paths.append((*path, name))
            elif isinstance(item, h5py.Group) and item.id not in above:
                walk(item, (*path, name), above | {item.id})

    with h5py.File(file, "r") as opened:
        walk(opened, (), frozenset({opened["/"].id}))
    names = short_names(paths)
    return {name: partial(_read, file, "/".join(path), name, any(classes)) for path, name in names.items()}


def _read(file: Path, path: str, name: str, matlab: bool) -> Any:
    import h5py

    with h5py.File(file, "r") as opened:
        return plain(_value(opened, opened[path], matlab, 0), name)


def _value(opened: Any, item: Any, matlab: bool, depth: int) -> Any:
    import h5py

    if depth > DEPTH:
        raise ValueError(f"cells and structs more than {DEPTH} deep")
    marks = {name for name in (_CLASS, _EMPTY, _OBJECT, _SPARSE) if h5py.h5a.exists(item.id, name.encode())}
    kind = item.attrs[_CLASS] if _CLASS in marks else b""
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
    if _OBJECT in marks or kind == "function_handle":
        return Foreign(kind or "object")
    if isinstance(item, h5py.Group):
        if _SPARSE in marks:
            return _sparse(item)
        return {name: _value(opened, part, matlab, depth + 1) for name, part in item.items()}
    if item.shape is None:
        return np.zeros((0, 0))
    if _EMPTY in marks and item.attrs[_EMPTY]:
        return _empty(item[()], kind)
    if kind == "char" and item.dtype.kind in "iu":
        value = np.asarray(item[()])
        return rows_of_text(value.T if matlab else value)
    if h5py.check_string_dtype(item.dtype):
        # h5py takes text of a fixed length that is not declared UTF-8 for ASCII
        rows = np.asarray(item[()])
        text = np.array([decoded(bytes(row)) for row in rows.ravel()], dtype=np.str_).reshape(rows.shape)
        return text.T if matlab else text
    if h5py.check_ref_dtype(item.dtype) is h5py.Reference:
        refs = np.asarray(item[()]).T
        return Cell([_follow(opened, ref, matlab, depth) for ref in refs.ravel(order="F")], refs.shape)
    value = np.asarray(item[()])
    return value.T if matlab else value


def _follow(opened: Any, ref: Any, matlab: bool, depth: int) -> Any:
    if not ref:
        return np.zeros((0, 0))
    codes = _letters(opened, ref)
    return _value(opened, opened[ref], matlab, depth + 1) if codes is None else rows_of_text(codes)


def _letters(opened: Any, ref: Any) -> np.ndarray | None:
    """A char matrix that is not empty, past h5py's objects: a cell array has one an item, and they are slow."""
    from h5py import h5a, h5d, h5r, h5s

    item = h5r.dereference(ref, opened.id)
    if not isinstance(item, h5d.DatasetID) or h5a.exists(item, _EMPTY.encode()) or item.dtype.kind not in "iu":
        return None
    if not h5a.exists(item, _CLASS.encode()):
        return None
    attribute = h5a.open(item, _CLASS.encode())
    if attribute.dtype != np.dtype("S4") or attribute.shape != ():
        return None
    kind = np.empty((), attribute.dtype)
    attribute.read(kind)
    if kind != b"char":
        return None
    codes = np.empty(item.shape, item.dtype)
    item.read(h5s.ALL, h5s.ALL, codes)
    return codes.T


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
