"""HDF5 files, MATLAB's v7.3 among them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmr_fast.data._values import DEPTH, Cell, Foreign, decoded, dense, plain, rows_of_text, short_names
from cmr_fast.errors import InputError

MAGIC = b"\x89HDF\r\n\x1a\n"
_SLICE = 2**24
"""Numbers of a slice of images: floats of a whole set of photos would fill any memory."""
_SPAN = 20
"""Pixels of a set of photos span more, with their mean subtracted too."""
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


class Entry(NamedTuple):
    """What lies in a file under a name: its path there, and of a data set shape and whether it is text."""

    path: str
    shape: tuple[int, ...]
    text: bool


def read_hdf5(file: Path, matlab: bool) -> dict[str, Callable[[], Any]]:
    """Name to a function that reads a data set; those in groups by `short_names`.

    With `matlab`, and where objects name their MATLAB class, axes are turned back, so that shapes are MATLAB's; char
    and cell arrays become text.
    """
    entries, classes = list_hdf5(file)
    return {name: partial(_read, file, entry.path, name, matlab or classes) for name, entry in entries.items()}


def list_hdf5(file: Path) -> tuple[dict[str, Entry], bool]:
    """The names of `read_hdf5` with what lies there, of which nothing is read; whether objects name MATLAB classes."""
    import h5py

    found: dict[tuple[str, ...], Entry] = {}
    classes = [False]

    def walk(group: Any, path: tuple[str, ...], above: frozenset[Any]) -> None:
        for name in group:
            # MATLAB keeps the contents of cell arrays in #refs#; a link may lead out of the file, or round in it
            if name.startswith("#") or not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            classes.append(_CLASS in item.attrs)
            if isinstance(item, h5py.Dataset) or _SPARSE in item.attrs:
                whole, shape = "/".join((*path, name)), getattr(item, "shape", None) or ()
                found[*path, name] = Entry(whole, shape, isinstance(item, h5py.Dataset) and _is_text(item))
            elif isinstance(item, h5py.Group) and item.id not in above:
                walk(item, (*path, name), above | {item.id})

    with h5py.File(file, "r") as opened:
        walk(opened, (), frozenset({opened["/"].id}))
    return {name: found[path] for path, name in short_names(found).items()}, any(classes)


def _is_text(item: Any) -> bool:
    import h5py

    return bool(item.id.get_type().get_class() == h5py.h5t.STRING)


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
    pixels = _whole_pixels(item)
    value = np.asarray(item[()]) if pixels is None else pixels
    return value.T if matlab else value


def _whole_pixels(item: Any) -> np.ndarray | None:
    """Floats of images, read by slices as the uint8 that they are; None where it holds something else."""
    if item.ndim != 4 or 3 not in item.shape or item.dtype.kind != "f":
        return None
    out = np.empty(item.shape, dtype=np.uint8)
    for rows in _slices(item):
        part = item[rows]
        with np.errstate(invalid="ignore"):
            out[rows] = part
        if not np.array_equal(out[rows], part):
            return None
    return out


def _slices(item: Any) -> list[slice]:
    step = max(1, _SLICE * len(item) // max(1, item.size))
    return [slice(start, start + step) for start in range(0, len(item), step)]


def read_pixels(file: Path, path: str, mean: np.ndarray | None = None) -> np.ndarray:
    """Images (N, H, W, 3) or (N, 3, H, W) of an HDF5 file, as uint8 (N, 3, H, W); floats are read by slices.

    Parameters
    ----------
    file, path : Path, str
        The file, and the path of the data set in it.
    mean : numpy.ndarray, optional
        (H, W, 3) or (3, H, W): is added where the images have values below 0, whose mean was subtracted then.

    Raises
    ------
    InputError
        For other shapes, values that are not 0 to 255 when rounded, and floats that are no pixels: not whole, and of
        a span (the highest less the lowest, as stored) below 20, as standardised images are.
    """
    import h5py

    with h5py.File(file, "r") as opened:
        item = opened[path]
        channels = next((axis for axis in (3, 1) if item.ndim == 4 and item.shape[axis] == 3), None)
        if channels is None or item.dtype.kind not in "iuf":
            raise InputError(
                f"{file}: {path} must be images (N, H, W, 3) or (N, 3, H, W), or paths of photos, got {item.dtype} "
                f"{item.shape}"
            )
        if item.dtype.kind == "u" and item.dtype.itemsize == 1:
            return np.ascontiguousarray(np.moveaxis(item[()], channels, 1))
        shift = _mean_of(item, channels, mean, f"{file}: {path}")
        out = np.empty((len(item), 3, *np.delete(item.shape[1:], channels - 1)), dtype=np.uint8)
        highest, low, high, whole = 0.0, np.inf, -np.inf, True
        for rows in _slices(item):
            stored = item[rows]
            low, high = min(low, float(stored.min())), max(high, float(stored.max()))
            whole = whole and np.array_equal(stored, np.rint(stored))
            part = np.rint(np.moveaxis(stored, channels, 1) + shift)
            least, most = float(part.min()), float(part.max())
            if not (least >= 0 and most <= 255):
                raise InputError(f"{file}: {path} must be pixels from 0 to 255, got {least:g} to {most:g}")
            out[rows], highest = part, max(highest, most)
    if out.size and highest <= 1:
        raise InputError(f"{file}: {path} must be pixels from 0 to 255, got 0 to {highest:g}; times 255?")
    if not whole and high - low < _SPAN:
        raise InputError(
            f"{file}: {path} must be pixels from 0 to 255, got numbers that are not whole, {low:g} to {high:g}, a span "
            f"of {high - low:g}; expected {_SPAN} at least. Standardised images? Give them before that"
        )
    return out


def _mean_of(item: Any, channels: int, mean: np.ndarray | None, what: str) -> Any:
    """What to add to images: 0, or their mean where it was subtracted."""
    if mean is None or item.dtype.kind == "u" or not any((item[rows] < 0).any() for rows in _slices(item)):
        return 0
    shape = [size for axis, size in enumerate(item.shape) if axis not in (0, channels)]
    turned = np.moveaxis(mean, -1, 0) if mean.ndim == 3 and mean.shape[-1] == 3 else mean
    if turned.shape != (3, *shape):
        raise InputError(
            f"{what} has values below 0, and a mean of shape {mean.shape}; expected (3, {shape[0]}, {shape[1]})"
        )
    return turned


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
