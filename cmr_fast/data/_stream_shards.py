"""The files of a stream of pairs: webdataset tars and Parquet. What is in them is listed without reading it."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cmr_fast.data.captions import CAPTION_NAMES, PHOTO_SUFFIXES, captions_in
from cmr_fast.data.photos import Photo, tar_samples
from cmr_fast.errors import InputError

TAR, PARQUET = ".tar", ".parquet"
_ROWS = 256  # of a Parquet file, decoded together
_TAR_IMAGES, _TAR_TEXTS = (*PHOTO_SUFFIXES, ".image.npy"), (".txt", ".json", ".text.npy")
_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "image_bytes", "img", "image_features", "image_embedding")
_TEXT_NAMES = (*CAPTION_NAMES, "captions", "txt", "text_features", "text_embedding")

# a photo's file or where it lies, captions or why there are none, a row of features or of codes
Value = bytes | Photo | tuple[str, ...] | InputError | np.ndarray


class Sample(NamedTuple):
    """A pair as its file has it: its name, what tells it from others, and its two sides."""

    name: str
    image: Value
    text: Value


class Shard(Protocol):
    """A file of pairs."""

    path: Path

    def __len__(self) -> int:
        """Pairs in it."""

    def read(self, rows: Sequence[int], *, photos: bool = True) -> list[Sample]:
        """The pairs at `rows`, which rise; without `photos` those of a tar are left there, as a `Photo`."""

    def close(self) -> None:
        """Let go of the file, until it is read again."""


class TarShard:
    """A tar of webdataset: members of one name up to the first dot are a sample."""

    def __init__(self, path: Path, image: str | None = None, text: str | None = None) -> None:
        self.path = path
        self._endings = tuple(
            known if ending is None else ("." + ending.lower().removeprefix("."),)
            for ending, known in ((image, _TAR_IMAGES), (text, _TAR_TEXTS))
        )
        self._samples: list[tuple[str, Photo, Photo]] | None = None
        self._rows: int | None = None

    def __len__(self) -> int:
        return len(self._listed()) if self._rows is None else self._rows

    def read(self, rows: Sequence[int], *, photos: bool = True) -> list[Sample]:
        """The pairs at `rows`; without `photos` these are left where they lie."""
        listed = self._listed()
        return [
            Sample(f"{self.path}: {listed[row][0]}", *(_of_member(member, photos) for member in listed[row][1:]))
            for row in rows
        ]

    def close(self) -> None:
        """Forget what it holds but how many: the names of all files together may not fit into memory."""
        self._samples = None

    def _listed(self) -> list[tuple[str, Photo, Photo]]:
        if self._samples is None:
            samples = []
            for key, members in tar_samples(self.path).items():
                sides = [next((members[e] for e in endings if e in members), None) for endings in self._endings]
                if sides[0] is None or sides[1] is None:
                    lacks = ("image", "text")[sides[0] is not None]
                    expected = self._endings[sides[0] is not None]
                    raise InputError(
                        f"{self.path}: {key} has no {lacks}; expected one of {', '.join(expected)} beside "
                        f"{', '.join(sorted(members))}"
                    )
                samples.append((key, sides[0], sides[1]))
            self._samples, self._rows = samples, _as_before(self.path, self._rows, len(samples))
        return self._samples


def _as_before(path: Path, before: int | None, count: int) -> int:
    if before not in (None, count):
        raise InputError(f"{path}: had {before} pairs when it was first listed and has {count} now; it was changed")
    return count


def _of_member(member: Photo, photos: bool) -> Value:
    if member.name.lower().endswith(".npy"):
        try:
            row = np.load(BytesIO(member.read()), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{member.path}: {member.name} is no .npy array ({error})") from error
        if row.ndim != 1 or row.dtype.kind not in "fiu":
            raise InputError(f"{member.path}: {member.name} must be features (d,), got {row.dtype} {row.shape}")
        return np.asarray(row)
    if member.name.lower().endswith((".txt", ".json")):
        data = member.read()
        try:
            return captions_in(member, data)
        except InputError as error:
            return error
    return member.read() if photos else member


class ParquetShard:
    """A Parquet file whose columns are the two sides of pairs."""

    def __init__(self, path: Path, image: str | None = None, text: str | None = None) -> None:
        self.path = path
        self._asked = image, text
        self._columns: tuple[str, ...] = ()
        self._rows: int | None = None
        self._file: Any = None
        self._cursor: Iterator[tuple[int, Any]] = iter(())
        self._held: tuple[int, Any] | None = None  # the rows that the cursor is at

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_asked": self._asked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], *state["_asked"])  # type: ignore[misc]

    def __len__(self) -> int:
        if self._rows is None:
            self._open()
            self.close()
        return int(self._rows or 0)

    def read(self, rows: Sequence[int], *, photos: bool = True) -> list[Sample]:
        """The pairs at `rows`, which rise, always with photos; rows after those of the call before are read on."""
        if self._file is None:
            self._open()
        if len(rows) and (self._held is None or rows[0] < self._held[0]):
            self._cursor, self._held = row_blocks(self._file, self.path, self._columns, rows[0]), None
        out: list[Sample] = []
        while len(out) < len(rows):
            if self._held is None or rows[len(out)] >= self._held[0] + self._held[1].num_rows:
                self._held = next(self._cursor)
                continue
            start, block = self._held
            end = int(np.searchsorted(rows, start + block.num_rows))
            places = np.asarray(rows[len(out) : end]) - start
            sides = [column_values(block.column(c).take(places), self.path, c, start) for c in self._columns]
            names = (f"{self.path}: row {start + place}" for place in places)
            out += [Sample(*each) for each in zip(names, *sides, strict=True)]
        return out

    def close(self) -> None:
        """Close the file: there may be more of them than a process may have open."""
        if self._file is not None:
            self._file.close()
        self._file, self._cursor, self._held = None, iter(()), None

    def _open(self) -> None:
        self._file = opened_parquet(self.path)
        self._rows = _as_before(self.path, self._rows, int(self._file.metadata.num_rows))
        known = _IMAGE_NAMES, _TEXT_NAMES
        self._columns = tuple(
            column_of(self._file, self.path, asked, names, side)
            for asked, names, side in zip(self._asked, known, ("image", "text"), strict=True)
        )


def opened_parquet(path: Path) -> Any:
    """pyarrow's ParquetFile. InputError where pyarrow is missing, or the file is, or is another one."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet files need pyarrow: pip install 'cmr-fast[stream]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"{path}: damaged, or no Parquet file ({_first_line(error)})") from error


