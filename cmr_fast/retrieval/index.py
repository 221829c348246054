"""HammingIndex: exact search over packed codes, with ids, in memory or in a file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from cmr_fast._files import StrPath, as_path
from cmr_fast.errors import InputError
from cmr_fast.ops._dispatch import how
from cmr_fast.ops._tensors import MAX_K, as_integer
from cmr_fast.ops.hamming import closed_radius
from cmr_fast.retrieval import _codefiles, _faiss, _indexfile, _shards, _usearch
from cmr_fast.retrieval._checks import Array, code_length, like, packed_codes
from cmr_fast.retrieval._collection import Collection, Ids
from cmr_fast.retrieval._formats import index_kind
from cmr_fast.retrieval._ids import next_after
from cmr_fast.retrieval._pieces import check_progress, is_stream, planned, streamed, verify, width_of
from cmr_fast.retrieval._plan import SearchPlan
from cmr_fast.retrieval._searching import Searched, hits_of_all, nearest_at_once, nearest_of_all
from cmr_fast.retrieval._segments import Part, is_mapped
from cmr_fast.retrieval._where import selected_rows
from cmr_fast.retrieval.searcher import Searcher

Where = Array | Sequence[int] | Sequence[bool] | range
_SMALL_BYTES = 1 << 20  # parts of a file that are read into memory: a search has a cost per part


class HammingIndex(Collection):
    """Exact Hamming search over packed codes of 1 to 4096 bits.

    Codes are numpy arrays or torch tensors, uint8 (N, ceil(bits / 8)) as `pack_codes` makes them; results are of the
    kind of the queries. Every code has an int64 id of 0 or more, given to `add` or counted on from the highest yet;
    an index from faiss keeps what ids faiss had. Equal distances rank in the order in which codes were added.

    Any number of threads may search while others add and remove: a search sees the index as it was at one moment and
    waits for nobody; adding and removing wait for each other.

    Many searches over many codes in memory that do not change build tables (see cmr_fast.ops.multi_index) where those
    are expected to pay; they take a few times the memory of the codes, those for a small radius 1.5 times at most, and
    `tables = False` keeps to the scan.

    An index can be pickled and copied. Codes in memory go along; what is mapped from a file goes by the file's path,
    and is refused where that holds something else when it is used. Copies share what neither can change.

    Parameters
    ----------
    bits : int
        Code length, 1 to 4096.

    Raises
    ------
    InputError
        For another code length.
    """

    def __init__(self, bits: int) -> None:
        self.tables = True
        super().__init__(bits)

    def _begin(self) -> None:
        super()._begin()
        self._plans: WeakKeyDictionary[Part, SearchPlan] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_plans"]
        return state

    def memory_usage(self) -> dict[str, int]:
        """Bytes by where they are.

        Returns
        -------
        dict
            "memory": codes, ids, spare room, the lookup of ids and search tables; "mapped": from a file.
        """
        with self._writing:
            parts, tail, known = self._parts, self._tail, self._known
        usage = {"memory": (tail.nbytes if tail else 0) + (known.nbytes if known else 0), "mapped": 0}
        usage["memory"] += sum(self._plans[part].nbytes for part in parts if part in self._plans)
        for part in parts if tail is None else parts[:-1]:
            usage["mapped" if is_mapped(part.codes) else "memory"] += part.nbytes
        return usage

    def search(
        self,
        q: Array,
        k: int,
        threads: int | None = None,
        *,
        radius: int | None = None,
        where: Where | None = None,
    ) -> tuple[Array, Array]:
        """The k nearest codes of each query, exactly.

        Parameters
        ----------
        q : ndarray or Tensor
            uint8 (Q, nbytes) packed queries.
        k : int
            1 to 2^31 - 1; beyond what there is, id -1 and distance bits + 1 pad.
        threads : int, optional
            None is every processor of this process.
        radius : int, optional
            Only codes at distance <= radius, 0 or more. A small one is found without scanning.
        where : array of bool, array of int or range, optional
            Search only among these: bool (ntotal,) in the order in which codes were added, or ids. The cost falls with
            their number.

        Returns
        -------
        distances : int32 (Q, k)
            Nearest first.
        ids : int64 (Q, k)
            Equal distances in the order in which codes were added.

        Raises
        ------
        InputError
            For queries that are not packed codes of this length, a k, radius or threads that are not counts, a mask of
            another length, ids that are not in the index, and a k that takes more memory than there is (12 bytes for
            each result).
        """
        if radius is None and where is None:
            at_once = nearest_at_once(self._parts, q, k, self.bits, threads)
            if at_once is not None:
                return at_once
        rows = packed_codes(q, "q", self.bits)
        k, (_, threads) = as_integer(k, "k", 1, MAX_K), how(None, threads)
        most = None if radius is None else as_integer(radius, "radius", 0)
        found = [near for part in self._searched(where) for near in part.nearest(rows, k, most, self.bits, threads)]
        distances, ids = nearest_of_all(found, len(rows), k, self.bits)
        return like(distances, q), like(ids, q)

    def searcher(self, k: int, threads: int | None = None) -> Searcher:
        """Search for one query after the other, into arrays that are made once.

        Parameters
        ----------
        k : int
            As in `search`.
        threads : int, optional
            None is every processor of this process.

        Returns
        -------
        Searcher
            `searcher.search(q)` finds what `index.search(q, k)` finds of one query; what it returns is **overwritten
            by its next call**. It sees what is added and removed. One searcher serves one thread at a time.

        Raises
        ------
        InputError
            For a k or threads that are not counts.
        """
        return Searcher(self, as_integer(k, "k", 1, MAX_K), how(None, threads)[1])

    def range_search(
        self,
        q: Array,
        radius: int,
        threads: int | None = None,
        *,
        strict: bool = False,
        where: Where | None = None,
    ) -> tuple[Array, Array, Array]:
        """Every code at distance <= radius of each query.

        faiss's binary range_search leaves the radius itself out (distance < radius): faiss radius = ours + 1, or the
        same with `strict=True`.

        Parameters
        ----------
        q : ndarray or Tensor
            uint8 (Q, nbytes) packed queries.
        radius : int
            0 or more, in bits.
        threads : int, optional
            None is every processor of this process.
        strict : bool, optional
            True: distance < radius, as faiss has it; within radius 0 there is nothing.
        where : array of bool, array of int or range, optional
            As in `search`.

        Returns
        -------
        lims : int64 (Q + 1,)
            The hits of query i are lims[i]:lims[i + 1], in the order in which codes were added.
        distances : int32 (T,)
        ids : int64 (T,)

        Raises
        ------
        InputError
            For queries that are not packed codes of this length, a radius or threads that are not counts, a mask of
            another length, and ids that are not in the index.
        """
        rows = packed_codes(q, "q", self.bits)
        radius, (_, threads) = min(closed_radius(radius, strict), self.bits), how(None, threads)
        parts = self._searched(where)
        found = [hits for part in parts if radius >= 0 for hits in part.within(rows, radius, threads)]
        lims, distances, ids = hits_of_all(found, len(rows))
        return like(lims, q), like(distances, q), like(ids, q)

    def save(self, path: StrPath) -> None:
        """Write the index as it is now; `path` holds the old file or the whole new one, whatever happens.

        Parameters
        ----------
        path : path
            A file, new or to be replaced; a symbolic link stays one, and the file that it names is replaced.

        Raises
        ------
        InputError
            Where `path` is a folder, device, FIFO or socket, or what is mapped is damaged.
        OSError
            Where the system refuses, with the path.
        """
        with self._writing:
            parts, next_id = self._parts, self._next_id
        verify(parts)
        _indexfile.write(path, self.bits, next_id, parts)

    @classmethod
    def load(cls, path: StrPath, mmap: bool = True, check: bool = True) -> "HammingIndex":
        """Open an index file. Its header and directory are always checked.

        Parameters
        ----------
        path : path
            What `save`, `build` or `append` wrote.
        mmap : bool
            True: opens at once, whatever the size. Codes and ids stay in the file; what is added later is in memory.
            The file may be appended to and replaced meanwhile: this index stays as it was.
            False: everything is read into memory and checked now.
        check : bool
            False: codes and ids that are mapped are not checked before their first use (crc32, once, GB/s).

        Returns
        -------
        HammingIndex

        Raises
        ------
        InputError
            For a file that is missing, damaged, of a later version or something else, saying what it is.
        """
        stored = _indexfile.read(path)
        index = cls(stored.bits)
        mapped = len(stored.parts) if mmap else 0
        while mapped and stored.parts[mapped - 1].codes.nbytes < _SMALL_BYTES:
            mapped -= 1
        index._parts, index._next_id = stored.parts[:mapped], stored.next_id
        for part in stored.parts[:mapped]:
            if not check:
                part.trust()
        for part in stored.parts[mapped:]:
            index._extend(part.sound().codes, part.ids)
        return index

    @classmethod
    def open(cls, path: StrPath, mmap: bool = True, bits: int | None = None) -> "HammingIndex":
        """Open an index file, of this package, of faiss or of usearch, or a file of codes that others wrote.

        Parameters
        ----------
        path : path
            What `save`, faiss.write_index_binary or usearch's Index.save (of bits; keys become ids) wrote; a folder of
            shards, which are searched one after the other here, without Ray; .u8bin and .bvecs, whose rows are taken as
            packed codes; .hdf5 or .h5 of ann-benchmarks by Hamming distance ("train", packed). Ids of files of codes
            are 0, 1, 2 and so on.
        mmap : bool
            As in `load`: False reads everything into memory. usearch's and files of codes are always read.
        bits : int, optional
            Code length; only that of a file of others may be shorter than its bytes.

        Returns
        -------
        HammingIndex

        Raises
        ------
        InputError
            For a file that is none of these, saying what it is, or of another code length.
        """
        if as_path(path).is_dir():
            return cls._of_shards(path, bits, mmap)
        if _codefiles.has_codes(path):
            held, codes = _codefiles.read_codes(path, bits=bits)
            index = cls(held)
            index.add(codes)
            return index
        if (kind := index_kind(path)) == "faiss":
            return cls.from_faiss(path, bits, mmap)
        if kind == "usearch":
            return cls._holding(path, *_usearch.read(path), bits, False)
        index = cls.load(path, mmap)
        if bits is not None and code_length(bits) != index.bits:
            raise InputError(f"{path}: its codes have {index.bits} bits, expected {bits}")
        return index

    def verify(self) -> None:
        """Check what is mapped by the file's checksums, once more if it was; in memory there is nothing to check.

        Raises
        ------
        InputError
            Where the file is damaged.
        """
        verify(self._parts)

    @classmethod
    def build(
        cls,
        path: StrPath,
        codes: "Array | HammingIndex | Sequence[Array | HammingIndex] | Iterator[Array]",
        ids: Ids | None = None,
        *,
        bits: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Write an index file without having it in memory: arrays mapped from files stay there.

        Parameters
        ----------
        path : path
            As in `save`.
        codes : ndarray, Tensor, HammingIndex or sequence of these; iterator of arrays
            uint8 (N, nbytes) each; a HammingIndex among them brings its ids along. Of an iterator one array at a time
            is in memory, and ids are 0, 1, 2 and so on.
        ids : array of int, optional
            int64, one for each row of all pieces, where they shall not count on and are not brought along; rising ones
            may stay in a file, others are sorted in memory.
        bits : int, optional
            None: those of the first piece, 8 * nbytes for an array.
        progress : callable, optional
            Called with the number of rows written since the last call.

        Raises
        ------
        InputError
            For codes of several lengths or kinds, ids that repeat, and paths that `save` refuses.
        OSError
            Where the system refuses, with the path.
        """
        check_progress(progress)
        if is_stream(codes):
            bits, blocks = streamed(codes, ids, bits)  # type: ignore[arg-type]
            _indexfile.write_blocks(path, bits, blocks, progress=progress)
            return
        pieces = _pieces(codes)  # type: ignore[arg-type]
        if bits is None:
            if not pieces:
                raise InputError("codes must hold an array at least, or bits must say the length")
            first = pieces[0]
            bits = first.bits if isinstance(first, HammingIndex) else 8 * width_of(first)
        bits = code_length(bits)
        parts, next_id = planned(_opened(pieces, bits), ids, (), 0)
        _indexfile.write(path, bits, next_id, parts, progress)

    @staticmethod
    def append(
        path: StrPath,
        codes: "Array | HammingIndex | Sequence[Array | HammingIndex]",
        ids: Ids | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Add codes to an index file, without reading what is in it.

        The file holds the state before or after, whatever happens, and appends from several processes wait for each
        other. Many small appends cost O(log N) rewrites of a row, amortised.

        Parameters
        ----------
        path : path
            An index file.
        codes, ids, progress
            As in `build`.

        Raises
        ------
        InputError
            For a file that `load` refuses, codes of another length, and ids that are in the file or repeat.
        OSError
            Where the system refuses, with the path.
        """
        pieces = _pieces(codes)
        check_progress(progress)
        _indexfile.append(path, lambda old: planned(_opened(pieces, old.bits), ids, old.parts, old.next_id), progress)

    @classmethod
    def from_faiss(cls, path: StrPath, bits: int | None = None, mmap: bool = True) -> "HammingIndex":
        """Open a faiss file of IndexBinaryFlat, IVF, HNSW, Hash or MultiHash, or of IndexBinaryIDMap or IDMap2 over it.

        Lists, graphs and hashes are left aside, with a warning: searches here are exact. Codes are by rising id then.
        Its ids are kept as they are: negative ones, and one id for several codes. (-1 also pads what `search` returns;
        the distance bits + 1 tells the padding.) `add` goes on to take new ids of 0 or more only.

        Parameters
        ----------
        path : path
            What faiss.write_index_binary wrote. Such files have no checksums.
        bits : int, optional
            The code length where it is no multiple of 8.
        mmap : bool
            True: codes and ids of a flat index stay in the file. False: they are read, as others always are.

        Returns
        -------
        HammingIndex

        Raises
        ------
        InputError
            For a file that is missing, damaged, too wide or something else, saying what it is.
        """
        return cls._holding(path, *_faiss.read(path), bits, mmap)

    @classmethod
    def _of_shards(cls, path: StrPath, bits: int | None, mmap: bool) -> "HammingIndex":
        held, parts = _shards.settled(path)
        if bits is not None and code_length(bits) != held.bits:
            raise InputError(f"{path}: its codes have {held.bits} bits, expected {bits}")
        index = cls(held.bits)
        if mmap:
            index._parts = parts
        else:
            for part in parts:
                index._extend(part.sound().codes, part.ids)
        index._next_id = held.next_id
        return index

    @classmethod
    def _holding(cls, path: StrPath, file_bits: int, part: Part, bits: int | None, mmap: bool) -> "HammingIndex":
        index = cls(file_bits if bits is None else bits)
        if len(part):
            packed_codes(part.codes, f"{as_path(path)}", index.bits)
            if mmap and part.source is not None:
                index._parts = (part,)
            else:
                index._extend(part.codes, part.ids)
            index._next_id = next_after(0, part.ids)
        return index

    def to_faiss(self, path: StrPath) -> None:
        """Write a faiss file: IndexBinaryFlat, under an IndexBinaryIDMap2 where ids are not 0, 1, 2 and so on.

        Parameters
        ----------
        path : path
            As in `save`.

        Raises
        ------
        InputError
            For paths that `save` refuses.
        OSError
            Where the system refuses, with the path.
        """
        parts = self._parts
        verify(parts)
        _faiss.write(path, self._nbytes, parts)

    def _searched(self, where: Where | None) -> list[Searched]:
        """Each part, its rows that count, and its plan: the one place that chooses how a part is searched."""
        parts = self._parts
        rows = [None] * len(parts) if where is None else selected_rows(where, parts)
        return [Searched(part.sound(), each, self._plan_of(part)) for part, each in zip(parts, rows, strict=True)]

    def _plan_of(self, part: Part) -> SearchPlan | None:
        if not self.tables or is_mapped(part.codes):
            return None
        plan = self._plans.get(part)
        return self._plans.setdefault(part, SearchPlan()) if plan is None else plan


def _pieces(codes: "Array | HammingIndex | Sequence[Array | HammingIndex]") -> "list[Array | HammingIndex]":
    return list(codes) if isinstance(codes, list | tuple) else [codes]  # type: ignore[list-item]


def _opened(pieces: "list[Array | HammingIndex]", bits: int) -> list[np.ndarray | tuple[Part, ...]]:
    """Rows of codes, and indexes as their parts."""
    out: list[np.ndarray | tuple[Part, ...]] = []
    for piece in pieces:
        if not isinstance(piece, HammingIndex):
            out.append(packed_codes(piece, "codes", bits))
        elif piece.bits != bits:
            raise InputError(f"codes must have {bits} bits, got a HammingIndex of {piece.bits}")
        else:
            verify(piece._parts)
            out.append(piece._parts)
    return out
