"""What answers for one shard: a plain class, which a Ray actor is made of.

Every call names the files that it is about, so a worker that was started anew answers as the one before did: it opens
them again. Every answer says how many codes were looked at.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from cmr_fast.distributed import _line
from cmr_fast.ops import ranking
from cmr_fast.retrieval._plan import SearchPlan
from cmr_fast.retrieval._segments import Part
from cmr_fast.retrieval._shards import ShardFile, opened
from cmr_fast.retrieval._where import as_mask
from cmr_fast.retrieval.index import HammingIndex


class Answer(NamedTuple):
    """What a shard found, among how many codes."""

    rows: int
    found: Any


class ShardWorker:
    """Searches the files of one shard, in memory or mapped."""

    def __init__(self, folder: str, bits: int, mmap: bool = True, threads: int = 1) -> None:
        self._folder, self._bits, self._mmap, self._threads = Path(folder), bits, mmap, threads
        self._files: dict[ShardFile, tuple[_Touched, tuple[Part, ...]]] = {}
        self._plans: WeakKeyDictionary[Part, SearchPlan] = WeakKeyDictionary()
        self._view: tuple[tuple[ShardFile, ...], HammingIndex] = ((), HammingIndex(bits))
        self._opening = threading.Lock()
        self._address: str | None = None

    def listen(self, folder: str) -> str | None:
        """Answer at a Unix socket of this folder too: its address; None where the folder is not on this machine."""
        if self._address is None:
            address = f"{folder}/{os.getpid()}"
            try:
                _line.serve(address, self)
            except OSError:
                return None
            self._address = address
        return self._address

    def ready(self, files: Sequence[ShardFile]) -> Answer:
        """Open files, and compare them with their checksums."""
        index = self._index(files)
        for part in index._parts:
            part.sound()
        return Answer(len(index), os.getpid())

    def search(
        self, files: Sequence[ShardFile], q: np.ndarray, k: int, radius: int | None, where: np.ndarray | None
    ) -> Answer:
        """Distances and ids of the nearest, and how many ids of `where` there are here."""
        index = self._index(files)
        mask, known = self._mask(index, where)
        near, ids = index.search(q, min(k, max(len(index), 1)), self._threads, radius=radius, where=mask)
        return Answer(len(index), (near, ids, known))

    def range_search(self, files: Sequence[ShardFile], q: np.ndarray, radius: int, where: np.ndarray | None) -> Answer:
        """Hits within a radius, and how many ids of `where` there are here."""
        index = self._index(files)
        mask, known = self._mask(index, where)
        return Answer(len(index), (*index.range_search(q, radius, self._threads, where=mask), known))

    def histograms(
        self, files: Sequence[ShardFile], q: np.ndarray, q_labels: np.ndarray, db_labels: np.ndarray
    ) -> Answer:
        """int64 (Q, 8 * nbytes + 1) codes at each distance, and of those the ones that share a label."""
        index = self._index(files)
        shape = (len(q), 8 * q.shape[1] + 1)
        items, relevant, at = np.zeros(shape, np.int64), np.zeros(shape, np.int64), 0
        for part in map(Part.sound, index._parts):
            labels = db_labels[at : at + len(part)]
            found = ranking(q, part.codes, q_labels, labels, order=False, curves=False, threads=self._threads)
            items += found.items
            relevant += found.relevant
            at += len(part)
        return Answer(len(index), (items, relevant))

    def _index(self, files: Sequence[ShardFile]) -> HammingIndex:
        """The files as one index; what is held of other states than this one is let go."""
        with self._opening:
            return self._indexed(tuple(files))

    def _indexed(self, files: tuple[ShardFile, ...]) -> HammingIndex:
        held, index = self._view
        now = {file: self._files[file] for file in files if file in self._files and self._same(file)}
        if held == files and len(now) == len(files):
            return index
        self._files = {file: now[file] if file in now else self._opened(file) for file in files}
        index = HammingIndex(self._bits)
        index._plans = self._plans
        index._parts = tuple(part for file in files for part in self._files[file][1])
        self._view = (files, index)
        return index

    def _same(self, file: ShardFile) -> bool:
        """Whether a file that is held was not touched since it was opened; one that was is opened and checked anew."""
        try:
            return _touched(self._folder / file.name) == self._files[file][0]
        except FileNotFoundError:
            return False

    def _opened(self, file: ShardFile) -> "tuple[_Touched, tuple[Part, ...]]":
        path = self._folder / file.name
        parts = opened(self._folder, file, self._bits)
        if not self._mmap:
            parts = HammingIndex.load(path, mmap=False)._parts
        return _touched(path), parts

    @staticmethod
    def _mask(index: HammingIndex, where: np.ndarray | None) -> tuple[np.ndarray | None, int]:
        """bool (ntotal,), and how many distinct ids of `where` there are; `where` is such a mask or ids that rise."""
        if where is None or where.dtype == bool:
            return where, 0
        rows = [part.rows_of(where) for part in map(Part.sound, index._parts)]
        masks = [as_mask(each, len(part)) for each, part in zip(rows, index._parts, strict=True)]
        found = [part.ids_of(each) for each, part in zip(rows, index._parts, strict=True)]
        known = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
        return np.concatenate([np.empty(0, bool), *masks]), len(known)


_Touched = tuple[int, int]


def _touched(path: Path) -> _Touched:
    seen = os.stat(path)
    return seen.st_ino, seen.st_mtime_ns
