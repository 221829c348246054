"""What MATLAB's variables are turned into, whichever format they come from: arrays, text, names for what is neither.

A value is a numpy array of numbers, an array of text (a row of a char matrix an entry), a list (a cell array), a dict
(a struct), or `Foreign`. `plain` makes of one what `convert.as_array` takes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cmr_fast.data.layouts import WORDS
from cmr_fast.errors import InputError

DEPTH = 16
"""Of cells and structs in each other."""
SMALL, ENTRY = 10**8, 10**5
"""A sparse matrix is made dense up to so many numbers, or so many an entry: a damaged size would fill any memory."""

_INSTEAD = {
    "string": "cellstr(x)",
    "categorical": "cellstr(x) or double(x)",
    "table": "table2array(x), or its columns one by one",
    "timetable": "table2array(timetable2table(x, 'ConvertRowTimes', false))",
    "datetime": "datenum(x)",
    "duration": "seconds(x)",
    "containers.Map": "x.keys and x.values",
}


class Foreign(NamedTuple):
    """A MATLAB variable that is neither numbers nor text, by its class."""

    kind: str

    def refuse(self, name: str) -> InputError:
        """The error for whoever asks for it."""
        instead = _INSTEAD.get(self.kind)
        todo = f"save {instead} in its place" if instead else "save numbers, char or cellstr in its place"
        return InputError(f"{name} is a MATLAB {self.kind}, which is not read; in MATLAB {todo}")


class Cell(NamedTuple):
    """A cell array, or a field of a struct array, in MATLAB's order."""

    items: list[Any]
    shape: tuple[int, ...]


def decoded(text: bytes) -> str:
    """UTF-8, or Latin-1 where it is not, so that different texts stay different."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def rows_of_text(codes: np.ndarray) -> np.ndarray:
    """str (rows,) of a char matrix of code units, without the blanks that fill its rows up (as MATLAB's cellstr)."""
    if codes.ndim > 2:
        raise ValueError(f"char arrays of {codes.ndim} axes")
    if codes.size == 0:
        return np.array([""] * (codes.shape[0] or 1))
    width = codes.dtype.itemsize
    units = np.ascontiguousarray(codes, dtype=f"<u{width}")
    wide = {2: "utf-16-le", 4: "utf-32-le"}.get(width)
    texts = (decoded(row.tobytes()) if wide is None else row.tobytes().decode(wide, "replace") for row in units)
    return np.array([text.rstrip(" \0") for text in texts])


def dense(rows: np.ndarray, ends: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A sparse matrix, kept by columns: `rows` and `values` of the entries, `ends` (columns + 1,) where columns end."""
    ends = ends.astype(np.int64)
    count = int(ends[-1]) if len(ends) else 0
    fits = len(ends) == shape[1] + 1 and ends[0] == 0 and (np.diff(ends) >= 0).all()
    if not fits or len(rows) < count or len(values) < count:
        raise ValueError("a sparse matrix whose columns do not end where its entries do")
    return scattered(rows[:count], np.repeat(np.arange(shape[1]), np.diff(ends)), values[:count], shape)


def scattered(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A matrix of zeros, and `values` (entries,) at their rows and columns."""
    if min(shape) < 0 or shape[0] * shape[1] > max(SMALL, ENTRY * len(values)):
        raise ValueError(f"a sparse matrix of shape {shape} with {len(values)} entries")
    for places, size in ((rows, shape[0]), (columns, shape[1])):
        if len(places) and not (places.min() >= 0 and places.max() < size):
            raise ValueError(f"a sparse matrix of shape {shape} with an entry beyond it")
    result = np.zeros(shape, values.dtype)
    np.add.at(result, (rows.astype(np.int64), columns.astype(np.int64)), values)
    return result


def plain(value: Any, name: str) -> Any:
    """Arrays and text as they are; a cell array of text as an array of it, of other things as a list."""
    if isinstance(value, Foreign):
        raise value.refuse(name)
    if isinstance(value, dict):
        raise InputError(f"{name} is a struct with {', '.join(value) or 'no fields'}, expected an array")
    if not isinstance(value, Cell):
        return value
    for item in value.items:
        if isinstance(item, Foreign):
            raise item.refuse(f"an entry of the cell array {name}")
    captions = [_captions(item) for item in value.items]
    if any(texts is None for texts in captions) or not any(map(_is_text, value.items)):
        return [plain(item, f"an entry of the cell array {name}") for item in value.items]
    if max(value.shape) == len(captions):  # a row or a column of cells: an item each
        rows = [texts or [""] for texts in captions]
        most = max(map(len, rows))
        table = np.array([[*row, *[""] * (most - len(row))] for row in rows])
        return table[:, 0] if most == 1 else table
    if any(len(texts or ()) > 1 for texts in captions):
        raise InputError(f"{name} is a cell array of shape {value.shape} of several texts each, expected one an entry")
    return np.array([(texts or [""])[0] for texts in captions]).reshape(value.shape, order="F")


def _is_text(value: Any) -> bool:
    if isinstance(value, Cell):
        return any(map(_is_text, value.items))
    return isinstance(value, np.ndarray) and value.dtype.kind == "U"


def _captions(value: Any) -> list[str] | None:
    """The texts of a cell: a text, a cell array of them, or nothing at all; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return [str(text) for text in value.ravel().tolist()]
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    if isinstance(value, Cell):
        parts = [_captions(item) for item in value.items]
        return None if any(part is None for part in parts) else [text for part in parts for text in part or ()]
    return None


def flattened(name: str, value: Any) -> dict[tuple[str, ...], Any]:
    """The values in a struct, by their path; a value that is no struct under its name alone."""
    if not isinstance(value, dict):
        return {(name,): value}
    return {(name, *path): part for field, item in value.items() for path, part in flattened(field, item).items()}


def short_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A name for the array at each path of groups or structs.

    Groups that a split is called by stay in the name (train/image is train_image), others do not (data/I_tr is I_tr),
    unless two arrays would be called the same.
    """
    paths = list(paths)
    names = {path: "_".join([*(p for p in path[:-1] if p.casefold() in WORDS), path[-1]]) for path in paths}
    taken = list(names.values())
    return {path: name if taken.count(name) == 1 else "_".join(path) for path, name in names.items()}


def readers(values: Mapping[tuple[str, ...], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The arrays at paths as `readers.Arrays`: each `plain` when it is asked for."""

    def reader(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: plain(call(), name)

    return {name: reader(name, values[path]) for path, name in short_names(values).items()}
