"""What is searched: a HammingIndex in this process, or a ShardedIndex over Ray, behind one face."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cmr_fast.distributed import PartialNeighbours, ShardedIndex, ShardLostError
from cmr_fast.distributed._batches import Batches
from cmr_fast.retrieval.index import HammingIndex

MOST_TOGETHER, MOST_WAITING = 4096, 1 << 16


class Found(NamedTuple):
    """Distances and ids (Q, k), padded by id -1; `missing` shards, of `missing_codes`, were not looked at."""

    distances: np.ndarray
    ids: np.ndarray
    missing: tuple[int, ...] = ()
    missing_codes: int = 0


class Searchable(Protocol):
    """An index that any number of threads may ask."""

    @property
    def bits(self) -> int:
        """Code length."""

    @property
    def count(self) -> int:
        """Codes."""

    @property
    def shards(self) -> int:
        """Processes' parts of it, 1 where there is no other process."""

    def search(self, q: np.ndarray, k: int, radius: int | None, where: Sequence[int] | None) -> Found:
        """As `HammingIndex.search`."""

    def lost(self) -> dict[int, int]:
        """Shards that do not answer now, and their codes."""


class InProcess:
    """A HammingIndex, callers of which are searched for together.

    Parameters
    ----------
    index : HammingIndex
        In memory, or mapped.
    threads : int, optional
        Of a search. None: every processor of this process.
    """

    def __init__(self, index: HammingIndex, threads: int | None = None) -> None:
        self.index, self._threads = index, threads
        self._batches = Batches(MOST_TOGETHER, MOST_WAITING)

    @property
    def bits(self) -> int:
        """Code length."""
        return self.index.bits

    @property
    def count(self) -> int:
        """Codes."""
        return self.index.ntotal

    @property
    def shards(self) -> int:
        """One."""
        return 1

    def search(self, q: np.ndarray, k: int, radius: int | None, where: Sequence[int] | None) -> Found:
        """As `HammingIndex.search`."""

        def run(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            distances, ids = self.index.search(rows, k, self._threads, radius=radius, where=where)
            return np.asarray(distances), np.asarray(ids)

        distances, ids = run(q) if where is not None else self._batches.search((k, radius), q, run)
        return Found(distances, ids)

    def lost(self) -> dict[int, int]:
        """Nothing."""
        return {}


class OverShards:
    """A ShardedIndex.

    Parameters
    ----------
    index : ShardedIndex
        Which joins what callers ask at once.
    partial : bool
        Answer without shards that are lost, and say so; otherwise `search` raises ShardLostError.
    """

    def __init__(self, index: ShardedIndex, partial: bool = False) -> None:
        self.index, self._partial = index, partial

    @property
    def bits(self) -> int:
        """Code length."""
        return self.index.bits

    @property
    def count(self) -> int:
        """Codes, those of lost shards too."""
        return self.index.ntotal

    @property
    def shards(self) -> int:
        """How many."""
        return len(self.index.shards)

    def search(self, q: np.ndarray, k: int, radius: int | None, where: Sequence[int] | None) -> Found:
        """As `ShardedIndex.search`."""
        try:
            found = self.index.search(q, k, radius=radius, where=where)
        except ShardLostError:
            if not self._partial:
                raise
            found = self.index.search(q, k, radius=radius, where=where, partial=True)
        missing = (found.missing, found.missing_codes) if isinstance(found, PartialNeighbours) else ((), 0)
        return Found(np.asarray(found[0]), np.asarray(found[1]), *missing)

    def lost(self) -> dict[int, int]:
        """Shards that no replica answers for now, and their codes."""
        return self.index.lost()
