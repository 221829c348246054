"""The file of a HammingIndex: parts of codes and ids, found by a directory, committed by a root.

Little-endian, version 2:

    roots       64 bytes at 0 and at 4096: magic, version, bits, sequence number, place and size of the directory, its
                crc32; the root's own crc32 in the last four bytes
    then, from 8192 on, each at a multiple of 64, in the order in which they were written:
    codes       uint8 (rows, nbytes) of a part
    ids         int64 (rows,) of a part whose ids do not count on from a first one
    directory   next id, number of parts, bytes in a block; per part: rows, places of codes and ids (0: no ids), first
                id; then per part a crc32 of every block of its codes and of its ids, begun with bits, first id and
                the block's number

Both roots are equal. An append writes codes, ids and a whole new directory beyond the committed end, flushes, writes
one root, flushes, then the other: at any moment one root is whole and points at a whole state, the old or the new one.
A root that is damaged later has its twin. What lies beyond the committed end is what a killed append left: ignored, and
written over by the next.

Parts at the end that are no larger than what follows are written anew together with it, so there are O(log N) parts and
every row is rewritten O(log N) times; when half of the file is such leavings, all of it is written aside and renamed.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from cmr_fast._files import StrPath, as_path, check_regular, named, remove_leavings, write_aside
from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._tensors import MAX_BITS
from cmr_fast.retrieval._formats import MAGIC, what_it_is
from cmr_fast.retrieval._segments import Ids, Part, id_blocks, joined

try:
    import fcntl
except ImportError:  # no advisory locks on this platform: appends do not wait for each other
    fcntl = None  # type: ignore[assignment]

VERSION = 2
_ROOT = struct.Struct("<8sIIQQQI")  # magic, version, bits, sequence number, directory's place, size, crc32
_ROOT_BYTES = 64
_ROOT_PLACES = (0, 4096)
_DATA_AT = 8192
_HEAD = struct.Struct("<qII")  # next id, parts, bytes in a block
_ENTRY = np.dtype([("rows", "<i8"), ("codes_at", "<i8"), ("ids_at", "<i8"), ("first_id", "<i8")])
_BLOCK_BYTES = 1 << 22
_SPARE_BYTES = 1 << 20  # leavings that are never worth a rewrite
_WORTH_THREADS = 1 << 23  # bytes to verify

Progress = Callable[[int], object]  # called with the number of rows written
Checksums = tuple[np.ndarray, np.ndarray]  # uint32 of every block of a part's codes and of its ids


@dataclass(frozen=True, eq=False)
class Stretch:
    """Where a part lies in an index file, and its checksums."""

    path: str
    bits: int
    rows: int
    codes_at: int
    ids_at: int  # 0: ids count on from first_id
    first_id: int
    block_bytes: int
    checksums: Checksums
    again: bool = False  # opened for an index that was pickled

    def part(self, data: np.ndarray) -> Part:
        """The part, of the mapped file."""
        nbytes = -(-self.bits // 8)
        codes = data[self.codes_at : self.codes_at + self.rows * nbytes].reshape(self.rows, nbytes)
        ids: Ids = range(self.first_id, self.first_id + self.rows)
        if self.ids_at:
            ids = data[self.ids_at : self.ids_at + self.rows * 8].view("<i8")
        return Part(codes, ids, self)

    def open(self) -> Part:
        """The part in the file as it is now; its checksums tell whether it is still the same."""
        end = max(self.codes_at + self.rows * -(-self.bits // 8), self.ids_at + self.rows * 8 if self.ids_at else 0)
        try:
            with _opened(Path(self.path), "rb") as file:
                if os.fstat(file.fileno()).st_size < end:
                    raise InputError(f"{self.path} is shorter now")
                data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(end,)))
        except InputError as error:
            raise InputError(f"a mapped index is pickled by the path of its file: {error}") from error
        return replace(self, again=True).part(data)

    def verify(self, part: Part) -> None:
        """InputError where blocks of the part fail their checksums."""
        if isinstance(part.ids, range):
            blocks = self._blocks(part.codes, part.ids.start, False)
        else:
            blocks = self._blocks(part.codes, 0, False) + self._blocks(part.ids, 0, True)
        with ThreadPoolExecutor(_dispatch.choose_threads()) as pool:
            each = (pool.map if part.nbytes > _WORTH_THREADS else map)(lambda block: zlib.crc32(*block), blocks)
            sums = np.array(list(each), dtype=np.uint32)
        bad = np.count_nonzero(sums != np.concatenate(self.checksums))
        if bad:
            why = "is damaged, or another one since the index was pickled" if self.again else "is damaged"
            raise InputError(f"{self.path} {why}: {bad} of {len(sums)} blocks fail their checksum")

    def _blocks(self, x: np.ndarray, first_id: int, of_ids: bool) -> list[tuple[memoryview, int]]:
        flat = x.reshape(-1).view(np.uint8)
        starts = range(0, len(flat), self.block_bytes)
        return [
            (flat[start : start + self.block_bytes].data, _first_sum(self.bits, first_id, of_ids, i))
            for i, start in enumerate(starts)
        ]


def _first_sum(bits: int, first_id: int, of_ids: bool, block: int) -> int:
    """What the crc32 of a block begins with: a block is only right where it belongs."""
    return zlib.crc32(struct.pack("<Iq?q", bits, first_id, of_ids, block))


@dataclass(frozen=True)
class Stored:
    """One committed state of a file."""

    bits: int
    next_id: int
    parts: tuple[Part, ...]
    entries: np.ndarray
    sums: tuple[Checksums, ...]
    block_bytes: int
    sequence: int
    end: int
    oldest: int  # which root to write first


def read(path: StrPath) -> Stored:
    """Open an index file: roots and directory are read and checked, codes and ids are mapped."""
    path = as_path(path)
    with _opened(path, "rb") as file:
        return _read(file, path)


def write(
    path: StrPath,
    bits: int,
    next_id: int,
    parts: Sequence[Part],
    progress: Progress | None = None,
    moved: int = 0,
) -> None:
    """Write all parts, as one, to a new file that takes the place of `path` when it is whole.

    The first `moved` of them are none of the progress.
    """
    with write_aside(path) as aside, open(aside, "r+b", buffering=0) as file:
        fd = file.fileno()
        entries, sums, end = _write_part(fd, _DATA_AT, bits, parts, _BLOCK_BYTES, progress, moved)
        _write_roots(fd, end, bits, next_id, entries, sums)


def write_blocks(
    path: StrPath, bits: int, blocks: Iterable[np.ndarray], first_id: int = 0, progress: Progress | None = None
) -> int:
    """Write blocks of codes, with ids that count on from `first_id`, as `write` writes parts -> how many there were."""
    rows = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal rows
        for block in blocks:
            yield from _code_blocks([Part(block, range(len(block)))], progress, 0)
            rows += len(block)

    with write_aside(path) as aside, open(aside, "r+b", buffering=0) as file:
        fd = file.fileno()
        end, of_codes = _write_stream(fd, _DATA_AT, counted(), (bits, first_id, False), _BLOCK_BYTES)
        entries = np.array([(rows, _DATA_AT, 0, first_id)] if rows else [], dtype=_ENTRY)
        sums = [(of_codes, np.empty(0, dtype="<u4"))] if rows else []
        _write_roots(fd, end, bits, first_id + rows, entries, sums)
    return rows


def append(
    path: StrPath,
    more: Callable[[Stored], tuple[Sequence[Part], int]],
    progress: Progress | None = None,
) -> None:
    """Add parts to a file. `more` is told what is in it and gives the parts and the next id; other appends wait.

    Whatever happens, the file holds the state before or after. An exception leaves the one before, unless it is
    the last flush that fails: then it may be either.
    """
    path = as_path(path)
    with _locked(path) as file:
        old = _read(file, path)
        target = Path(os.path.realpath(path))
        remove_leavings(target.parent, target)
        new, next_id = more(old)
        rows = sum(map(len, new))
        if rows == 0:
            return
        live = _DATA_AT + sum(part.nbytes for part in (*old.parts, *new))
        if old.end > 2 * live + _SPARE_BYTES:
            pieces = [*(part.sound() for part in old.parts), *new]
            write(path, old.bits, next_id, pieces, progress, moved=len(old.parts))
            return
        stay = len(old.parts)
        while stay and len(old.parts[stay - 1]) <= rows:
            stay -= 1
            rows += len(old.parts[stay])
        block_bytes = old.block_bytes if stay else _BLOCK_BYTES
        fd = file.fileno()
        try:
            pieces = [*(part.sound() for part in old.parts[stay:]), *new]
            at, moved = _aligned(old.end), len(old.parts) - stay
            entries, sums, end = _write_part(fd, at, old.bits, pieces, block_bytes, progress, moved)
            entries, sums = np.concatenate([old.entries[:stay], entries]), [*old.sums[:stay], *sums]
            sequence = old.sequence + 1
            root = _write_directory(fd, end, old.bits, next_id, entries, sums, block_bytes, sequence)
            os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, old.end)
            raise
        _write_all(fd, root, _ROOT_PLACES[old.oldest])
        os.fsync(fd)
        with contextlib.suppress(OSError):  # committed: the twin only guards against damage
            _write_all(fd, root, _ROOT_PLACES[1 - old.oldest])
            os.fsync(fd)


def _read(file: BinaryIO, path: Path) -> Stored:
    head = os.pread(file.fileno(), _DATA_AT, 0)
    size = os.fstat(file.fileno()).st_size  # after the head: an append may be going on
    if head[: len(MAGIC)] != MAGIC and head[_ROOT_PLACES[1] :][: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is not a HammingIndex file: it {what_it_is(head, path)}")
    roots = [_whole_root(head[place : place + _ROOT_BYTES]) for place in _ROOT_PLACES]
    if not any(roots):
        if size >= 12 and head.startswith(MAGIC) and (version := int.from_bytes(head[8:12], "little")) != VERSION:
            raise InputError(f"{path} is of version {version}; this release reads version {VERSION}")
        raise InputError(f"{path} is {'truncated' if size < _DATA_AT else 'damaged'}: it has no whole header")
    _, version, bits, sequence, at, length, crc = max((root for root in roots if root), key=lambda root: root[3])
    if version != VERSION:
        raise InputError(f"{path} is of version {version}; this release reads version {VERSION}")
    if roots[0] and roots[1] and roots[0][3] == roots[1][3] and roots[0] != roots[1]:
        raise InputError(f"{path} is damaged: its two headers differ")
    if not 1 <= bits <= MAX_BITS or at < _DATA_AT:
        raise InputError(f"{path} is damaged: its header makes no sense")
    if size < at + length:
        raise InputError(f"{path} is truncated: {at + length} bytes expected, {size} seen")
    directory = os.pread(file.fileno(), length, at)
    if zlib.crc32(directory) != crc:
        raise InputError(f"{path} is damaged: the checksum of its directory is wrong")
    oldest = 0 if roots[0] is None or roots[0][3] < sequence else 1
    data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(at + length,)))
    return _parse(directory, data, bits, sequence, oldest, path)


def _whole_root(root: bytes) -> tuple[Any, ...] | None:
    if len(root) < _ROOT_BYTES or root[: len(MAGIC)] != MAGIC:
        return None
    return _ROOT.unpack_from(root) if zlib.crc32(root[:-4]) == struct.unpack("<I", root[-4:])[0] else None


def _parse(directory: bytes, data: np.ndarray, bits: int, sequence: int, oldest: int, path: Path) -> Stored:
    damaged = InputError(f"{path} is damaged: its directory makes no sense")
    nbytes, end = -(-bits // 8), len(data)
    if len(directory) < _HEAD.size or len(directory) % 4:
        raise damaged
    next_id, count, block_bytes = _HEAD.unpack_from(directory)
    if count * _ENTRY.itemsize > len(directory) - _HEAD.size or block_bytes < 1 or next_id < 0:
        raise damaged
    entries = np.frombuffer(directory, dtype=_ENTRY, count=count, offset=_HEAD.size)
    sums = np.frombuffer(directory, dtype="<u4", offset=_HEAD.size + entries.nbytes)
    parts, part_sums, used = [], [], 0
    for rows, codes_at, ids_at, first_id in entries.tolist():
        spans = [(codes_at, rows * nbytes)] + ([(ids_at, rows * 8)] if ids_at else [])
        if rows < 1 or any(start < _DATA_AT or start % 64 or start + length > end for start, length in spans):
            raise damaged
        if first_id < 0 or (first_id if ids_at else first_id + rows > next_id):
            raise damaged
        counts = [-(-length // block_bytes) for _, length in spans] + [0]
        of_codes = sums[used : used + counts[0]]
        of_ids = sums[used + counts[0] : used + counts[0] + counts[1]]
        used += counts[0] + counts[1]
        where = (os.path.abspath(path), bits, rows, codes_at, ids_at, first_id, block_bytes)
        parts.append(Stretch(*where, (of_codes, of_ids)).part(data))
        part_sums.append((of_codes, of_ids))
    if len(directory) != _HEAD.size + entries.nbytes + 4 * used:
        raise damaged
    return Stored(bits, next_id, tuple(parts), entries, tuple(part_sums), block_bytes, sequence, end, oldest)


def _write_part(
    fd: int, at: int, bits: int, pieces: Sequence[Part], block_bytes: int, progress: Progress | None, moved: int
) -> tuple[np.ndarray, list[Checksums], int]:
    """Write pieces as one part from `at` on -> its entry, its sums, where it ends; nothing where there are no rows."""
    if not any(len(piece) for piece in pieces):
        return np.empty(0, dtype=_ENTRY), [], at
    ids = joined(pieces)
    first_id = 0 if ids is None else ids.start
    entry = (sum(map(len, pieces)), at, 0, first_id)
    codes = _code_blocks(pieces, progress, moved)
    codes_end, of_codes = _write_stream(fd, at, codes, (bits, first_id, False), block_bytes)
    end, of_ids = codes_end, np.empty(0, dtype="<u4")
    if ids is None:
        entry = (*entry[:2], _aligned(codes_end), first_id)
        blocks = (block for piece in pieces for block in id_blocks(piece.ids))
        end, of_ids = _write_stream(fd, entry[2], blocks, (bits, first_id, True), block_bytes)
    return np.array([entry], dtype=_ENTRY), [(of_codes, of_ids)], end


def _code_blocks(pieces: Sequence[Part], progress: Progress | None, moved: int) -> Iterator[np.ndarray]:
    for number, piece in enumerate(pieces):
        step = max(1, _BLOCK_BYTES // piece.codes.shape[1])
        for start in range(0, len(piece), step):
            block = np.ascontiguousarray(piece.codes[start : start + step])
            yield block
            if progress is not None and number >= moved:
                progress(len(block))


def _write_stream(
    fd: int, at: int, pieces: Iterable[np.ndarray], belongs: tuple[int, int, bool], block_bytes: int
) -> tuple[int, np.ndarray]:
    """Write pieces one after the other from `at` on -> where they end, and the crc32 of every block."""
    sums: list[int] = []
    room = 0
    for piece in pieces:
        rest = piece.reshape(-1).view(np.uint8).data
        while len(rest):
            if room == 0:
                sums.append(_first_sum(*belongs, len(sums)))
                room = block_bytes
            now = rest[:room]
            _write_all(fd, now, at)
            sums[-1] = zlib.crc32(now, sums[-1])
            at, room, rest = at + len(now), room - len(now), rest[len(now) :]
    return at, np.array(sums, dtype="<u4")


def _write_roots(fd: int, end: int, bits: int, next_id: int, entries: np.ndarray, sums: Sequence[Checksums]) -> None:
    """Write the directory and the roots of a new file."""
    root = _write_directory(fd, end, bits, next_id, entries, sums, _BLOCK_BYTES, sequence=1)
    for place in _ROOT_PLACES:
        _write_all(fd, root, place)


def _write_directory(
    fd: int,
    end: int,
    bits: int,
    next_id: int,
    entries: np.ndarray,
    sums: Sequence[Checksums],
    block_bytes: int,
    sequence: int,
) -> bytes:
    """Write a directory behind `end` -> the root that points at it."""
    directory = _HEAD.pack(next_id, len(entries), block_bytes) + entries.tobytes()
    directory += b"".join(x.tobytes() for pair in sums for x in pair)
    at = _aligned(end)
    _write_all(fd, directory, at)
    root = _ROOT.pack(MAGIC, VERSION, bits, sequence, at, len(directory), zlib.crc32(directory))
    root = root.ljust(_ROOT_BYTES - 4, b"\0")
    return root + struct.pack("<I", zlib.crc32(root))


def _write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    rest = memoryview(data)
    while len(rest):
        written = os.pwrite(fd, rest, at)
        rest, at = rest[written:], at + written


def _aligned(at: int) -> int:
    return at + -at % 64


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[BinaryIO]:
    check_regular(path, "index file")
    with named(path), open(path, mode, buffering=0) as file:
        yield cast(BinaryIO, file)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """`path`, open for writing and locked against other appends; opened anew where it was replaced while waiting."""
    while True:
        with _opened(path, "r+b") as file:
            if fcntl is not None:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                yield file
                return
