"""faiss's files of IndexBinaryFlat ("IBxF"), alone or under an IndexBinaryIDMap ("IBMp") or IDMap2 ("IBM2").

Those of other kinds are read by _faiss_kinds.

Little-endian, as faiss/impl/index_write.cpp lays them out on 64-bit machines: fourcc, then int32 d, int32 code_size,
int64 ntotal, bool is_trained, int32 metric; a flat index goes on with uint64 bytes and the codes; a map with the flat
index inside, then uint64 ntotal and int64 ids.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmr_fast._files import StrPath, as_path, check_regular, named, write_aside
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import MAX_BITS
from cmr_fast.retrieval import _faiss_kinds
from cmr_fast.retrieval._formats import FAISS_FLAT, FAISS_MAPS, FAISS_OTHERS, HEAD, what_it_is
from cmr_fast.retrieval._ids import LAST
from cmr_fast.retrieval._segments import Ids, Part, id_blocks, joined

_HEADER = struct.Struct("<4siiq?i")
_COUNT = struct.Struct("<Q")


@dataclass(frozen=True)
class Mapped:
    """A faiss file whose codes and ids are mapped. It has no checksums; size and time say whether it is the same."""

    path: str
    size: int
    changed: int  # nanoseconds

    def verify(self, part: Part) -> None:
        """There is nothing to compare with."""

    def open(self) -> Part:
        """The part once more, InputError where the file is another one."""
        try:
            _, part = read(self.path)
            if part.source != self:
                raise InputError(f"{self.path} has changed since")
        except InputError as error:
            raise InputError(f"a mapped index is pickled by the path of its file: {error}") from error
        return part


def read(path: StrPath) -> tuple[int, Part]:
    """A faiss file -> bits, and a part whose codes and ids are mapped. It has no checksums: only sizes are checked.

    Ids are what faiss holds: any int64, perhaps one for several codes.
    """
    path = as_path(path)
    check_regular(path, "faiss file")
    with named(path), open(path, "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(size,))) if size else np.empty(0, np.uint8)
    kind = data[:4].tobytes()
    inner = data[_HEADER.size : _HEADER.size + 4].tobytes() if kind in FAISS_MAPS else kind
    if inner in FAISS_OTHERS:
        bits, codes, own = _faiss_kinds.read(path, data)
        return bits, Part(codes, _counted(own))
    if kind not in (FAISS_FLAT, *FAISS_MAPS):
        what = what_it_is(data[:HEAD].tobytes(), path)
        raise InputError(f"{path}: expected a faiss file of a binary index, it {what}")
    at = 0
    headers = []
    for wanted in (FAISS_MAPS, (FAISS_FLAT,)) if kind in FAISS_MAPS else ((FAISS_FLAT,),):
        fields = data[at : at + _HEADER.size].tobytes()
        if len(fields) < _HEADER.size:
            raise InputError(f"{path} is truncated: {size} bytes end in a header")
        fourcc, *rest = _HEADER.unpack(fields)
        if fourcc not in wanted:
            raise InputError(f"{path}: expected an IndexBinaryFlat inside the map, got {fourcc!r}")
        headers.append(rest[:3])
        at += _HEADER.size
    bits, nbytes, ntotal = headers[-1]
    if headers[0] != headers[-1] or bits < 8 or bits != 8 * nbytes or ntotal < 0:
        raise InputError(f"{path} is damaged: its header says d, code size and ntotal {headers}")
    if bits > MAX_BITS:
        raise InputError(f"{path}: its codes are too wide, expected at most {MAX_BITS} bits, got {bits}")
    codes, at = _array(data, at, ntotal * nbytes, 1, path)
    ids: Ids = range(ntotal)
    if kind in FAISS_MAPS:
        raw, at = _array(data, at, ntotal, 8, path)
        ids = _counted(raw.view("<i8"))
    if at != size:
        raise InputError(f"{path} is damaged: {at} bytes expected, {size} seen")
    source = Mapped(os.path.abspath(path), size, status.st_mtime_ns)
    return bits, Part(codes.reshape(ntotal, nbytes), ids, source)


def _counted(ids: np.ndarray) -> Ids:
    """Ids as the range that they are, where they count on from one of 0 or more."""
    if len(ids) and 0 <= ids[0] <= LAST - len(ids):
        first = int(ids[0])
        blocks = zip(id_blocks(range(first, first + len(ids))), id_blocks(ids), strict=True)
        if all(np.array_equal(*pair) for pair in blocks):
            return range(first, first + len(ids))
    return ids


def write(path: StrPath, nbytes: int, parts: Sequence[Part]) -> None:
    """Write codes as IndexBinaryFlat, under an IndexBinaryIDMap2 where their ids are not 0, 1, 2 and so on."""
    ntotal = sum(map(len, parts))
    own_ids = joined(parts) != range(ntotal)
    fields = (8 * nbytes, nbytes, ntotal, True, 1)
    with write_aside(path) as aside, open(aside, "wb") as file:
        if own_ids:
            file.write(_HEADER.pack(FAISS_MAPS[1], *fields))
        file.write(_HEADER.pack(FAISS_FLAT, *fields) + _COUNT.pack(ntotal * nbytes))
        for part in parts:
            file.write(np.ascontiguousarray(part.codes).data)
        if own_ids:
            file.write(_COUNT.pack(ntotal))
            for block in (block for part in parts for block in id_blocks(part.ids)):
                file.write(block.data)


def _array(data: np.ndarray, at: int, count: int, width: int, path: Path) -> tuple[np.ndarray, int]:
    head = data[at : at + _COUNT.size].tobytes()
    at += _COUNT.size
    if len(head) < _COUNT.size or at + count * width > len(data):
        raise InputError(f"{path} is truncated: at least {at + count * width} bytes expected, {len(data)} seen")
    if _COUNT.unpack(head)[0] != count:
        raise InputError(f"{path} is damaged: an array of {_COUNT.unpack(head)[0]} where its header says {count}")
    return data[at : at + count * width], at + count * width
