"""A folder of shards: index files that never change, and `shards.json`, which says which of them count.

A shard is a list of files, and shards follow on each other in the order in which codes were added, so that equal
distances rank as in one index. Adding writes a new file into the last shard, or begins a shard where that is full;
small files are joined, as digits carry, so that a shard of n codes has O(log n) of them. `shards.json` takes the place
of the old one as a whole: before that nothing has happened, after it everything has. Files that it does not name are
leavings.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cmr_fast._files import StrPath, as_path, write_aside
from cmr_fast.errors import InputError
from cmr_fast.retrieval import _indexfile
from cmr_fast.retrieval._checks import Array
from cmr_fast.retrieval._pieces import planned
from cmr_fast.retrieval._segments import Part

try:
    import fcntl
except ImportError:  # no advisory locks on this platform: two writers are not kept apart
    fcntl = None  # type: ignore[assignment]

MANIFEST = "shards.json"
_FORMAT, _VERSION = "cmr_fast shards", 1
_HEADER = 60  # its last four bytes are its own crc32: with them it is the same for all
GRACE = 60.0  # seconds for which the files of a state stay after the next one is in force: searches may be at them

Progress = Callable[[int], object]


class GoneError(InputError):
    """A file of a state of the folder is gone, as one that was changed since has it."""


@dataclass(frozen=True)
class ShardFile:
    """An index file of a shard, and what tells that it is still the same: its size and the crc32 of its header.

    The header holds the crc32 of a directory which holds those of all codes and ids.
    """

    name: str
    rows: int
    size: int
    stamp: int


@dataclass(frozen=True)
class Manifest:
    """One state of a folder."""

    bits: int
    next_id: int
    capacity: int  # codes of a shard from which on the next one is begun
    generation: int  # rises with every change; new files bear it in their names
    shards: tuple[tuple[ShardFile, ...], ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Codes of each shard."""
        return tuple(sum(file.rows for file in files) for files in self.shards)


def read(folder: StrPath) -> Manifest:
    """The state of a folder as it is now."""
    path = as_path(folder) / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if path.parent.is_dir():
            raise InputError(f"{folder}: is a folder without {MANIFEST}, which one of shards has") from None
        raise InputError(f"there is no sharded index at {folder}") from None
    try:
        held = json.loads(text)
        if held["format"] != _FORMAT:
            raise KeyError
        version = held["version"]
        if version == _VERSION:
            shards = tuple(tuple(ShardFile(**file) for file in files) for files in held["shards"])
            return Manifest(held["bits"], held["next_id"], held["capacity"], held["generation"], shards)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or of something else: it does not describe shards") from error
    raise InputError(f"{path} is of version {version}; this release reads version {_VERSION}")


def write(folder: Path, manifest: Manifest) -> None:
    """Make `manifest` the state of the folder."""
    held: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "bits": manifest.bits,
        "next_id": manifest.next_id,
        "capacity": manifest.capacity,
        "generation": manifest.generation,
        "shards": [[vars(file) for file in files] for files in manifest.shards],
    }
    with write_aside(folder / MANIFEST) as aside:
        aside.write_text(json.dumps(held, indent=1) + "\n")


