"""HammingIndex: exact search over packed codes, with ids, on disk or in memory.

File layout, little-endian, version 1:

    header      128 bytes: magic, version, bits, sizes, checksums; its own crc32 in the last four
    checks      uint32 per block of codes: crc32
    ids         int64 per code, if the index has ids of its own; then zeros up to a multiple of 64 bytes
    codes       uint8 (ntotal, nbytes)
"""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast.errors import InputError
from cmr_fast.ops import hamming_range, hamming_topk

Array = np.ndarray | Tensor
_MAX_BITS = 4096
_MAGIC = b"CMRFHAM\n"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQqII")  # magic, version, bits, ntotal, next id, has ids, bytes in a block
_SUMS = struct.Struct("<II")  # crc32 of checks, crc32 of ids with their zeros
_HEADER_BYTES = 128
_BLOCK_BYTES = 1 << 22


class HammingIndex:
    """Exact Hamming search over packed codes of 1 to 4096 bits.

    Codes are numpy arrays or torch tensors, uint8 (N, ceil(bits / 8)) as pack_codes makes them; results are of the
    kind of the queries. Every code has an int64 id of 0 or more, given to `add` or counted on from the last one.
    Equal distances rank in the order in which codes were added.
    """

    def __init__(self, bits: int) -> None:
        if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 1 <= bits <= _MAX_BITS:
            raise InputError(f"bits must be an integer from 1 to {_MAX_BITS}, got {bits!r}")
        self.bits = int(bits)
        self._codes = np.empty((0, -(-self.bits // 8)), dtype=np.uint8)  # capacity: rows beyond ntotal are free
        self._ids: np.ndarray | None = None  # None: the id of a row is its number
        self._ntotal = 0
        self._next_id = 0
        self._checks: np.ndarray | None = None  # crc32 per block while `_codes` maps a file

    def __len__(self) -> int:
        return self._ntotal

    def __repr__(self) -> str:
        return f"HammingIndex(bits={self.bits}, ntotal={self._ntotal})"

    @property
    def ntotal(self) -> int:
        """How many codes there are."""
        return self._ntotal

    def add(self, codes: Array, ids: Array | Sequence[int] | None = None) -> None:
        """Add codes (N, nbytes), with int64 ids (N,) that are new, or with ids that count on from the highest yet.

        Nothing is added where anything is refused. The buffer grows by half: adding many small pieces is cheap.
        """
        rows = self._check_codes(codes, "codes")
        end = self._ntotal + len(rows)
        if ids is not None:
            new_ids = _check_ids(ids, len(rows))
            self._refuse_known(new_ids)
        else:
            if self._next_id > np.iinfo(np.int64).max - len(rows):
                raise InputError(f"no ids left to count on from {self._next_id}: pass ids=")
            new_ids = np.arange(self._next_id, self._next_id + len(rows), dtype=np.int64)
        if len(rows) == 0:
            return
        if self._ids is None and (new_ids[0] != self._ntotal or (np.diff(new_ids) != 1).any()):
            self._ids = np.arange(self._ntotal, dtype=np.int64)
        self._codes = _grown(self._codes, self._ntotal, end, mapped=self._checks is not None)
        self._checks = None
        self._codes[self._ntotal : end] = rows
        if self._ids is not None:
            self._ids = _grown(self._ids, self._ntotal, end, mapped=False)
            self._ids[self._ntotal : end] = new_ids
        self._ntotal = end
        self._next_id = max(self._next_id, int(new_ids.max()) + 1)

    def remove_ids(self, ids: Array | Sequence[int]) -> int:
        """Remove the codes of these ids and return how many; the others keep their ids and their order."""
        gone = _check_ids(ids, None)
        mine = self._all_ids()
        unknown = gone[~np.isin(gone, mine)]
        if len(unknown):
            raise InputError(f"ids must be in the index: {len(unknown)} are not, the first is {unknown[0]}")
        if len(gone) == 0:
            return 0
        kept = ~np.isin(mine, gone)
        self._ids = mine[kept]
        self._codes = self._codes[: self._ntotal][kept]
        self._checks = None
        self._ntotal = len(self._ids)
        return len(gone)

    def search(self, q: Array, k: int, threads: int | None = None) -> tuple[Array, Array]:
        """The k nearest codes of each query: distances int32 (Q, k) and ids int64 (Q, k), nearest first.

        k beyond ntotal pads with id -1 and distance bits + 1. threads: None is every processor of this process.
        """
        rows = self._check_codes(q, "q")
        distances, places = hamming_topk(rows, self._codes[: self._ntotal], k, bits=self.bits, threads=threads)
        if self._ids is not None:
            found = places >= 0
            places[found] = self._ids[places[found]]
        return _like(distances, q), _like(places, q)

    def range_search(self, q: Array, radius: int, threads: int | None = None) -> tuple[Array, Array, Array]:
        """Every code at distance <= radius: lims int64 (Q + 1,), distances int32 (T,), ids int64 (T,).

        The hits of query i are lims[i]:lims[i + 1], in the order in which codes were added.
        """
        rows = self._check_codes(q, "q")
        lims, distances, places = hamming_range(rows, self._codes[: self._ntotal], radius, threads=threads)
        if self._ids is not None:
            places = self._ids[places]
        return _like(lims, q), _like(distances, q), _like(places, q)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index; `path` holds the old file or the whole new one, whatever happens."""
        codes = np.ascontiguousarray(self._codes[: self._ntotal])
        checks = _block_checks(codes)
        ids = b"" if self._ids is None else self._ids[: self._ntotal].astype("<i8").tobytes()
        fields = (_MAGIC, _VERSION, self.bits, self._ntotal, self._next_id, int(self._ids is not None), _BLOCK_BYTES)
        table = checks.astype("<u4").tobytes()
        ids += b"\0" * (-(_HEADER_BYTES + len(table) + len(ids)) % 64)
        header = _HEADER.pack(*fields) + _SUMS.pack(zlib.crc32(table), zlib.crc32(ids))
        header = header.ljust(_HEADER_BYTES - 4, b"\0")
        with write_aside(path) as aside, open(aside, "wb") as file:
            file.write(header + struct.pack("<I", zlib.crc32(header)) + table + ids)
            file.write(codes.data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True) -> "HammingIndex":
        """Read an index. The header, checksums and ids are checked always.

        mmap   True: codes stay in the file, read when searched and copied when changed; `verify` checks them.
               False: codes are read into memory and checked now.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no index file at {path}")
        with open(path, "rb") as file:
            index, codes_at, has_ids, table_sum, ids_sum = cls._read_header(file.read(_HEADER_BYTES), path)
            nbytes = index._codes.shape[1]
            size, expected = path.stat().st_size, codes_at + index._ntotal * nbytes
            if size != expected:
                state = "truncated" if size < expected else "too long"
                raise InputError(f"{path} is {state}: {expected} bytes expected, {size} seen")
            table = file.read(4 * _num_blocks(index._ntotal, nbytes))
            ids = file.read(codes_at - file.tell())
        for part, data, expected in (("checks", table, table_sum), ("ids", ids, ids_sum)):
            if zlib.crc32(data) != expected:
                raise InputError(f"{path} is damaged: the checksum of its {part} is wrong")
        index._checks = np.frombuffer(table, dtype="<u4")
        if has_ids:
            index._ids = np.frombuffer(ids, dtype="<i8", count=index._ntotal).astype(np.int64)
        if index._ntotal:
            shape = (index._ntotal, nbytes)
            index._codes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=codes_at, shape=shape))
        if not mmap:
            index._codes = np.array(index._codes)
            index._verify(path)
            index._checks = None
        return index

    def verify(self) -> None:
        """Check the codes of a memory-mapped index by the file's checksums; in memory there is nothing to check."""
        self._verify("the mapped index")

    def _verify(self, where: object) -> None:
        if self._checks is None:
            return
        bad = np.flatnonzero(_block_checks(self._codes[: self._ntotal]) != self._checks)
        if len(bad):
            raise InputError(f"{where} is damaged: {len(bad)} of {len(self._checks)} blocks fail their checksum")

    @classmethod
    def _read_header(cls, header: bytes, path: Path) -> tuple["HammingIndex", int, bool, int, int]:
        if header[: len(_MAGIC)] != _MAGIC:
            raise InputError(f"{path} is not a HammingIndex file: it begins with {header[: len(_MAGIC)]!r}")
        if len(header) < _HEADER_BYTES:
            raise InputError(f"{path} is truncated: a header has {_HEADER_BYTES} bytes, {len(header)} seen")
        _, version, bits, ntotal, next_id, has_ids, block = _HEADER.unpack_from(header)
        if version > _VERSION:
            raise InputError(f"{path} is of version {version}; this release reads up to {_VERSION}")
        if zlib.crc32(header[:-4]) != struct.unpack("<I", header[-4:])[0] or block != _BLOCK_BYTES:
            raise InputError(f"{path} is damaged: the checksum of its header is wrong")
        index = cls(bits)
        index._ntotal, index._next_id = ntotal, next_id
        nbytes = index._codes.shape[1]
        end = _HEADER_BYTES + 4 * _num_blocks(ntotal, nbytes) + (8 * ntotal if has_ids else 0)
        return index, end + -end % 64, bool(has_ids), *_SUMS.unpack_from(header, _HEADER.size)

    def _check_codes(self, codes: Array, name: str) -> np.ndarray:
        x = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else codes
        nbytes = self._codes.shape[1]
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2:
            seen = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise InputError(f"{name} must be packed codes, uint8 (N, {nbytes}) (see pack_codes), got {seen}")
        if x.shape[1] != nbytes:
            raise InputError(f"{name} must have {self.bits} bits ({nbytes} bytes) a code, got {x.shape[1]} bytes")
        if self.bits % 8 and (x[:, -1] >> self.bits % 8).any():
            raise InputError(f"{name} has bits set beyond bit {self.bits}: was it packed with another number of bits?")
        return x

    def _all_ids(self) -> np.ndarray:
        return np.arange(self._ntotal, dtype=np.int64) if self._ids is None else self._ids[: self._ntotal]

    def _refuse_known(self, new_ids: np.ndarray) -> None:
        if len(new_ids) == 0 or new_ids.min() >= self._next_id:
            return
        known = new_ids[np.isin(new_ids, self._all_ids())]
        if len(known):
            raise InputError(f"ids must be new: {len(known)} are in the index already, the first is {known[0]}")


def _check_ids(ids: Any, count: int | None) -> np.ndarray:
    x = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if x.size == 0:
        x = x.astype(np.int64)
    if x.ndim != 1 or x.dtype.kind not in "iu" or (count is not None and len(x) != count):
        raise InputError(f"ids must be integers ({'M' if count is None else count},), got {x.dtype} {x.shape}")
    if len(x) and (x.min() < 0 or x.max() >= np.iinfo(np.int64).max):
        raise InputError(f"ids must be from 0 to 2^63 - 2, got {x.min()} to {x.max()}")
    values, counts = np.unique(x, return_counts=True)
    if len(values) != len(x):
        raise InputError(f"ids must not repeat: {len(x) - len(values)} do, the first is {values[counts > 1][0]}")
    return x.astype(np.int64)


def _grown(x: np.ndarray, used: int, needed: int, mapped: bool) -> np.ndarray:
    if needed <= len(x) and not mapped:
        return x
    out = np.empty((max(needed, len(x) + len(x) // 2), *x.shape[1:]), dtype=x.dtype)
    out[:used] = x[:used]
    return out


def _num_blocks(rows: int, nbytes: int) -> int:
    return -(-rows * nbytes // _BLOCK_BYTES)


def _block_checks(codes: np.ndarray) -> np.ndarray:
    """(N, nbytes) contiguous -> uint32 (blocks,): crc32 of each 4 MiB."""
    flat = codes.reshape(-1)
    starts = range(0, len(flat), _BLOCK_BYTES)
    return np.array([zlib.crc32(flat[i : i + _BLOCK_BYTES].data) for i in starts], dtype=np.uint32)


def _like(result: np.ndarray, q: Array) -> Array:
    return torch.from_numpy(result).to(q.device) if isinstance(q, Tensor) else result
