"""What an index is made of: parts, each of contiguous codes and their ids, that never change once they are seen."""

import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

_ROWS = 1 << 17  # rows of ids made at once

Ids = np.ndarray | range


class Source(Protocol):
    """Where a part lies in a file. It can be pickled."""

    def verify(self, part: "Part") -> None:
        """InputError where the file holds checksums and the part does not have them."""

    def open(self) -> "Part":
        """The part once more, of the file as it is now; InputError where that is another one."""


class _Checked:
    """Whether a part was compared with its checksums."""

    def __init__(self) -> None:
        self.done = False
        self.lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Part:
    """Codes uint8 (n, nbytes) and their ids, int64 (n,) or a range where they count on."""

    codes: np.ndarray
    ids: Ids
    source: Source | None = None  # of a part that is mapped
    _checked: _Checked = field(default_factory=_Checked, repr=False)

    def __len__(self) -> int:
        return len(self.codes)

    def __deepcopy__(self, memo: object) -> "Part":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (Part, (self.codes, self.ids)) if self.source is None else (self.source.open, ())

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ids."""
        return self.codes.nbytes + (0 if isinstance(self.ids, range) else self.ids.nbytes)

    def sound(self) -> "Part":
        """The part itself, verified if it lies in a file and was not yet, while whoever else comes waits."""
        if self.source is not None and not self._checked.done:
            with self._checked.lock:
                if not self._checked.done:
                    self.source.verify(self)
                    self._checked.done = True
        return self

    def trust(self) -> None:
        """Take this part for verified."""
        self._checked.done = True

    def verify(self) -> None:
        """Verify this part now, whether it was or not."""
        if self.source is not None:
            self.source.verify(self)

    def ids_of(self, places: np.ndarray) -> np.ndarray:
        """Row numbers -> ids, int64, of the same shape."""
        if isinstance(self.ids, range):
            return places + self.ids.start if self.ids.start else places
        return np.asarray(self.ids[places].astype(np.int64, copy=False))

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows, rising, whose ids are among `ids`, which rise."""
        if isinstance(self.ids, range):
            return ids[(ids >= self.ids.start) & (ids < self.ids.stop)] - self.ids.start
        return np.flatnonzero(np.isin(self.ids, ids))

    def without(self, rows: np.ndarray) -> "Part":
        """A copy of the other rows, in memory."""
        mask = np.ones(len(self), dtype=bool)
        mask[rows] = False
        return Part(self.codes[mask], np.asarray(self.ids, dtype=np.int64)[mask])


class Tail:
    """The last part of an index, in memory, that grows: rows are only written beyond those of parts handed out."""

    def __init__(self, nbytes: int) -> None:
        self._codes = np.empty((0, nbytes), dtype=np.uint8)
        self._ids: np.ndarray | None = None
        self._first_id = 0
        self._used = 0

    def extended(self, codes: np.ndarray, ids: Ids) -> Part:
        """The part after `codes` and their ids are added. Buffers grow by half: many small pieces are cheap."""
        start, end = self._used, self._used + len(codes)
        grown = _grown(self._codes, start, end)
        grown[start:end] = codes
        buffer, first = self._ids, self._first_id
        if buffer is None and isinstance(ids, range) and (start == 0 or ids.start == first + start):
            first = ids.start - start
        else:
            buffer = _grown(np.arange(first, first + start) if buffer is None else buffer, start, end)
            buffer[start:end] = ids
        self._codes, self._ids, self._first_id, self._used = grown, buffer, first, end
        return Part(grown[:end], range(first, first + end) if buffer is None else buffer[:end])

    @property
    def nbytes(self) -> int:
        """Bytes held, those of spare rows included."""
        return self._codes.nbytes + (0 if self._ids is None else self._ids.nbytes)


def _grown(x: np.ndarray, used: int, needed: int) -> np.ndarray:
    if needed <= len(x):
        return x
    out = np.empty((max(needed, len(x) + len(x) // 2), *x.shape[1:]), dtype=x.dtype)
    out[:used] = x[:used]
    return out


def joined(parts: Sequence[Part]) -> range | None:
    """The ids of all parts together, where they count on through them, else None."""
    out: range | None = None
    for ids in (part.ids for part in parts if len(part)):
        if not isinstance(ids, range) or (out is not None and ids.start != out.stop):
            return None
        out = range(ids.start if out is None else out.start, ids.stop)
    return out or range(0)


def id_blocks(ids: Ids) -> Iterator[np.ndarray]:
    """Ids as int64 arrays, some at a time."""
    for start in range(0, len(ids), _ROWS):
        yield np.asarray(ids[start : start + _ROWS], dtype="<i8")


def is_mapped(x: Any) -> bool:
    """Whether an array lies in a file."""
    while isinstance(x, np.ndarray):
        x = x.base
    return isinstance(x, mmap.mmap)
