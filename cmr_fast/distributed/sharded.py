"""ShardedIndex: a HammingIndex whose parts are held by Ray actors, and answer as one."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cmr_fast._files import StrPath, as_path
from cmr_fast.distributed._batches import Batches
from cmr_fast.distributed._pool import Pool
from cmr_fast.distributed._worker import Answer
from cmr_fast.errors import InputError
from cmr_fast.ops._dispatch import how
from cmr_fast.ops._tensors import MAX_K, as_integer
from cmr_fast.ops.hamming import closed_radius
from cmr_fast.retrieval import _indexfile, _shards
from cmr_fast.retrieval._checks import Array, code_length, like, packed_codes, to_numpy
from cmr_fast.retrieval._collection import Ids
from cmr_fast.retrieval._ids import check_ids
from cmr_fast.retrieval._pieces import check_progress, is_stream, planned, streamed, width_of
from cmr_fast.retrieval._searching import hits_of_all, nearest_of_all
from cmr_fast.retrieval.index import HammingIndex, Where, _opened, _pieces
from cmr_fast.retrieval.metrics import evaluate_histograms
from cmr_fast.retrieval.result import RetrievalResult

_INLINE = 100_000  # bytes of queries that go along with each call; more are stored once for all shards
_ATTEMPTS = 5  # of a search that other processes' changes overtake


class PartialNeighbours(NamedTuple):
    """What `search(partial=True)` found: `missing` shards were not looked at, which hold `missing_codes`."""

    distances: Array
    ids: Array
    missing: tuple[int, ...]
    missing_codes: int


class PartialHits(NamedTuple):
    """What `range_search(partial=True)` found: `missing` shards were not looked at, which hold `missing_codes`."""

    lims: Array
    distances: Array
    ids: Array
    missing: tuple[int, ...]
    missing_codes: int


class ShardedIndex:
    """Exact Hamming search over shards, each held by Ray actors and mapped from files of its own.

    Answers are those of one `HammingIndex` of the same codes, order and ids included. The folder has to be seen by
    every node under the same path (a shared file system, or one machine). Any number of threads may search at once:
    what waits is searched together. Searches see the index as it was at one moment; adding and removing wait for each
    other, in other processes too, and are in force as a whole once they return.

    Parameters
    ----------
    folder : path
        What `build` wrote.
    replicas : int
        Actors of each shard, on nodes of their own where there are as many. With two or more, searches go on while one
        is lost.
    mmap : bool
        True: codes stay in the files, and in the page cache that actors of a machine share. False: each actor reads
        its shard into memory, where many searches may build tables.
    threads : int, optional
        Of each actor. None: a node's processors divided by its actors.
    timeout : float, optional
        Seconds after which a shard that has not answered counts as lost, but one that is being started; None waits.
    wait : float
        Seconds for which a search waits for lost replicas of a shard, where there are two or more, to come back before
        it is given up.
    most_together : int
        Queries that are searched together at most, of callers that come at once.
    most_waiting : int
        Queries that may wait; beyond, `search` raises OverloadedError at once.

    Raises
    ------
    InputError
        For a folder that is no sharded index, files that are missing, changed or damaged, and where Ray is absent or
        too old.
    """

    def __init__(
        self,
        folder: StrPath,
        *,
        replicas: int = 1,
        mmap: bool = True,
        threads: int | None = None,
        timeout: float | None = None,
        wait: float = 30.0,
        most_together: int = 4096,
        most_waiting: int = 1 << 16,
    ) -> None:
        self.folder: Path = as_path(folder)
        self._manifest = _shards.read(folder)
        checked = how(None, threads)[1] if threads is not None else None
        replicas = as_integer(replicas, "replicas", 1)
        if timeout is not None and not timeout > 0:
            raise InputError(f"timeout must be seconds above 0, or None to wait, got {timeout!r}")
        self._batches = Batches(
            as_integer(most_together, "most_together", 1), as_integer(most_waiting, "most_waiting", 1)
        )
        self._changing = threading.Lock()
        self._pool = Pool(self.folder, self.bits, replicas, mmap, checked, timeout, float(wait))
        self._pool.grow(len(self._manifest.shards))
        self._asked(None, lambda selected: self._pool.ask("ready", selected.manifest.shards, lambda _: ()))

    @classmethod
    def build(
        cls,
        folder: StrPath,
        codes: "Array | HammingIndex | Sequence[Array | HammingIndex] | Iterator[Array]",
        ids: Ids | None = None,
        *,
        shards: int = 4,
        rows: int | None = None,
        bits: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Write a folder of shards without having the codes in memory. Ray is not needed for it.

        Parameters
        ----------
        folder : path
            New, or empty.
        codes, ids, bits, progress
            As in `HammingIndex.build`; a HammingIndex, such as one that is mapped, is cut into shards.
        shards : int
            How many, of as many codes each. What is added later goes to the last one; a shard is begun where it holds
            twice its share, and a million codes at least.
        rows : int, optional
            Codes of a shard, in place of `shards`: for an iterator of arrays, whose length nobody knows before its end.

        Raises
        ------
        InputError
            For a folder that holds something, codes of several lengths or kinds, and ids that repeat; for `rows`
            without an iterator, and the other way round.
        """
        check_progress(progress)
        if is_stream(codes) != (rows is not None):
            raise InputError("rows, codes of a shard, are for an iterator of arrays, and shards= for all else")
        if rows is not None:
            each = as_integer(rows, "rows", 1)
            bits, blocks = streamed(codes, ids, bits)  # type: ignore[arg-type]
            _shards.created_of_blocks(folder, bits, blocks, each, progress)
            return
        pieces = _pieces(codes)  # type: ignore[arg-type]
        shards = as_integer(shards, "shards", 1)
        if bits is None:
            if not pieces:
                raise InputError("codes must hold an array at least, or bits must say the length")
            bits = pieces[0].bits if isinstance(pieces[0], HammingIndex) else 8 * width_of(pieces[0])
        bits = code_length(bits)
        parts, next_id = planned(_opened(pieces, bits), ids, (), 0)
        _shards.created(folder, bits, parts, next_id, shards, progress)

    @staticmethod
    def append(
        folder: StrPath,
        codes: "Array | HammingIndex | Sequence[Array | HammingIndex]",
        ids: Ids | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Add codes to a folder, as `HammingIndex.append` does to a file. Ray is not needed for it.

        Raises
        ------
        InputError
            As `HammingIndex.append`; nothing is added then.
        """
        pieces = _pieces(codes)
        check_progress(progress)
        bits = _shards.read(folder).bits
        _shards.append(as_path(folder), _opened(pieces, bits), ids, progress)

    @property
    def bits(self) -> int:
        """Code length."""
        return self._manifest.bits

    @property
    def ntotal(self) -> int:
        """How many codes there are."""
        return sum(self._manifest.rows)

    @property
    def shards(self) -> tuple[int, ...]:
        """Codes of each shard."""
        return self._manifest.rows

    def __len__(self) -> int:
        return self.ntotal

    def __repr__(self) -> str:
        return f"ShardedIndex(bits={self.bits}, ntotal={self.ntotal}, shards={len(self.shards)})"

    def search(
        self, q: Array, k: int, *, radius: int | None = None, where: Where | None = None, partial: bool = False
    ) -> tuple[Array, Array] | PartialNeighbours:
        """The k nearest codes of each query, exactly as `HammingIndex.search` finds them.

        Parameters
        ----------
        q, k, radius, where
            As in `HammingIndex.search`.
        partial : bool
            True: a shard that does not answer is left out, and the result says so; otherwise that is an error.

        Returns
        -------
        distances, ids
            int32 and int64 (Q, k). With partial=True a PartialNeighbours: these, and what is missing.

        Raises
        ------
        InputError
            As `HammingIndex.search`; for a shard whose file was changed or is damaged.
        ShardLostError
            Where a shard and its replicas do not answer; it names the shard.
        OverloadedError
            Where too many queries wait.
        """
        rows = packed_codes(q, "q", self.bits)
        k = as_integer(k, "k", 1, MAX_K)
        most = None if radius is None else as_integer(radius, "radius", 0)
        if where is not None or partial:
            (distances, ids), missing = self._nearest(rows, k, most, where, partial)
            out = like(distances, q), like(ids, q)
            return PartialNeighbours(*out, tuple(missing), sum(missing.values())) if partial else out
        distances, ids = self._batches.search(
            (k, most), rows, lambda all_: self._nearest(all_, k, most, None, False)[0]
        )
        return like(distances, q), like(ids, q)

    def range_search(
        self, q: Array, radius: int, *, strict: bool = False, where: Where | None = None, partial: bool = False
    ) -> tuple[Array, Array, Array] | PartialHits:
        """Every code at distance <= radius of each query, exactly as `HammingIndex.range_search` finds them.

        Parameters
        ----------
        q, radius, strict, where
            As in `HammingIndex.range_search`.
        partial : bool
            As in `search`.

        Returns
        -------
        lims, distances, ids
            int64 (Q + 1,), int32 (T,), int64 (T,). With partial=True a PartialHits: these, and what is missing.

        Raises
        ------
        InputError, ShardLostError
            As `search`.
        """
        rows = packed_codes(q, "q", self.bits)
        most = min(closed_radius(radius, strict), self.bits)

        def ask(selected: "_Selected") -> dict[int, Answer]:
            return self._ask(selected.manifest, "range_search", rows, lambda n: (most, selected.of(n)), partial)

        answers, missing = self._asked(where, ask) if most >= 0 else ([], dict[int, int]())
        found = hits_of_all([each.found[:3] for each in answers], len(rows))
        out = like(found[0], q), like(found[1], q), like(found[2], q)
        return PartialHits(*out, tuple(missing), sum(missing.values())) if partial else out

    def evaluate(
        self,
        q: Array,
        q_labels: object,
        db_labels: object,
        *,
        k: int | None = None,
        convention: str = "all",
        ties: str = "tie_aware",
    ) -> RetrievalResult:
        """Measure the ranking of all codes by each query, from the sum of the shards' histograms of distances.

        Parameters
        ----------
        q : ndarray or Tensor
            uint8 (Q, nbytes) packed queries.
        q_labels, db_labels, k, convention
            As in `evaluate_codes`; `db_labels` in the order in which codes were added.
        ties : str
            As there, but "index", whose order inside a distance histograms do not know.

        Returns
        -------
        RetrievalResult
            To the last bit what `evaluate_codes` returns of all codes in one array, but for recall_one_at by pairs,
            which is not known here.

        Raises
        ------
        InputError, ShardLostError
            As `evaluate_codes` and `search`.
        """
        rows, manifest = packed_codes(q, "q", self.bits), self._manifest
        levels = self.bits + 1

        def histograms(block: slice, asked: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ends = np.cumsum(manifest.rows)
            try:
                answers = self._pool.ask(
                    "histograms",
                    manifest.shards,
                    lambda n: (rows[block], asked, held[ends[n] - manifest.rows[n] : ends[n]]),
                )
            except _shards.GoneError as error:
                raise InputError(
                    f"another process changed the index ({error}): call refresh(), and give db_labels of the codes as "
                    "they are then"
                ) from error
            items, relevant = (np.sum([each.found[i] for each in answers.values()], axis=0) for i in (0, 1))
            return items[:, :levels], relevant[:, :levels]

        sizes = len(rows), sum(manifest.rows)
        if 0 in sizes:
            raise InputError(f"there must be queries and codes, got {sizes[0]} and {sizes[1]}")
        return evaluate_histograms(
            histograms, q_labels, db_labels, sizes, self.bits, k=k, convention=convention, ties=ties
        )

    def add(self, codes: Array, ids: Ids | None = None) -> None:
        """Add codes, as `HammingIndex.add` does; when it returns they are on disk and found by every search.

        Each call writes a file and waits for the disk: add many codes at a time.

        Raises
        ------
        InputError
            As `HammingIndex.add`; nothing is added then.
        """
        rows = packed_codes(codes, "codes", self.bits)
        with self._changing:
            self._manifest = _shards.append(self.folder, [rows], ids)

    def remove_ids(self, ids: Ids) -> int:
        """Remove the codes of these ids, as `HammingIndex.remove_ids` does; files that lose codes are written anew.

        Returns
        -------
        int
            How many codes were removed.

        Raises
        ------
        InputError
            Where an id is not in the index; nothing is removed.
        """
        gone = np.sort(np.asarray(check_ids(ids, None, any_sign=True), dtype=np.int64))
        with self._changing, _shards.writing(self.folder) as old:
            new, count = _shards.removed(self.folder, old, gone)
            if count:
                _shards.write(self.folder, new)
            self._manifest = new if count else old
        return count

    def actors(self, shard: int) -> list[Any]:
        """Ray's handles of the actors that hold a shard, one a replica."""
        return [replica.actor for replica in self._pool.shards[shard]]

    def lost(self) -> dict[int, int]:
        """Shards that do not answer now, whichever replica is asked, and how many codes each holds.

        Raises
        ------
        InputError
            Where a shard's file was changed or is damaged.
        """
        return self._asked(
            None, lambda selected: self._pool.ask("ready", selected.manifest.shards, lambda _: (), True, wait=0.0)
        )[1]

    def refresh(self) -> None:
        """See what other processes added and removed since this index was opened, or changed itself."""
        with self._changing:
            self._manifest = _shards.read(self.folder)

    def save(self, path: StrPath) -> None:
        """Write all that is in the folder now as one index file, for `HammingIndex.load`. The folder needs no saving.

        Raises
        ------
        InputError
            As `HammingIndex.save`.
        """
        held, parts = _shards.settled(self.folder)
        _indexfile.write(path, held.bits, held.next_id, [part.sound() for part in parts])

    def close(self) -> None:
        """End the actors. Files stay."""
        self._pool.close()

    def __enter__(self) -> "ShardedIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _nearest(
        self, rows: np.ndarray, k: int, radius: int | None, where: Where | None, partial: bool
    ) -> tuple[tuple[np.ndarray, np.ndarray], dict[int, int]]:
        def ask(selected: "_Selected") -> dict[int, Answer]:
            return self._ask(selected.manifest, "search", rows, lambda n: (k, radius, selected.of(n)), partial)

        answers, missing = self._asked(where, ask)
        return nearest_of_all([each.found[:2] for each in answers], len(rows), k, self.bits), missing

    def _asked(
        self, where: Where | None, ask: "Callable[[_Selected], dict[int, Answer]]"
    ) -> tuple[list[Answer], dict[int, int]]:
        """The shards' answers in their order, of one state of the index, and the codes of shards that are missing."""
        manifest = self._manifest
        for attempt in range(_ATTEMPTS):
            selected = _Selected(where, manifest)
            try:
                answers = ask(selected)
                break
            except _shards.GoneError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                self.refresh()
                if selected.by_row and self._manifest != manifest:
                    raise InputError(
                        "another process changed the index, and a mask is of the codes as they were: make it anew, for "
                        f"{self.ntotal} codes"
                    ) from None
                manifest = self._manifest
        missing = {n: manifest.rows[n] for n, files in enumerate(manifest.shards) if files and n not in answers}
        if not missing:
            selected.check(answers.values())
        return [answers[n] for n in sorted(answers)], missing

    def _ask(
        self,
        manifest: _shards.Manifest,
        method: str,
        rows: np.ndarray,
        rest: Callable[[int], tuple[Any, ...]],
        partial: bool,
    ) -> dict[int, Answer]:
        inline = rows.nbytes <= _INLINE
        sent = rows if inline else self._pool.stored(rows)
        direct = inline and method == "search"  # hits within a radius may be many
        return self._pool.ask(method, manifest.shards, lambda n: (sent, *rest(n)), partial, direct=direct)