def column_of(file: Any, path: Path, asked: str | None, names: Sequence[str], side: str) -> str:
    """The column that is asked for, else the first there of `names`. InputError where there is none."""
    there = file.schema_arrow.names
    wanted = names if asked is None else (asked,)
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise InputError(
            f"{path}: no column for {side}; expected {' or '.join(wanted)}, or {side}=COLUMN, it has {', '.join(there)}"
        )
    if there.count(found) > 1:
        raise InputError(f"{path}: {there.count(found)} columns are named {found}, expected one")
    return str(found)


def row_blocks(file: Any, path: Path, columns: Sequence[str], row: int = 0) -> Iterator[tuple[int, Any]]:
    """Rows from the row group of `row` on, some at a time: the number of their first, and a RecordBatch."""
    import pyarrow as arrow

    counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    ends = np.cumsum([0, *counts])
    first = int(np.searchsorted(ends, row, "right")) - 1
    at = int(ends[first])
    try:
        for block in file.iter_batches(_ROWS, row_groups=range(first, len(counts)), columns=list(columns)):
            yield at, block
            at += block.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"{path}: damaged near row {at} ({_first_line(error)})") from error


def column_values(column: Any, path: Path, name: str, start: int) -> list[Any] | np.ndarray:
    """Values of a column: bytes of photos, tuples of captions, or an array (n, d).

    path, name, start    of an error: the file, the column, and the first row
    """
    from pyarrow import types

    kind = column.type
    where = f"{path}: column {name}, rows from {start} on,"
    if column.null_count:
        raise InputError(f"{where} has {column.null_count} missing values")
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as datasets of Hugging Face keep photos
        return column_values(column.field("bytes"), path, f"{name}.bytes", start)
    if types.is_fixed_size_binary(kind):
        return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(len(column), kind.byte_width)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return list(column.to_pylist())
    if types.is_string(kind) or types.is_large_string(kind):
        return [(caption,) for caption in column.to_pylist()]
    if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
        if types.is_string(kind.value_type) or types.is_large_string(kind.value_type):
            return [tuple(caption or "" for caption in captions) for captions in column.to_pylist()]
        values = column.flatten()
        if (types.is_floating(values.type) or types.is_integer(values.type)) and not values.null_count:
            return _rows_of(column, values.to_numpy(zero_copy_only=False), where)
    raise InputError(f"{where} is {kind}, expected bytes of photos, text, or lists of numbers without missing ones")


def _rows_of(column: Any, values: np.ndarray, where: str) -> np.ndarray:
    widths = np.diff(np.asarray(column.offsets)) if hasattr(column, "offsets") else None
    if widths is not None and len(np.unique(widths)) > 1:
        seen = np.unique(widths)
        raise InputError(f"{where} has lists of {seen[0]} and of {seen[1]} numbers, expected one width")
    return values.reshape(len(column), -1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
