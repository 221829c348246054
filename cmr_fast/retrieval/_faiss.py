"""faiss's files of IndexBinaryFlat ("IBxF"), alone or under an IndexBinaryIDMap ("IBMp") or IDMap2 ("IBM2").

Little-endian, as faiss/impl/index_write.cpp lays them out on 64-bit machines: fourcc, then int32 d, int32 code_size,
int64 ntotal, bool is_trained, int32 metric; a flat index goes on with uint64 bytes and the codes; a map with the flat
index inside, then uint64 ntotal and int64 ids.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmr_fast._files import write_aside
from cmr_fast.errors import InputError
from cmr_fast.ops.hamming import MAX_BITS
from cmr_fast.retrieval._segments import Ids, Part, id_blocks, joined

FLAT = b"IBxF"
MAPS = (b"IBMp", b"IBM2")
_HEADER = struct.Struct("<4siiq?i")
_COUNT = struct.Struct("<Q")


def read(path: str | os.PathLike[str]) -> tuple[int, Part]:
    """A faiss file -> bits, and a part whose codes and ids are mapped. It has no checksums: only sizes are checked."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no faiss file at {path}")
    size = path.stat().st_size
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r")) if size else np.empty(0, dtype=np.uint8)
    kind = data[:4].tobytes()
    if kind not in (FLAT, *MAPS):
        raise InputError(f"{path}: expected a faiss IndexBinaryFlat or IndexBinaryIDMap file, it begins with {kind!r}")
    at = 0
    headers = []
    for wanted in (MAPS, (FLAT,)) if kind in MAPS else ((FLAT,),):
        fields = data[at : at + _HEADER.size].tobytes()
        if len(fields) < _HEADER.size:
            raise InputError(f"{path} is truncated: {size} bytes end in a header")
        fourcc, *rest = _HEADER.unpack(fields)
        if fourcc not in wanted:
            raise InputError(f"{path}: expected an IndexBinaryFlat inside the map, got {fourcc!r}")
        headers.append(rest[:3])
        at += _HEADER.size
    bits, nbytes, ntotal = headers[-1]
    if headers[0] != headers[-1] or not 8 <= bits <= MAX_BITS or bits != 8 * nbytes or ntotal < 0:
        raise InputError(f"{path} is damaged: its header says d, code size and ntotal {headers}")
    codes, at = _array(data, at, ntotal * nbytes, 1, path)
    ids: Ids = range(ntotal)
    if kind in MAPS:
        raw, at = _array(data, at, ntotal, 8, path)
        ids = raw.view("<i8")
    if at != size:
        raise InputError(f"{path} is damaged: {at} bytes expected, {size} seen")
    return bits, Part(codes.reshape(ntotal, nbytes), ids)


def write(path: str | os.PathLike[str], nbytes: int, parts: Sequence[Part]) -> None:
    """Write codes as IndexBinaryFlat, under an IndexBinaryIDMap2 where their ids are not 0, 1, 2, …"""
    ntotal = sum(map(len, parts))
    own_ids = joined(parts) != range(ntotal)
    fields = (8 * nbytes, nbytes, ntotal, True, 1)
    with write_aside(path) as aside, open(aside, "wb") as file:
        if own_ids:
            file.write(_HEADER.pack(MAPS[1], *fields))
        file.write(_HEADER.pack(FLAT, *fields) + _COUNT.pack(ntotal * nbytes))
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