class _Selected:
    """`where` of a search, cut into what each shard needs of it."""

    def __init__(self, where: Where | None, manifest: _shards.Manifest) -> None:
        self.manifest = manifest
        self._given: np.ndarray | None = None
        if where is None:
            return
        given = to_numpy(np.asarray(where) if isinstance(where, range) else where, "where")
        total = sum(manifest.rows)
        if given.dtype == bool:
            if given.shape != (total,) or np.ma.is_masked(where):
                raise InputError(
                    f"where must be ({total},) bool, one for each code, or ids of the index, got bool {given.shape}"
                )
            self._given = given
            return
        try:
            self._given = np.sort(np.asarray(check_ids(given, None, any_sign=True), dtype=np.int64))
        except InputError as error:
            raise InputError(f"where: {error}") from error

    def of(self, shard: int) -> np.ndarray | None:
        """What a shard is to look at: bool for its rows, or ids."""
        if self._given is None or not self.by_row:
            return self._given
        start = sum(self.manifest.rows[:shard])
        return self._given[start : start + self.manifest.rows[shard]]

    @property
    def by_row(self) -> bool:
        """Whether it is a mask."""
        return self._given is not None and self._given.dtype == bool

    def check(self, answers: "Iterable[Answer]") -> None:
        """InputError unless the ids that shards know are all that were given."""
        if self._given is None or self.by_row:
            return
        known = sum(answer.found[-1] for answer in answers)
        if known < len(self._given):
            raise InputError(f"where must name ids of the index: {len(self._given) - known} are not in it")
