"""Codes and their ids as an index holds them: added, removed, copied and pickled."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.retrieval._checks import Array, code_length, packed_codes
from cmr_fast.retrieval._ids import IdSet, check_ids, counted_on, lowest, next_after, refuse_known, refuse_longer
from cmr_fast.retrieval._pieces import distinct
from cmr_fast.retrieval._segments import Part, Tail, is_mapped

Ids = Array | Sequence[int]


class Collection:
    """What a HammingIndex is without its searches and files."""

    def __init__(self, bits: int) -> None:
        self.bits = code_length(bits)
        self._parts: tuple[Part, ...] = ()  # replaced as a whole, never changed: what a search sees
        self._next_id = 0
        self._begin()

    def _begin(self) -> None:
        self._tail: Tail | None = None  # of the last part, if that can grow
        self._known: IdSet | None = None  # made when an id is first given that does not count on
        self._writing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._writing:
            state = self.__dict__.copy()
        for name in ("_tail", "_known", "_writing"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits}, ntotal={self.ntotal})"

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

    def add(self, codes: Array, ids: Ids | None = None) -> None:
        """Add codes; nothing is added where anything is refused.

        Adding many small pieces is cheap, whatever the order of their ids.

        Parameters
        ----------
        codes : ndarray or Tensor
            uint8 (N, nbytes).
        ids : array of int, optional
            int64 (N,), 0 to 2^63 - 2, new ones, each once. None: counted on from the highest yet.

        Raises
        ------
        InputError
            For codes of another length or kind, and ids that repeat or are out of range.
        """
        rows = packed_codes(codes, "codes", self.bits)
        given = None if ids is None else check_ids(ids, len(rows))
        with self._writing:
            if given is None:
                given = counted_on(self._next_id, len(rows))
            elif len(given) and lowest(given) < self._next_id:
                refuse_known(given, self._known_ids())
            if len(rows) == 0:
                return
            self._extend(rows, given)
            if self._known is not None:
                self._known.add(given)
            self._next_id = next_after(self._next_id, given)

    def remove_ids(self, ids: Ids) -> int:
        """Remove the codes of these ids; the others keep their ids and their order.

        Parts that lose codes are copied, into memory where they were mapped: remove many ids in one call.

        Parameters
        ----------
        ids : array of int
            int64 (M,), each once. All codes under an id go.

        Returns
        -------
        int
            How many codes were removed.

        Raises
        ------
        InputError
            Where an id is not in the index; nothing is removed.
        """
        refuse_longer(ids, len(self), f"ids must be in the index, which holds {len(self)} codes")
        gone = np.sort(np.asarray(check_ids(ids, None, any_sign=True), dtype=np.int64))
        with self._writing:
            rows = [part.sound().rows_of(gone) for part in self._parts]
            if sum(map(len, rows)) < len(gone) or len(distinct(self._parts, rows)) < len(gone):
                unknown = np.setdiff1d(gone, distinct(self._parts, rows))
                raise InputError(f"ids must be in the index: {len(unknown)} are not, the first is {unknown[0]}")
            parts, tail = [], self._tail
            for part, cut in zip(self._parts, rows, strict=True):
                rest = part.without(cut) if len(cut) else part
                if part is self._parts[-1] and tail is not None and len(cut):
                    tail = Tail(self._nbytes)
                    rest = tail.extended(rest.codes, rest.ids)
                parts.append(rest)
            if self._known is not None:
                self._known.discard(gone)
            self._tail = tail if parts and len(parts[-1]) else None
            self._parts = tuple(part for part in parts if len(part))
        return sum(map(len, rows))

    @property
    def _nbytes(self) -> int:
        return -(-self.bits // 8)

    def _extend(self, codes: np.ndarray, ids: np.ndarray | range) -> None:
        parts, tail = self._parts[:-1], self._tail
        if tail is None:
            tail, parts = Tail(self._nbytes), self._parts
            small = len(parts)  # parts in memory that a copy was left with: grown together, there are O(log N)
            rows = len(codes)
            while small and not is_mapped(parts[small - 1].codes) and len(parts[small - 1]) <= rows:
                small -= 1
                rows += len(parts[small])
            for part in parts[small:]:
                tail.extended(part.codes, part.ids)
            parts = parts[:small]
        part = tail.extended(codes, ids)
        self._tail = tail
        self._parts = (*parts, part)

    def _known_ids(self) -> IdSet:
        if self._known is None:
            self._known = IdSet(part.sound().ids for part in self._parts)
        return self._known
