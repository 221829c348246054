"""Everything within a radius that is known beforehand, by tables of substrings: what the scan finds, in its order.

A code within the radius agrees with the query, but for few bits, in one of several substrings (the pigeonhole
principle; Norouzi, Punjani, Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012, section 2): see
csrc/cpu/multi_index_range.h. Bits are dealt out to the substrings so that each gets sure and unsure ones, and how many
substrings there are is chosen on a sample of the codes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmr_fast.ops import _dispatch
from cmr_fast.ops._tables import MAX_CODES, address, empty, native_kernels, scan_cost_of_one, spread
from cmr_fast.ops._tensors import hits_room

Hits = tuple[Tensor, Tensor, Tensor]  # lims, distances, indices
Table = tuple[Tensor, Tensor, Tensor, Tensor]  # mask, places of its bits, offsets of the buckets, codes in their order
Addresses = tuple[int, int, int, int, int]

EFFORT = 0.05  # what queries may spend on the tables in vain, as a share of what scanning them costs
WORTH = 0.5  # share of the cost of scanning that tables must be expected to stay below
MEMORY = 1.5  # bytes of tables, for each byte of codes
JOIN_MEMORY = 5.0  # of those that a join makes
MIN_CODES = 1 << 12
_MAX_TABLES = 128
_BUCKET = 4  # codes of a bucket, from so many to twice as many
_SAMPLE, _COUNTED = 64, 1 << 13
_BUILDING, _SAMPLING = 60.0, 2e7  # cost of a table for each code, and of choosing
_PER_SLOT, _PER_PAIR = 20.0, 15.0  # costs of a join, in the nanoseconds of the cost model
_FIRST_SLOTS, _PAIRS = 1 << 12, 1 << 23  # of a join: slots read at first, and pairs that are found together, about
_TOGETHER = 1 << 16  # queries that are searched before their hits are collected


@dataclass(frozen=True, eq=False)
class Split:
    """How codes are cut.

    Attributes
    ----------
    masks : ndarray
        uint8 (tables, nbytes): the bits of each substring.
    radius : int
        For which this was chosen.
    share : float
        What searching is expected to cost, as a share of scanning.
    """

    masks: np.ndarray
    radius: int
    share: float

    @property
    def build_cost(self) -> float:
        """In the nanoseconds of the cost model, for each code."""
        return _BUILDING * len(self.masks)


class Sample:
    """Some codes, and some queries, on which what tables would cost is counted.

    Parameters
    ----------
    codes : Tensor
        uint8 (N, nbytes) on the CPU.
    q : Tensor, optional
        uint8 (Q, nbytes); None: queries are like the codes.
    """

    def __init__(self, codes: Tensor, q: Tensor | None = None) -> None:
        self.n, self.nbytes = codes.shape
        drawn = np.random.default_rng(0).integers(0, max(1, self.n), min(self.n, _COUNTED))
        asked = spread(self.n if q is None else len(q), _SAMPLE)
        self.queries = (codes if q is None else q)[asked].numpy()
        self.counted = codes[torch.from_numpy(np.setdiff1d(drawn, asked.numpy()) if q is None else drawn)].numpy()
        batch = _SAMPLE if q is None else max(1, len(q))
        self.scan = scan_cost(self.n, self.nbytes, batch) / batch

    def masks(self, count: int) -> np.ndarray:
        """uint8 (count, nbytes): every bit in one substring, the most uncertain ones dealt out first."""
        bits = 8 * self.nbytes
        ones = np.unpackbits(self.counted, axis=1, bitorder="little").sum(axis=0) / max(1, len(self.counted))
        order = np.argsort(-np.round(ones * (1 - ones), 2), kind="stable")
        turn = np.arange(bits) % (2 * count)
        owner = np.empty(bits, np.int64)
        owner[order] = np.where(turn < count, turn, 2 * count - 1 - turn)
        return np.packbits(owner == np.arange(count)[:, None], axis=1, bitorder="little")

    def expected_share(self, masks: np.ndarray, reach: Sequence[int]) -> float:
        """What searching costs by these tables, as a share of scanning; infinity where that is not to be counted."""
        per_query, per_probe, per_code = native_kernels().range_costs()
        cost = per_query + per_probe * sum(map(_probes, masks, reach))
        if cost >= self.scan:
            return math.inf
        found = self._met(masks, reach)
        return float(np.minimum((cost + per_code * found) / self.scan, 1 + EFFORT).mean()) if len(found) else 1.0

    def for_pairs(self, radius: int, memory: float) -> Split | None:
        """The split for a BucketJoin; None: one of its tables takes more than `memory`."""
        count = radius + 1
        if count > min(8 * self.nbytes, _MAX_TABLES) or self._room(memory) < 1:
            return None
        masks = self.masks(count)
        met = self._met(masks, [0] * count)
        cost = _PER_SLOT * count + _PER_PAIR / 2 * (float(met.mean()) if len(met) else 0.0)
        return Split(masks, radius, cost / self.scan)

    def _met(self, masks: np.ndarray, reach: Sequence[int]) -> np.ndarray:
        """How many codes each query is expected to meet in the tables."""
        met = np.zeros(len(self.queries))
        for mask, flips in zip(masks, reach, strict=True):
            if flips >= 0:
                met += (_distances(self.queries & mask, self.counted & mask) <= flips).sum(axis=1)
        return met * (self.n / max(1, len(self.counted)))

    def _room(self, memory: float) -> int:
        """How many tables take at most `memory` bytes for each byte of codes."""
        return int(memory * self.n * self.nbytes / (4 * (self.n + 1 + (1 << _bucket_bits(self.n)))))

    def best(self, radius: int, memory: float) -> Split | None:
        """The split that costs least, with tables of `memory` bytes at most for each byte of codes; None: the scan."""
        per_query, per_probe, _ = native_kernels().range_costs()
        best: Split | None = None
        for count in range(max(1, min(radius + 1, self._room(memory), 8 * self.nbytes, _MAX_TABLES)), 0, -1):
            masks, reach = self.masks(count), reaches(radius, count)
            least = (per_query + per_probe * sum(map(_probes, masks, reach))) / self.scan
            if max(reach) > native_kernels().range_max_reach or (best and least >= best.share) or least >= 1:
                break  # fewer tables ask for still more look-ups
            share = self.expected_share(masks, reach)
            if best is None or share < best.share:
                best = Split(masks, radius, share)
        return best


class RangeTables:
    """Tables over packed codes on the CPU, which must not change, for searches within a radius.

    Searching is safe from many threads at once.

    Parameters
    ----------
    codes : Tensor
        uint8 (N, nbytes), contiguous.
    split : Split
        How they are cut.
    threads : int, optional
        Default all processors of this process.
    """

    def __init__(self, codes: Tensor, split: Split, threads: int | None = None) -> None:
        self.split = split
        self._codes = codes
        spare = _spare(codes)
        self._tables = [_table(codes, part, spare, _dispatch.choose_threads(threads)) for part in _substrings(split)]

    @property
    def nbytes(self) -> int:
        """Memory beyond the codes, in bytes."""
        return sum(part.numel() * part.element_size() for table in self._tables for part in table)

    def range_search(
        self,
        q: Tensor,
        radius: int,
        threads: int | None = None,
        *,
        allowed: Tensor | None = None,
        after: int | None = None,
        asked: Tensor | None = None,
        effort: float = EFFORT,
    ) -> Hits:
        """Every code at distance <= radius of each query, as hamming_range returns it.

        Parameters
        ----------
        q : Tensor
            uint8 (Q, nbytes), contiguous, on the CPU.
        radius : int
            0 or more; costs least where it is that of the split.
        threads : int, optional
            Default all processors of this process.
        allowed : Tensor, optional
            bool (N,): the codes that count.
        after : int, optional
            Of query i only codes beyond after + i count.
        asked : Tensor, optional
            bool (Q,): the queries that are searched; the others find nothing.
        effort : float, optional
            What queries may spend in vain, as a share of what scanning them costs; those are scanned. The result does
            not depend on it.

        Returns
        -------
        lims : Tensor
            int64 (Q + 1,).
        distances : Tensor
            int32 (T,).
        indices : Tensor
            int64 (T,).
        """
        bitmap = None if allowed is None else _bitmap(allowed)
        blocks = []
        for start in range(0, len(q), _TOGETHER):
            block = slice(start, min(start + _TOGETHER, len(q)))
            first, wanted = -1 if after is None else after + start, None if asked is None else asked[block]
            blocks.append(self._block(q[block], radius, threads, allowed, bitmap, first, wanted, effort))
        return blocks[0] if len(blocks) == 1 else joined(blocks)

    def _block(
        self,
        q: Tensor,
        radius: int,
        threads: int | None,
        allowed: Tensor | None,
        bitmap: Tensor | None,
        after: int,
        asked: Tensor | None,
        effort: float,
    ) -> Hits:
        native, isa, threads = native_kernels(), _dispatch.choose_isa(), _dispatch.choose_threads(threads)
        n, nbytes = self._codes.shape
        reach = torch.tensor(reaches(radius, len(self._tables)), dtype=torch.int8, device="cpu")
        index, tables = _index(self._codes), [_addresses(*table) for table in self._tables]
        search = (q.data_ptr(), len(q), radius, reach.data_ptr(), address(bitmap), after, threads)
        counts = torch.zeros(len(q), dtype=torch.int64, device="cpu")
        wanted = torch.ones(len(q), dtype=torch.bool, device="cpu") if asked is None else asked
        done = wanted.clone() if int(reach.max()) <= native.range_max_reach else torch.zeros_like(wanted)
        workspace = torch.empty(native.range_workspace(len(q)), dtype=torch.uint8, device="cpu")
        scan = scan_cost(n, nbytes, len(q)) / len(q)
        native.range_count(
            isa, index, tables, search, effort, scan, counts.data_ptr(), done.data_ptr(), workspace.data_ptr()
        )
        left = (wanted & ~done).nonzero()[:, 0]
        if len(left):
            near, apart, places = kept(
                scan_range(q[left], self._codes, radius, threads), allowed, None if after < 0 else left + after
            )
            counts[left] = near.diff()
        lims = torch.zeros(len(q) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts, 0, out=lims[1:])
        total = int(lims[-1])
        distances, indices = hits_room(total, "cpu")
        native.range_fill(
            isa, index, tables, search, lims.data_ptr(), done.data_ptr(), distances.data_ptr(), indices.data_ptr(),
            workspace.data_ptr(),
        )  # fmt: skip
        if len(left):
            to = torch.arange(len(apart), dtype=torch.int64, device="cpu") + torch.repeat_interleave(
                lims[left] - near[:-1], near.diff()
            )
            distances[to], indices[to] = apart, places
        return lims, distances, indices


class BucketJoin:
    """A join of packed codes with themselves that reads each bucket of each table once, a table after the other.

    Parameters
    ----------
    codes : Tensor
        uint8 (N, nbytes), contiguous, on the CPU.
    split : Split
        How they are cut.
    """

    def __init__(self, codes: Tensor, split: Split) -> None:
        self.split = split
        self._codes = codes

    def pairs(
        self, radius: int, threads: int | None = None, *, allowed: Tensor | None = None, start: int = 0
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every pair of codes at distance <= radius, once, bucket by bucket.

        Parameters
        ----------
        radius : int
            Below the number of substrings, so that a pair agrees in one of them.
        threads : int, optional
            Default all processors of this process.
        allowed : Tensor, optional
            bool (N,): the codes that count.
        start : int, optional
            Where to go on: what an earlier call gave last.

        Yields
        ------
        at : int
            How far it has come, of N for each of radius + 1 tables.
        keys : Tensor
            int64 (T,), lower index << 32 | higher index, in no order that matters.
        distances : Tensor
            int32 (T,).
        """
        native, isa, threads = native_kernels(), _dispatch.choose_isa(), _dispatch.choose_threads(threads)
        n, bitmap = len(self._codes), None if allowed is None else _bitmap(allowed)
        index, substrings = _index(self._codes), _substrings(self.split)
        at, step, tasks, room = start, _FIRST_SLOTS, 4 * threads if threads > 1 else 1, _FIRST_SLOTS
        counts = torch.zeros(tasks, dtype=torch.int64, device="cpu")
        built = None
        while at < n * (radius + 1):
            table, first = divmod(at, n)
            if built != table:
                held = None  # one table at a time; of the others, only the masks are read
                held, built = _table(self._codes, substrings[table], _spare(self._codes), threads), table
                tables = [_addresses(*(held if i == table else part)) for i, part in enumerate(substrings)]
            last = min(n, first + step)
            job = (table, first, last, radius, address(bitmap), tasks, threads)
            while True:
                keys = torch.empty(tasks * room, dtype=torch.int64, device="cpu")
                near = torch.empty(tasks * room, dtype=torch.int32, device="cpu")
                native.range_pairs(isa, index, tables, job, keys.data_ptr(), near.data_ptr(), room, counts.data_ptr())
                most, total = int(counts.max()), int(counts.sum())
                if most <= room:
                    break
                room = most
            parts = [slice(t * room, t * room + int(count)) for t, count in enumerate(counts)]
            at += last - first
            yield at, torch.cat([keys[part] for part in parts]), torch.cat([near[part] for part in parts])
            step = max(1, min(4 * step, _PAIRS * (last - first) // max(1, total)))
            room = max(_FIRST_SLOTS, min(room, _PAIRS))


def reaches(radius: int, count: int) -> list[int]:
    """How many bits may differ in each of `count` substrings, adding up to radius - count + 1; -1: it is not asked."""
    short, longer = divmod(radius - count + 1, count)  # 0 and above from radius = count - 1 on
    if short < 0:
        return [0] * (radius + 1) + [-1] * (count - radius - 1)
    return [short] * (count - longer) + [short + 1] * longer


def scan_range(q: Tensor, db: Tensor, radius: int, threads: int | None) -> Hits:
    """The scan's native kernels."""
    native, isa = native_kernels(), _dispatch.choose_isa()
    shape = (len(q), len(db), db.shape[1], radius, _dispatch.choose_threads(threads))
    splits = native.hamming_range_splits(*shape)
    offsets = torch.zeros(len(q) * splits + 1, dtype=torch.int64, device="cpu")
    workspace = torch.empty(native.hamming_range_workspace(isa, *shape), dtype=torch.uint8, device="cpu")
    native.hamming_range_count(isa, q.data_ptr(), db.data_ptr(), *shape, offsets.data_ptr(), workspace.data_ptr())
    torch.cumsum(offsets, 0, out=offsets)
    total = int(offsets[-1])
    distances, indices = hits_room(total, "cpu")
    native.hamming_range_fill(
        isa, q.data_ptr(), db.data_ptr(), *shape, offsets.data_ptr(), distances.data_ptr(), indices.data_ptr(),
        workspace.data_ptr(),
    )  # fmt: skip
    return offsets[::splits].clone(), distances, indices


def available(codes: Tensor) -> bool:
    """Whether tables over these codes may pay: there are enough, and searches run on the native kernels.

    Parameters
    ----------
    codes : Tensor
        uint8 (N, nbytes).

    Returns
    -------
    bool
        False for codes on a GPU.
    """
    if codes.device.type != "cpu" or not MIN_CODES <= len(codes) <= MAX_CODES:
        return False
    return _dispatch.choose_backend("hamming_range", "cpu") == "cpp"


def scan_cost(n: int, nbytes: int, num_queries: int) -> float:
    """What a range search costs that scans, for all queries, in the nanoseconds of the cost model.

    Parameters
    ----------
    n, nbytes : int
        Codes and bytes a code.
    num_queries : int
        Of the batch.

    Returns
    -------
    float
        Codes are compared twice: to count the hits, and to write them.
    """
    return 2 * num_queries * scan_cost_of_one(n, nbytes, num_queries, 1)


def least_cost(n: int) -> float:
    """What choosing and building tables costs at least, in the nanoseconds of the cost model.

    Parameters
    ----------
    n : int
        Codes.

    Returns
    -------
    float
        For one table.
    """
    return n * _BUILDING + _SAMPLING


def tables_for(q: Tensor, db: Tensor, radius: int, threads: int | None) -> RangeTables | None:
    """Tables for one call, where making and asking them is expected to cost less than half of scanning.

    Parameters
    ----------
    q, db : Tensor
        uint8 (Q, nbytes) and (N, nbytes), contiguous, on the CPU.
    radius : int
        Of the search.
    threads : int, optional
        Default all processors of this process.

    Returns
    -------
    RangeTables or None
        None: scan.
    """
    n, nbytes = db.shape
    if not MIN_CODES <= n <= MAX_CODES or len(q) == 0:
        return None
    scan = scan_cost(n, nbytes, len(q))
    if scan * WORTH < least_cost(n):
        return None
    split = Sample(db, q).best(radius, MEMORY)
    if split is None or split.share + n * split.build_cost / scan > WORTH:
        return None
    return RangeTables(db, split, threads)


def joined(blocks: Sequence[Hits]) -> Hits:
    """The hits of queries that were searched one block after the other."""
    if not blocks:
        none = torch.zeros(1, dtype=torch.int64, device="cpu")
        return none, none[:0].int(), none[:0]
    starts = np.cumsum([0, *(int(lims[-1]) for lims, _, _ in blocks)])
    lims = [lims[:-1] + int(start) for (lims, _, _), start in zip(blocks, starts, strict=False)]
    return (
        torch.cat([*lims, torch.from_numpy(starts[-1:])]),
        torch.cat([distances for _, distances, _ in blocks]),
        torch.cat([indices for _, _, indices in blocks]),
    )


def kept(hits: Hits, allowed: Tensor | None, after: Tensor | None) -> Hits:
    """The hits among the codes that count: bool (N,), and of query i those beyond after[i]; on any device."""
    lims, distances, indices = hits
    if allowed is None and after is None:
        return hits
    query = torch.repeat_interleave(torch.arange(len(lims) - 1, dtype=torch.int64, device=lims.device), lims.diff())
    keep = torch.ones(len(indices), dtype=torch.bool, device=lims.device) if allowed is None else allowed[indices]
    if after is not None:
        keep &= indices > after[query]
    counts = torch.bincount(query[keep], minlength=len(lims) - 1)
    return torch.cat([lims[:1], counts.cumsum(0)]), distances[keep], indices[keep]


def _bitmap(allowed: Tensor) -> Tensor:
    packed = np.packbits(allowed.numpy(), bitorder="little")
    return torch.from_numpy(np.concatenate([packed, np.zeros(-len(packed) % 4, np.uint8)]))


def _substrings(split: Split) -> list[tuple[Tensor, Tensor]]:
    """The mask of each substring in 64-bit words, and the places of its bits."""
    count, nbytes = split.masks.shape
    words = np.zeros((count, -(-nbytes // 8) * 8), np.uint8)
    words[:, :nbytes] = split.masks
    bits = (np.flatnonzero(np.unpackbits(row, bitorder="little")).astype(np.int16) for row in words)
    return [
        (torch.from_numpy(row.view(np.int64)), torch.from_numpy(places))
        for row, places in zip(words, bits, strict=True)
    ]


def _spare(codes: Tensor) -> Tensor:
    """Room for building a table."""
    return empty(len(codes) * native_kernels().range_slot_bytes, torch.uint8)


def _table(codes: Tensor, part: tuple[Tensor, Tensor], spare: Tensor, threads: int) -> Table:
    """The table of one substring: where its buckets begin, and the codes in their order."""
    (mask, places), (n, nbytes) = part, codes.shape
    offsets, slots = empty((1 << _bucket_bits(n)) + 1, torch.int32), empty(n, torch.int32)
    native_kernels().range_table(
        codes.data_ptr(), n, nbytes, mask.data_ptr(), _bucket_bits(n), _index_bits(n), threads,
        offsets.data_ptr(), spare.data_ptr(), slots.data_ptr(),
    )  # fmt: skip
    return mask, places, offsets, slots


def _index(codes: Tensor) -> tuple[int, ...]:
    """What native kernels take as an index."""
    return (codes.data_ptr(), *codes.shape, _bucket_bits(len(codes)), _index_bits(len(codes)))


def _addresses(mask: Tensor, places: Tensor, offsets: Tensor | None = None, slots: Tensor | None = None) -> Addresses:
    """What they take as a table."""
    return mask.data_ptr(), places.data_ptr(), len(places), address(offsets), address(slots)


def _index_bits(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _bucket_bits(n: int) -> int:
    return max(1, (max(1, n) // _BUCKET).bit_length() - 1)


def _probes(mask: np.ndarray, reach: int) -> int:
    bits = int(np.unpackbits(mask).sum())
    return sum(math.comb(bits, flips) for flips in range(reach + 1))


def _distances(q: np.ndarray, db: np.ndarray) -> np.ndarray:
    out = np.empty((len(q), len(db)), np.int32)
    native_kernels().hamming_distances(
        _dispatch.choose_isa(), q.ctypes.data, db.ctypes.data, len(q), len(db), q.shape[1], 1, out.ctypes.data
    )
    return out
