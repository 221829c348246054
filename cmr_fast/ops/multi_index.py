"""Exact top-k over substring tables: the same answer as hamming_topk, without looking at every code.

Multi-index hashing (Norouzi, Punjani, Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012).
Codes of few bits get one table whose buckets are the codes themselves. Queries for which the tables would cost more
than the scan are given up early and scanned.
"""

import math
import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._tables import MAX_CODES, address, empty, native_kernels, scan_cost_of_one, spread
from cmr_fast.ops._tensors import MAX_K, Array, as_codes, as_integer, as_tensor, check_codes, like_input, neighbours
from cmr_fast.ops.hamming import _check_bits, hamming_distances, hamming_topk, pack_codes, unpack_codes

EFFORT = 0.05  # see SearchTables.search
_VAIN = 0.9  # expected share of the cost of scanning, above which tables are not tried
WORTH = 0.5  # share of the cost of scanning that tables must be expected to stay below
_MAX_KEY_BITS = 26
_BUCKET_BITS = 4  # a bucket holds up to about 2^4 different codes: reading them costs as much as finding them
MIN_CODES = 1 << 16  # below, a scan takes about as long as looking tables up
_SAMPLE = 32
_COUNTED = 1 << 15

Part = tuple[int, int]  # first bit, bits
Table = tuple[int, int, Tensor, Tensor | None, Tensor | None]  # of a substring: offsets, groups, words