@contextmanager
def writing(folder: Path) -> Iterator[Manifest]:
    """The state of the folder, while no other process changes it."""
    with open(folder / ".lock", "a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = read(folder)
        named = _names(manifest)
        for path in folder.glob("shard-*.cmr"):
            with suppress(OSError):  # of a change that was not finished, or of states before
                if path.name not in named and time.time() - path.stat().st_mtime >= GRACE:
                    path.unlink()
        yield manifest
        for name in named - _names(read(folder)):
            with suppress(OSError):
                os.utime(folder / name)  # its time of grace begins


def _names(manifest: Manifest) -> set[str]:
    return {file.name for files in manifest.shards for file in files}


def created(
    folder: StrPath, bits: int, parts: Sequence[Part], next_id: int, shards: int, progress: Progress | None
) -> None:
    """Write a new folder: the parts cut into shards of equal size."""
    folder = _new_folder(folder)
    total = sum(map(len, parts))
    ends = [total * (number + 1) // shards for number in range(shards)]
    files: list[tuple[ShardFile, ...]] = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        piece = list(between(parts, start, end))
        files.append((written(folder, f"shard-{number:05}-0.cmr", bits, next_id, piece, progress),) if piece else ())
    capacity = max(2 * -(-total // shards), 1 << 20)
    write(folder, Manifest(bits, next_id, capacity, 0, tuple(files)))


def created_of_blocks(
    folder: StrPath, bits: int, blocks: Iterable[np.ndarray], each: int, progress: Progress | None
) -> None:
    """Write a new folder from blocks of codes as they come: shards of `each` codes, the last of what is left."""
    folder = _new_folder(folder)
    source, rest = iter(blocks), np.empty((0, -(-bits // 8)), np.uint8)

    def taken() -> Iterator[np.ndarray]:
        nonlocal rest
        room = each
        while room:
            if not len(rest):
                if (block := next(source, None)) is None:
                    return
                rest = block
            piece, rest = rest[:room], rest[room:]
            room -= len(piece)
            yield piece

    files: list[tuple[ShardFile, ...]] = []
    first_id, rows = 0, each
    try:
        while rows == each:
            path = folder / f"shard-{len(files):05}-0.cmr"
            rows = _indexfile.write_blocks(path, bits, taken(), first_id, progress)
            first_id += rows
            if rows:
                files.append((_shard_file(path, rows),))
            else:
                path.unlink()
        write(folder, Manifest(bits, first_id, max(2 * each, 1 << 20), 0, tuple(files) or ((),)))
    except BaseException:  # a stream may fail at any block
        for path in folder.glob("shard-*.cmr"):
            path.unlink()
        raise


def _new_folder(folder: StrPath) -> Path:
    folder = as_path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and is not an empty folder, expected a new one for the shards")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def between(parts: Sequence[Part], start: int, end: int) -> Iterator[Part]:
    """Rows start:end of all parts together, as parts."""
    at = 0
    for part in parts:
        first, last = max(start - at, 0), min(end - at, len(part))
        if first < last:
            yield part if last - first == len(part) else Part(part.codes[first:last], part.ids[first:last])
        at += len(part)


def written(
    folder: Path, name: str, bits: int, next_id: int, parts: Sequence[Part], progress: Progress | None = None,
    moved: int = 0,
) -> ShardFile:  # fmt: skip
    """Write parts as a file of a shard; the first `moved` of them are none of the progress."""
    _indexfile.write(folder / name, bits, next_id, [part.sound() for part in parts], progress, moved)
    return _shard_file(folder / name, sum(map(len, parts)))


def _shard_file(path: Path, rows: int) -> ShardFile:
    return ShardFile(path.name, rows, os.stat(path).st_size, _stamp(path))


def opened(folder: Path, file: ShardFile, bits: int) -> tuple[Part, ...]:
    """The parts of a file, mapped, not yet compared with their checksums."""
    path = folder / file.name
    try:
        seen = os.stat(path).st_size, _stamp(path)
        if seen != (file.size, file.stamp):
            raise InputError(
                f"{path} was changed after it was written: {seen[0]} bytes whose header has checksum {seen[1]}, "
                f"expected {file.size} and {file.stamp}; files of shards are changed through ShardedIndex only"
            )
        stored = _indexfile.read(path)
    except (FileNotFoundError, InputError):
        if path.exists():
            raise
        raise GoneError(f"{path} is gone: another process changed the index, or removed the file") from None
    if stored.bits != bits or sum(map(len, stored.parts)) != file.rows:
        raise InputError(
            f"{path} holds {sum(map(len, stored.parts))} codes of {stored.bits} bits, "
            f"expected {file.rows} of {bits}, as {MANIFEST} says"
        )
    return stored.parts


def all_parts(folder: Path, manifest: Manifest) -> tuple[Part, ...]:
    """The parts of all shards in their order, as `opened` has them."""
    files = [file for shard in manifest.shards for file in shard]
    return tuple(part for file in files for part in opened(folder, file, manifest.bits))


def _stamp(path: Path) -> int:
    with open(path, "rb") as file:
        return zlib.crc32(file.read(_HEADER))


def settled(folder: StrPath) -> tuple[Manifest, tuple[Part, ...]]:
    """The state of a folder and its parts, while other processes may change it."""
    while True:
        manifest = read(folder)
        try:
            return manifest, all_parts(as_path(folder), manifest)
        except GoneError:
            if read(folder) == manifest:
                raise


def append(
    folder: Path,
    pieces: Sequence[np.ndarray | tuple[Part, ...]],
    ids: Array | Sequence[int] | None,
    progress: Progress | None = None,
) -> Manifest:
    """Add pieces of codes; what is returned is in force."""
    with writing(folder) as old:
        known = all_parts(folder, old) if ids is not None or any(isinstance(x, tuple) for x in pieces) else ()
        parts, next_id = planned(pieces, ids, known, old.next_id)
        if not parts:
            return old
        new = added(folder, old, parts, next_id, progress)
        write(folder, new)
        return new


def added(
    folder: Path, old: Manifest, parts: Sequence[Part], next_id: int, progress: Progress | None = None
) -> Manifest:
    """The state after parts are added behind the last shard; nothing is in force before `write`."""
    generation, shards = old.generation + 1, list(old.shards)
    total, at = sum(map(len, parts)), 0
    while at < total:
        if not shards or sum(file.rows for file in shards[-1]) >= old.capacity:
            shards.append(())
        files = list(shards[-1])
        take = min(total - at, old.capacity - sum(file.rows for file in files))
        pieces, rows, moved = list(between(parts, at, at + take)), take, 0
        while files and files[-1].rows <= rows:  # joined, so that few files stay
            last = files.pop()
            before = opened(folder, last, old.bits)
            pieces, moved = [*before, *pieces], moved + len(before)
            rows += last.rows
        name = f"shard-{len(shards) - 1:05}-{generation}.cmr"
        shards[-1] = (*files, written(folder, name, old.bits, next_id, pieces, progress, moved))
        at += take
    return replace(old, next_id=next_id, generation=generation, shards=tuple(shards))


def removed(folder: Path, old: Manifest, gone: np.ndarray) -> tuple[Manifest, int]:
    """The state without the codes of some ids, which rise, and how many codes those are."""
    generation, shards, count = old.generation + 1, [], 0
    found = np.zeros(len(gone), dtype=bool)
    for number, files in enumerate(old.shards):
        kept: list[ShardFile] = []
        for place, file in enumerate(files):
            parts = opened(folder, file, old.bits)
            cuts = [part.sound().rows_of(gone) for part in parts]
            if not any(map(len, cuts)):
                kept.append(file)
                continue
            for part, cut in zip(parts, cuts, strict=True):
                found[np.searchsorted(gone, part.ids_of(cut))] = True
            count += sum(map(len, cuts))
            rest = [part.without(cut) if len(cut) else part for part, cut in zip(parts, cuts, strict=True)]
            rest = [part for part in rest if len(part)]
            if rest:
                name = f"shard-{number:05}-{generation}-{place}.cmr"
                kept.append(written(folder, name, old.bits, old.next_id, rest))
        shards.append(tuple(kept))
    if not found.all():
        unknown = gone[~found]
        raise InputError(f"ids must be in the index: {len(unknown)} are not, the first is {unknown[0]}")
    return replace(old, generation=generation, shards=tuple(shards)), count
