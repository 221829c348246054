"""HammingIndex: exact search over packed codes, with ids, in memory or in a file."""

import mmap as mmap_module
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import hamming_range, hamming_topk
from cmr_fast.ops.hamming import MAX_BITS
from cmr_fast.retrieval import _faiss, _indexfile
from cmr_fast.retrieval._ids import IdSet, check_ids, refuse_known
from cmr_fast.retrieval._segments import Part, Tail

Array = np.ndarray | Tensor
Ids = Array | Sequence[int]
_LAST_ID = np.iinfo(np.int64).max - 1
_SMALL_BYTES = 1 << 20  # parts of a file that are read into memory: a search has a cost per part
_ROWS = 1 << 20


class HammingIndex:
    """Exact Hamming search over packed codes of 1 to 4096 bits.

    Codes are numpy arrays or torch tensors, uint8 (N, ceil(bits / 8)) as pack_codes makes them; results are of the
    kind of the queries. Every code has an int64 id of 0 or more, given to `add` or counted on from the highest yet.
    Equal distances rank in the order in which codes were added.

    Any number of threads may search while others add and remove: a search sees the index as it was at one moment and
    waits for nobody; adding and removing wait for each other.

    Many searches over many codes in memory that do not change build tables (see cmr_fast.ops.multi_index) where those
    are expected to pay; they take a few times the memory of the codes, and `tables = False` keeps to the scan.
    """

    def __init__(self, bits: int) -> None:
        self.bits = _check_bits(bits)
        self.tables = True
        self._parts: tuple[Part, ...] = ()  # replaced as a whole, never changed: what a search sees
        self._next_id = 0
        self._tail: Tail | None = None  # of the last part, if that can grow
        self._known: IdSet | None = None  # made when an id is first given that does not count on
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __repr__(self) -> str:
        return f"HammingIndex(bits={self.bits}, ntotal={self.ntotal})"

    @property
    def ntotal(self) -> int:
        """How many codes there are."""
        return len(self)

    @property
    def codes(self) -> np.ndarray:
        """uint8 (ntotal, nbytes), read-only, in the order in which they were added."""
        parts = [part.sound().codes for part in self._parts]
        out = parts[0].view() if len(parts) == 1 else np.concatenate([np.empty((0, self._nbytes), np.uint8), *parts])
        out.flags.writeable = False
        return out

    @property
    def ids(self) -> np.ndarray:
        """int64 (ntotal,), in the order in which they were added."""
        parts = [np.asarray(part.sound().ids, dtype=np.int64) for part in self._parts]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and ids, in memory or mapped."""
        return sum(part.nbytes for part in self._parts)

    def memory_usage(self) -> dict[str, int]:
        """Bytes by where they are: `memory` (spare room, the lookup of ids, search tables) and `mapped` from a file."""
        with self._writing:
            parts, tail, known = self._parts, self._tail, self._known
        usage = {"memory": (tail.nbytes if tail else 0) + (known.nbytes if known else 0), "mapped": 0}
        usage["memory"] += sum(part.plan.nbytes for part in parts)
        for part in parts if tail is None else parts[:-1]:
            usage["mapped" if _is_mapped(part.codes) else "memory"] += part.nbytes
        return usage

    def add(self, codes: Array, ids: Ids | None = None) -> None:
        """Add codes (N, nbytes), with int64 ids (N,) that are new, or with ids that count on from the highest yet.

        Nothing is added where anything is refused. Adding many small pieces is cheap, whatever the order of their ids.
        """
        rows = _check_codes(codes, "codes", self.bits)
        given = None if ids is None else check_ids(ids, len(rows))
        with self._writing:
            if given is None:
                given = _counted_on(self._next_id, len(rows))
            elif len(given) and _lowest(given) < self._next_id:
                refuse_known(given, self._known_ids())
            if len(rows) == 0:
                return
            self._extend(rows, given)
            if self._known is not None:
                self._known.add(given)
            self._next_id = max(self._next_id, _highest(given) + 1)

    def remove_ids(self, ids: Ids) -> int:
        """Remove the codes of these ids and return how many; the others keep their ids and their order.

        Parts that lose codes are copied, into memory where they were mapped: remove many ids in one call.
        """
        gone = np.sort(np.asarray(check_ids(ids, None), dtype=np.int64))
        with self._writing:
            rows = [part.sound().rows_of(gone) for part in self._parts]
            if sum(map(len, rows)) != len(gone):
                unknown = gone[~IdSet(part.ids for part in self._parts).contains(gone)]
                raise InputError(f"ids must be in the index: {len(unknown)} are not, the first is {unknown[0]}")
            parts, tail = [], self._tail
            for part, cut in zip(self._parts, rows, strict=True):
                kept = part.without(cut) if len(cut) else part
                if part is self._parts[-1] and tail is not None and len(cut):
                    tail = Tail(self._nbytes)
                    kept = tail.extended(kept.codes, kept.ids)
                parts.append(kept)
            if self._known is not None:
                self._known.discard(gone)
            self._tail = tail if parts and len(parts[-1]) else None
            self._parts = tuple(part for part in parts if len(part))
        return len(gone)

    def search(self, q: Array, k: int, threads: int | None = None) -> tuple[Array, Array]:
        """The k nearest codes of each query: distances int32 (Q, k) and ids int64 (Q, k), nearest first.

        k beyond ntotal pads with id -1 and distance bits + 1. threads: None is every processor of this process.
        """
        rows = _check_codes(q, "q", self.bits)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"k must be an integer of 1 or more, got {k!r}")
        distances = [np.empty((len(rows), 0), dtype=np.int32)]
        ids = [np.empty((len(rows), 0), dtype=np.int64)]
        for part in self._parts:
            near, places = _nearest(part.sound(), rows, min(int(k), len(part)), self.bits, threads, self.tables)
            distances.append(near)
            ids.append(part.ids_of(places))
        if len(ids) == 2 and ids[1].shape[1] == k:
            return _like(distances[1], q), _like(ids[1], q)
        every, names = np.concatenate(distances, axis=1), np.concatenate(ids, axis=1)
        best = np.argsort(every, axis=1, kind="stable")[:, :k]
        out, named = np.full((len(rows), k), self.bits + 1, np.int32), np.full((len(rows), k), -1, np.int64)
        out[:, : best.shape[1]] = np.take_along_axis(every, best, axis=1)
        named[:, : best.shape[1]] = np.take_along_axis(names, best, axis=1)
        return _like(out, q), _like(named, q)

    def range_search(self, q: Array, radius: int, threads: int | None = None) -> tuple[Array, Array, Array]:
        """Every code at distance <= radius: lims int64 (Q + 1,), distances int32 (T,), ids int64 (T,).

        The hits of query i are lims[i]:lims[i + 1], in the order in which codes were added.
        """
        rows = _check_codes(q, "q", self.bits)
        parts = self._parts or (Part(np.empty((0, self._nbytes), dtype=np.uint8), range(0)),)
        found = []
        for part in parts:
            lims, distances, places = hamming_range(rows, part.sound().codes, radius, threads=threads)
            found.append((lims, distances, part.ids_of(places)))
        lims, distances, ids = found[0]
        if len(found) > 1:
            queries = np.concatenate([np.repeat(np.arange(len(rows)), np.diff(each[0])) for each in found])
            order = np.argsort(queries, kind="stable")
            lims = np.sum([each[0] for each in found], axis=0)
            distances, ids = (np.concatenate([each[i] for each in found])[order] for i in (1, 2))
        return _like(lims, q), _like(distances, q), _like(ids, q)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index as it is now; `path` holds the old file or the whole new one, whatever happens."""
        with self._writing:
            parts, next_id = self._parts, self._next_id
        _verify(parts)
        _indexfile.write(path, self.bits, next_id, parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True, check: bool = True) -> "HammingIndex":
        """Open an index file. Its header and directory are always checked.

        mmap    True: opens at once, whatever the size. Codes and ids stay in the file; what is added later is in
                memory. The file may be appended to and replaced meanwhile: this index stays as it was.
                False: everything is read into memory and checked now.
        check   False: codes and ids that are mapped are not checked before their first use (crc32, once, GB/s).
        """
        stored = _indexfile.read(path)
        index = cls(stored.bits)
        mapped = len(stored.parts) if mmap else 0
        while mapped and stored.parts[mapped - 1].codes.nbytes < _SMALL_BYTES:
            mapped -= 1
        index._parts, index._next_id = stored.parts[:mapped], stored.next_id
        for part in stored.parts[:mapped]:
            if part.check is not None and not check:
                part.check.trust()
        for part in stored.parts[mapped:]:
            index._extend(part.sound().codes, part.ids)
        return index

    def verify(self) -> None:
        """Check what is mapped by the file's checksums, once more if it was; in memory there is nothing to check."""
        _verify(self._parts)

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        codes: "Array | HammingIndex | Sequence[Array | HammingIndex]",
        ids: Ids | None = None,
        *,
        bits: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Write an index file without having it in memory: arrays mapped from files stay there.

        codes       uint8 (N, nbytes), or a sequence of such; a HammingIndex among them brings its ids along
        ids         int64, one for each row of all pieces, where they shall not count on and are not brought along;
                    rising ones may stay in a file, others are sorted in memory
        bits        None: those of the first piece, 8 * nbytes for an array
        progress    called with the number of rows written since the last call
        """
        pieces = _pieces(codes)
        if bits is None:
            if not pieces:
                raise InputError("codes must hold an array at least, or bits must say the length")
            first = pieces[0]
            bits = first.bits if isinstance(first, HammingIndex) else 8 * np.shape(first)[-1]
        bits = _check_bits(bits)
        parts, next_id = _planned(pieces, ids, bits, (), 0)
        _indexfile.write(path, bits, next_id, parts, progress)

    @staticmethod
    def append(
        path: str | os.PathLike[str],
        codes: "Array | HammingIndex | Sequence[Array | HammingIndex]",
        ids: Ids | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Add codes, as `build` takes them, to an index file, without reading what is in it.

        The file holds the state before or after, whatever happens, and appends from several processes wait for each
        other. Many small appends cost O(log N) rewrites of a row, amortised.
        """
        pieces = _pieces(codes)
        _indexfile.append(path, lambda old: _planned(pieces, ids, old.bits, old.parts, old.next_id), progress)

    @classmethod
    def from_faiss(cls, path: str | os.PathLike[str], bits: int | None = None) -> "HammingIndex":
        """A faiss file of IndexBinaryFlat, or of IndexBinaryIDMap or IDMap2 over one; codes stay in the file.

        bits    the code length where it is no multiple of 8; faiss files have no checksums
        """
        file_bits, part = _faiss.read(path)
        index = cls(file_bits if bits is None else bits)
        if len(part):
            ids = check_ids(part.ids, len(part))
            codes = _check_codes(part.codes, f"{path}", index.bits)
            index._parts = (Part(codes, ids),)
            index._next_id = _highest(ids) + 1
        return index

    def to_faiss(self, path: str | os.PathLike[str]) -> None:
        """Write a faiss file: IndexBinaryFlat, under an IndexBinaryIDMap2 where ids are not 0, 1, 2, …"""
        parts = self._parts
        _verify(parts)
        _faiss.write(path, self._nbytes, parts)

    @property
    def _nbytes(self) -> int:
        return -(-self.bits // 8)

    def _extend(self, codes: np.ndarray, ids: np.ndarray | range) -> None:
        fresh = self._tail is None
        tail = self._tail or Tail(self._nbytes)
        part = tail.extended(codes, ids)
        self._tail = tail
        self._parts = (*(self._parts if fresh else self._parts[:-1]), part)

    def _known_ids(self) -> IdSet:
        if self._known is None:
            self._known = IdSet(part.sound().ids for part in self._parts)
        return self._known


def _nearest(
    part: Part, q: np.ndarray, k: int, bits: int, threads: int | None, tables: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows of the k nearest codes of a part: the one place that chooses how a part is searched."""
    if tables and not _is_mapped(part.codes):
        return part.plan.topk(q, part.codes, k, bits, threads)
    return hamming_topk(q, part.codes, k, bits=bits, threads=threads)


def _planned(
    pieces: "list[Array | HammingIndex]", ids: Ids | None, bits: int, there: Sequence[Part], next_id: int
) -> tuple[list[Part], int]:
    """Pieces as parts whose ids are neither among those `there` nor each other's, and the next id."""
    given = None if ids is None else check_ids(ids, sum(map(len, pieces)))
    known: IdSet | None = None
    out: list[Part] = []
    taken = 0
    for piece in pieces:
        parts: Sequence[Part]
        if isinstance(piece, HammingIndex):
            if piece.bits != bits:
                raise InputError(f"codes must have {bits} bits, got a HammingIndex of {piece.bits}")
            parts = piece._parts
            _verify(parts)
        else:
            rows = _check_codes(piece, "codes", bits)
            parts = (Part(rows, _counted_on(next_id, len(rows))),)
        for part in (part for part in parts if len(part)):
            new = part if given is None else Part(part.codes, given[taken : taken + len(part)])
            if _lowest(new.ids) < next_id:
                known = known or IdSet(other.sound().ids for other in (*there, *out))
                refuse_known(new.ids, known)
            if known is not None:
                known.add(new.ids)
            next_id, taken = max(next_id, _highest(new.ids) + 1), taken + len(new)
            out.append(new)
    return out, next_id


def _pieces(codes: "Array | HammingIndex | Sequence[Array | HammingIndex]") -> "list[Array | HammingIndex]":
    return [codes] if isinstance(codes, (np.ndarray, Tensor, HammingIndex)) else list(codes)


def _verify(parts: Sequence[Part]) -> None:
    for part in parts:
        if part.check is not None:
            part.check.now(part)


def _check_bits(bits: Any) -> int:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 1 <= bits <= MAX_BITS:
        raise InputError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")
    return int(bits)


def _check_codes(codes: Any, name: str, bits: int) -> np.ndarray:
    x = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else codes
    nbytes = -(-bits // 8)
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2:
        seen = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"{name} must be packed codes, uint8 (N, {nbytes}) (see pack_codes), got {seen}")
    if x.shape[1] != nbytes:
        raise InputError(f"{name} must have {bits} bits ({nbytes} bytes) a code, got {x.shape[1]} bytes")
    blocks = range(0, len(x) if bits % 8 else 0, _ROWS)
    if any((x[start : start + _ROWS, -1] >> bits % 8).any() for start in blocks):
        raise InputError(f"{name} has bits set beyond bit {bits}: was it packed with another number of bits?")
    return x


def _counted_on(next_id: int, count: int) -> range:
    if next_id > _LAST_ID + 1 - count:
        raise InputError(f"no ids left to count on from {next_id}: pass ids=")
    return range(next_id, next_id + count)


def _lowest(ids: np.ndarray | range) -> int:
    return ids.start if isinstance(ids, range) else int(ids.min())


def _highest(ids: np.ndarray | range) -> int:
    return ids.stop - 1 if isinstance(ids, range) else int(ids.max())


def _is_mapped(x: Any) -> bool:
    while isinstance(x, np.ndarray):
        x = x.base
    return isinstance(x, mmap_module.mmap)


def _like(result: np.ndarray, q: Array) -> Array:
    return torch.from_numpy(result).to(q.device) if isinstance(q, Tensor) else result
