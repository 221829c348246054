"""A stream of single queries: outputs made once, and checks that are made once."""

from typing import TYPE_CHECKING

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch, multi_index
from cmr_fast.ops._tensors import described, neighbour_arrays
from cmr_fast.retrieval._checks import packed_codes
from cmr_fast.retrieval._plan import SearchPlan
from cmr_fast.retrieval._segments import Part, joined

if TYPE_CHECKING:
    from cmr_fast.retrieval.index import HammingIndex

_BYTE = np.dtype(np.uint8)


class Searcher:
    """The k nearest codes of one query after the other; `HammingIndex.searcher` makes it.

    Backend and instruction set are those that were chosen when it was made. One searcher serves one thread at a time.

    Parameters
    ----------
    index : HammingIndex
        What it searches, as it is at each call.
    k : int
        1 or more.
    threads : int or None
        None is every processor of this process.
    """

    def __init__(self, index: "HammingIndex", k: int, threads: int | None) -> None:
        self._index, self._k, self._threads = index, k, _dispatch.choose_threads(threads)
        self._nbytes = -(-index.bits // 8)
        self._stray = 0xFF << index.bits % 8 & 0xFF if index.bits % 8 else 0  # bits of the last byte that must be 0
        self._distances, self._ids = neighbour_arrays(1, k, index.bits, padded=True)
        self._row = (self._distances[0], self._ids[0])
        self._isa = _dispatch.isa_of_arrays("hamming_topk", None)
        self._parts: tuple[Part, ...] = ()
        self._part: Part | None = None  # the only one, where a call of the native scan is all there is to do
        self._counted = True  # its ids are its rows
        self._plan: SearchPlan | None = None

    def search(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest codes of one query.

        Parameters
        ----------
        q : ndarray
            uint8 (nbytes,) or (1, nbytes).

        Returns
        -------
        distances : int32 (k,) or (1, k)
            Nearest first, **overwritten by the next call**, as the ids are: copy what shall stay.
        ids : int64 (k,) or (1, k)
            -1 with distance bits + 1 where there are fewer codes than k.

        Raises
        ------
        InputError
            For anything but one packed code of this length.
        """
        if (
            type(q) is not np.ndarray
            or q.dtype != _BYTE
            or q.size != self._nbytes
            or not q.flags.c_contiguous
            or q.shape[-1] != self._nbytes
            or q.ndim > 2
            or (self._stray and q.flat[-1] & self._stray)
        ):
            q = self._one_code(q)
        index = self._index
        if index._parts is not self._parts:
            self._prepare()
        part = self._part
        if part is None or self._looked_up(part):
            self._distances[:], self._ids[:] = index.search(q.reshape(1, -1), self._k, self._threads)
        else:
            kept = min(self._k, len(part))
            _dispatch.native().hamming_topk_of_arrays(
                self._isa, q, part.codes, kept, self._threads, self._distances, self._ids
            )
            if not self._counted:
                self._ids[:, :kept] = part.ids_of(self._ids[:, :kept])
        return self._row if q.ndim == 1 else (self._distances, self._ids)

    def _prepare(self) -> None:
        """Look at the index as it is now."""
        index = self._index
        parts = self._parts = index._parts
        self._part = self._plan = None
        if len(parts) == 1 and self._isa is not None and parts[0].codes.flags.c_contiguous:
            part = self._part = parts[0].sound()
            self._counted = joined(parts) == range(len(part))
            if multi_index.available(part.codes):
                self._plan = index._plan_of(part)
            self._distances[:, len(part) :] = index.bits + 1
            self._ids[:, len(part) :] = -1

    def _looked_up(self, part: Part) -> bool:
        """Whether tables are there, or are built now."""
        index, plan = self._index, self._plan
        if plan is None or not index.tables:
            return False
        return plan.tables_for(1, part.codes, min(self._k, len(part)), index.bits, self._threads) is not None

    def _one_code(self, q: object) -> np.ndarray:
        """`q` as it is searched; InputError where it is no packed code of this length, or several."""
        if not isinstance(q, np.ndarray):
            raise InputError(f"q must be a numpy array, uint8 ({self._nbytes},), got {described(q)}")
        row = q.ndim == 1
        rows = np.ascontiguousarray(packed_codes(q[None] if row else q, "q", self._index.bits))
        if len(rows) != 1:
            raise InputError(f"q must be one packed code: expected HammingIndex.search for several, got {len(rows)}")
        return rows[0] if row else rows