class SearchTables:
    """Tables over a fixed set of packed codes; `SearchTables.build` makes them.

    They refer to the codes and do not copy them: the codes must not change. Beyond the codes they take `nbytes`
    bytes of memory. Searching is safe from many threads at once.

    Attributes
    ----------
    bits : int
        Code length.
    """

    def __init__(
        self,
        codes: Tensor,
        bits: int,
        order: Tensor,
        starts: Tensor | None,
        different: Tensor | None,
        tables: Sequence[Table],
    ) -> None:
        self.bits = bits
        self._codes, self._order, self._starts, self._different = codes, order, starts, different
        self._tables = tuple(tables)
        self._expected: dict[int, float] = {}

    @classmethod
    def build(
        cls, codes: Array, bits: int | None = None, *, substrings: int | None = None, threads: int | None = None
    ) -> "SearchTables":
        """Build the tables.

        Parameters
        ----------
        codes : Tensor or numpy.ndarray
            uint8 (N, nbytes) packed codes on the CPU, N < 2^31.
        bits : int, optional
            Code length where it is not 8 * nbytes.
        substrings : int, optional
            How many tables; by N and bits where nothing is said.
        threads : int, optional
            Default all processors of this process.

        Returns
        -------
        SearchTables
            Over these codes, which must not change.

        Raises
        ------
        InputError
            On codes of another kind, with bits set beyond `bits` or not on the CPU, and without the native kernels.
        """
        database, bits = _database(codes, bits)
        native, threads = native_kernels(), _dispatch.choose_threads(threads)
        n, nbytes = database.shape
        parts = _substrings(bits, n, substrings)
        order, entries = empty(n, torch.int32), empty(n * native.multi_index_entry_bytes, torch.uint8)
        different = None if len(parts) == 1 else empty(n * nbytes, torch.uint8)
        offsets = empty((1 << parts[0][1]) + 2, torch.int32)
        native.multi_index_order(
            database.data_ptr(), n, nbytes, bits, parts[0][1], threads, offsets.data_ptr(), entries.data_ptr(),
            order.data_ptr(), address(different),
        )  # fmt: skip
        if different is None:
            return cls(database, bits, order, None, None, [(0, bits, offsets, None, None)])
        starts = empty(n + 1, torch.int32)
        count = native.multi_index_groups(n, nbytes, different.data_ptr(), starts.data_ptr())
        tables: list[Table] = []
        for number, (first, length) in enumerate(parts):
            offsets = empty((1 << length) + 2, torch.int32)
            groups = empty(count, torch.int32) if number else None
            words = empty(count, torch.int64)
            native.multi_index_table(
                different.data_ptr(), count, nbytes, bits, first, length, threads, offsets.data_ptr(),
                entries.data_ptr(), address(groups), words.data_ptr(),
            )  # fmt: skip
            tables.append((first, length, offsets, groups, words))
        group_starts = None if count == n else empty(count + 1, torch.int32).copy_(starts[: count + 1])
        if bits <= 64:
            different = None
        elif count < n:
            different = empty(count * nbytes, torch.uint8).copy_(different[: count * nbytes])
        return cls(database, bits, order, group_starts, different, tables)

    def __len__(self) -> int:
        return len(self._codes)

    def __repr__(self) -> str:
        return f"SearchTables(bits={self.bits}, ntotal={len(self)}, tables={len(self._tables)}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Memory beyond the codes, in bytes."""
        parts = [self._order, self._starts, self._different, *(part for table in self._tables for part in table[2:])]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def search(
        self, q: Array, k: int, *, threads: int | None = None, effort: float | None = None
    ) -> tuple[Array, Array]:
        """Find the k nearest codes of every query: what hamming_topk(q, codes, k, bits=bits) returns, ties included.

        Parameters
        ----------
        q : Tensor or numpy.ndarray
            uint8 (Q, nbytes) packed codes on the CPU.
        k : int
            1 or more.
        threads : int, optional
            Default all processors of this process.
        effort : float, optional
            What queries may spend on the tables in vain, as a share of what scanning them costs: 0 only scans, infinity
            never gives up; default 0.05, or 0 where nothing is expected to be saved. The result does not depend on it.

        Returns
        -------
        distances : Tensor or numpy.ndarray
            int32 (Q, k).
        indices : Tensor or numpy.ndarray
            int64 (Q, k).

        Raises
        ------
        InputError
            On queries, k or an effort of another kind.
        """
        queries, _, was_numpy = as_codes(q, self._codes.numpy() if isinstance(q, np.ndarray) else self._codes)
        k = as_integer(k, "k", 1, MAX_K)
        check_stray(queries, self.bits, "q")
        if effort is None:
            effort = EFFORT if self.expected_cost(k) < _VAIN else 0.0
        if isinstance(effort, bool) or not isinstance(effort, numbers.Real) or not effort >= 0:  # infinity is one
            raise InputError(f"effort must be a number of 0 or more, got {effort!r}")
        if effort == 0:
            distances, indices = hamming_topk(queries, self._codes, k, bits=self.bits, threads=threads)
            return like_input(distances, was_numpy), like_input(indices, was_numpy)
        distances, indices, done, _ = self._search(queries, k, threads, effort)
        left = (~done).nonzero()[:, 0]
        if len(left) == len(queries):
            distances, indices = hamming_topk(queries, self._codes, k, bits=self.bits, threads=threads)
        elif len(left):
            distances[left], indices[left] = hamming_topk(
                queries[left], self._codes, k, bits=self.bits, threads=threads
            )
        return like_input(distances, was_numpy), like_input(indices, was_numpy)

    def expected_cost(self, k: int) -> float:
        """What searching a batch costs, as a share of scanning it, by the cost model on a sample of the codes.

        It assumes queries that are distributed as the codes are; where they are not, `search` gives up in time.

        Parameters
        ----------
        k : int
            Neighbours; rounded up to a power of two, and the answer for each of them kept.

        Returns
        -------
        float
            Below 1 where tables pay.
        """
        k = min(1 << (int(k) - 1).bit_length(), max(1, len(self)))
        if k not in self._expected:
            rows = spread(len(self), _SAMPLE)
            _, _, done, cost = self._search(self._codes[rows], min(k + 1, max(1, len(self))), 1, EFFORT)
            scan = scan_cost_of_one(len(self), self._codes.shape[1], len(rows), k)
            self._expected[k] = float((cost.sum() / scan + (~done).sum()) / len(rows)) if len(rows) else 1.0
        return self._expected[k]

    def worth_it(self, k: int) -> bool:
        """Whether searching for k neighbours by these tables is expected to cost less than half of scanning.

        Parameters
        ----------
        k : int
            Neighbours.

        Returns
        -------
        bool
            See `expected_cost`.
        """
        return self.expected_cost(k) < WORTH

    def _search(self, q: Tensor, k: int, threads: int | None, effort: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        native, isa, threads = native_kernels(), _dispatch.choose_isa(), _dispatch.choose_threads(threads)
        q = q.contiguous()
        distances, indices = neighbours(len(q), k, self.bits, "cpu", padded=True)
        done, cost = (
            torch.zeros(len(q), dtype=torch.bool, device="cpu"),
            torch.zeros(len(q), dtype=torch.float64, device="cpu"),
        )
        workspace = torch.empty(
            native.multi_index_workspace(len(self), len(q), k, threads), dtype=torch.uint8, device="cpu"
        )
        tables = [(first, length, *map(address, arrays)) for first, length, *arrays in self._tables]
        native.multi_index_search(
            isa, len(self), self._codes.shape[1], self.bits, self._order.data_ptr(), address(self._starts),
            address(self._different), tables, q.data_ptr(), len(q), k, threads, effort, distances.data_ptr(),
            indices.data_ptr(), done.data_ptr(), cost.data_ptr(), workspace.data_ptr(),
        )  # fmt: skip
        return distances, indices, done, cost


def available(codes: Array) -> bool:
    """Whether tables over these codes may pay: there are enough, and searches run on the native kernels.

    Parameters
    ----------
    codes : Tensor or numpy.ndarray
        uint8 (N, nbytes).

    Returns
    -------
    bool
        False for codes on a GPU.
    """
    on_cpu = not isinstance(codes, Tensor) or codes.device.type == "cpu"
    return on_cpu and MIN_CODES <= len(codes) <= MAX_CODES and _dispatch.choose_backend("hamming_topk", "cpu") == "cpp"


def scan_cost(n: int, nbytes: int, num_queries: int, k: int) -> float:
    """What hamming_topk costs for a batch, in the nanoseconds of the cost model: only ratios mean something.

    Parameters
    ----------
    n, nbytes : int
        Codes and bytes a code.
    num_queries, k : int
        Of the batch.

    Returns
    -------
    float
        For the whole batch.
    """
    return num_queries * scan_cost_of_one(n, nbytes, num_queries, k)


def num_tables(bits: int, n: int) -> int:
    """How many tables are built by default; one means that codes are looked up as a whole.

    Parameters
    ----------
    bits, n : int
        Of a code, and codes.

    Returns
    -------
    int
        1 or more.
    """
    return len(_substrings(bits, n, None))


def build_cost(n: int, bits: int) -> float:
    """What building tables costs, as `scan_cost` counts.

    Parameters
    ----------
    n, bits : int
        Codes, and bits of a code.

    Returns
    -------
    float
        In the nanoseconds of the cost model.
    """
    tables = num_tables(bits, n)
    return n * (5.0 if tables == 1 else 100.0 + 60.0 * tables)


def estimated_cost(codes: Array, bits: int, k: int, threads: int | None = None) -> float:
    """`SearchTables.expected_cost` before there are tables, at the price of scanning for a sample of the codes.

    The scan gives the distance that each search has to reach; how many codes the buckets on the way there hold, and
    how many of those the filter lets through, is counted among some of the codes. Equal codes are counted each, which
    tables would not: where codes repeat much the estimate is too high.

    Parameters
    ----------
    codes : Tensor or numpy.ndarray
        uint8 (N, nbytes) packed codes on the CPU.
    bits, k : int
        Of a code, and neighbours.
    threads : int, optional
        Default all processors of this process.

    Returns
    -------
    float
        A share of the cost of scanning.

    Raises
    ------
    InputError
        On codes of another kind.
    """
    database, bits = _database(codes, bits)
    n = len(database)
    if n == 0:
        return 1.0
    k = min(int(k), n)
    rows = spread(n, _SAMPLE)
    nearest, _ = hamming_topk(database[rows], database, min(k + 1, n), bits=bits, threads=threads)
    reach = nearest[:, -1:].long()
    drawn = torch.randint(
        n, (min(n, _COUNTED),), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.int64, device="cpu"
    )
    some = torch.from_numpy(np.unique(drawn.numpy()))
    queries, counted = unpack_codes(database[rows], bits), unpack_codes(database[some], bits)
    parts, scale = _substrings(bits, n, None), n / len(some)
    per_query, per_lookup, per_bucket, per_word, per_survivor = native_kernels().multi_index_costs()
    cost = torch.full((len(rows), 1), per_query, dtype=torch.float64, device="cpu")
    for number, (first, length) in enumerate(parts):
        here = torch.arange(first, first + length, dtype=torch.int64, device="cpu")
        window = (
            torch.arange(first - min(64, bits - length), first, dtype=torch.int64, device="cpu") % bits
            if bits > 64
            else torch.arange(bits, dtype=torch.int64, device="cpu")
        )
        apart = hamming_distances(pack_codes(queries[:, here]), pack_codes(counted[:, here]), threads=1)
        left = hamming_distances(pack_codes(queries[:, window]), pack_codes(counted[:, window]), threads=1)
        for radius in range(length + 1):
            reached = number + radius * len(parts) <= reach  # before the step that ends the search, or in it
            if not reached.any():
                break
            met = apart == radius
            words = met.sum(dim=1, keepdim=True) * scale
            buckets = math.comb(length, radius)
            full = torch.minimum(words, torch.tensor(buckets, dtype=torch.float64, device="cpu"))
            price = buckets * per_lookup + full * per_bucket
            if len(parts) > 1:
                near = left <= reach - (radius if bits > 64 else 0)
                price = price + words * per_word + (met & near).sum(dim=1, keepdim=True) * scale * per_survivor
            cost += torch.where(reached, price, 0.0)
    scan = scan_cost_of_one(n, database.shape[1], len(rows), k)
    return float((cost / scan).clamp(max=1 + EFFORT).mean())


def _database(codes: Array, bits: int | None) -> tuple[Tensor, int]:
    database, _ = as_tensor(codes, "codes")
    check_codes(database, "codes")
    if database.device.type != "cpu" or len(database) > MAX_CODES:
        raise InputError(f"codes must be on the CPU and fewer than 2^31, got {len(database)} on {database.device.type}")
    bits = _check_bits(bits, database.shape[1])
    check_stray(database, bits, "codes")
    return database.contiguous(), bits


def check_stray(codes: Tensor, bits: int, name: str) -> None:
    """InputError where packed codes (N, nbytes) have a bit set beyond `bits` in their last byte."""
    if bits % 8 and bool((codes[:, -1] >> bits % 8).any()):
        raise InputError(
            f"{name} must have no bits set beyond bit {bits}, got some: packed with another number of bits, or in "
            'big-endian order (numpy.packbits without bitorder="little")?'
        )


def _substrings(bits: int, n: int, count: int | None) -> list[Part]:
    """One substring where codes are few, else as many as make buckets of up to about 2^_BUCKET_BITS codes."""
    key_bits = math.log2(max(n, 2))
    if count is None:
        whole = bits <= max(16, min(key_bits + 1, _MAX_KEY_BITS))
        wanted = math.ceil(bits / max(8.0, min(key_bits - _BUCKET_BITS, _MAX_KEY_BITS - 2)))
        count = 1 if whole else max(2, wanted)
    least = -(-bits // _MAX_KEY_BITS)
    if not least <= count <= bits:
        raise InputError(f"codes of {bits} bits must be cut into {least} to {bits} substrings, got {count}")
    short, longer = divmod(bits, count)
    lengths = [short + 1] * longer + [short] * (count - longer)
    return [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]
