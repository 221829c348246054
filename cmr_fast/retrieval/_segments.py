"""What an index is made of: parts, each of contiguous codes and their ids, that never change once they are seen."""

import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.retrieval._plan import SearchPlan

_ROWS = 1 << 17  # rows of ids made at once
_WORTH_THREADS = 1 << 23  # bytes to check


Ids = np.ndarray | range


@dataclass(frozen=True, eq=False)
class Part:
    """Codes uint8 (n, nbytes) and their ids, int64 (n,) or a range where they count on."""

    codes: np.ndarray
    ids: Ids
    check: "Check | None" = None  # of a part that lies in a file
    plan: SearchPlan = field(default_factory=SearchPlan)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if isinstance(self.ids, range) else self.ids.nbytes)

    def sound(self) -> "Part":
        """This part, checked if it lies in a file and was not checked yet; InputError where it is damaged."""
        if self.check is not None:
            self.check.once(self)
        return self

    def ids_of(self, places: np.ndarray) -> np.ndarray:
        """Row numbers -> ids, int64, of the same shape."""
        if isinstance(self.ids, range):
            return places + self.ids.start if self.ids.start else places
        return self.ids[places].astype(np.int64, copy=False)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The rows, rising, whose ids are among `ids`, which rise."""
        if isinstance(self.ids, range):
            return ids[(ids >= self.ids.start) & (ids < self.ids.stop)] - self.ids.start
        return np.flatnonzero(np.isin(self.ids, ids))

    def without(self, rows: np.ndarray) -> "Part":
        kept = np.ones(len(self), dtype=bool)
        kept[rows] = False
        return Part(self.codes[kept], np.asarray(self.ids, dtype=np.int64)[kept])


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
    for start in range(0, len(ids), _ROWS):
        yield np.asarray(ids[start : start + _ROWS], dtype="<i8")


def first_sum(bits: int, first_id: int, of_ids: bool, block: int) -> int:
    """What the crc32 of a block begins with: a block is only right where it belongs."""
    return zlib.crc32(struct.pack("<Iq?q", bits, first_id, of_ids, block))


@dataclass(eq=False)
class Check:
    """The checksums of a part in a file. `once` checks before the first use, while whoever else comes waits."""

    where: str
    bits: int
    block_bytes: int
    codes: np.ndarray  # uint32 (blocks,)
    ids: np.ndarray
    _sound: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def once(self, part: Part) -> None:
        if self._sound:
            return
        with self._lock:
            if not self._sound:
                self.now(part)
                self._sound = True

    def trust(self) -> None:
        self._sound = True

    def now(self, part: Part) -> None:
        if isinstance(part.ids, range):
            blocks = self._blocks(part.codes, part.ids.start, False)
        else:
            blocks = self._blocks(part.codes, 0, False) + self._blocks(part.ids, 0, True)
        with ThreadPoolExecutor(_dispatch.choose_threads()) as pool:
            each = (pool.map if part.nbytes > _WORTH_THREADS else map)(lambda block: zlib.crc32(*block), blocks)
            sums = np.array(list(each), dtype=np.uint32)
        bad = np.count_nonzero(sums != np.concatenate([self.codes, self.ids]))
        if bad:
            raise InputError(f"{self.where} is damaged: {bad} of {len(sums)} blocks fail their checksum")

    def _blocks(self, x: np.ndarray, first_id: int, of_ids: bool) -> list[tuple[memoryview, int]]:
        flat = x.reshape(-1).view(np.uint8)
        starts = range(0, len(flat), self.block_bytes)
        return [
            (flat[start : start + self.block_bytes].data, first_sum(self.bits, first_id, of_ids, i))
            for i, start in enumerate(starts)
        ]
