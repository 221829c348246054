"""Near-duplicates: codes that a chain of small Hamming distances joins, and which of them to keep."""

import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from cmr_fast._files import StrPath, as_path, check_regular, named, write_aside
from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._tables import MAX_CODES, empty, native_kernels
from cmr_fast.ops._tensors import as_integer, as_tensor, check_codes, check_values, like_input
from cmr_fast.ops.hamming_pairs import bucket_join, join
from cmr_fast.ops.multi_index_range import BucketJoin
from cmr_fast.retrieval._checks import Array
from cmr_fast.retrieval._pieces import check_progress

Keep = Literal["first", "last"]

_EDGES = 1 << 22  # that are put together at once
_SAVED = 30.0  # seconds between two notes of how far it has come
_ROWS = 1 << 20
_TOGETHER = 1 << 21  # codes that are sorted together; of more, about an eighth at a time
_KEY_BITS = 20


class Duplicates(NamedTuple):
    """Groups of near-duplicates.

    Attributes
    ----------
    groups : ndarray or Tensor
        int64 (N,): the group of each code, numbered in the order of their first members.
    kept : ndarray or Tensor
        int64 (groups,): the row of each group that stays, rising.
    """

    groups: Any
    kept: Any


def near_duplicates(
    codes: Array,
    radius: int,
    keep: Keep = "first",
    *,
    threads: int | None = None,
    progress: Callable[[int], object] | None = None,
    state: StrPath | None = None,
) -> Duplicates:
    """Group codes that are near-duplicates of each other, and say which to keep.

    Two codes at distance <= radius are in one group, and so are those that a chain of such pairs joins (connected
    components): members of a group may be farther apart than the radius. Equal codes are put together first, so many
    copies of one code cost little.

    Parameters
    ----------
    codes : ndarray or Tensor
        uint8 (N, nbytes) packed codes, N < 2^31; they may be mapped from a file.
    radius : int
        0 or more, inclusive; 0: equal codes.
    keep : {"first", "last"}
        The row that stays of each group: the lowest or the highest.
    threads : int, optional
        Default all processors of this process. Results do not depend on it.
    progress : callable, optional
        Called with the number of rows done since the last call, 0 while equal codes are still put together.
    state : path, optional
        A file to note every half minute how far it has come, from which a later call of the same arguments goes on; it
        is left behind.

    Returns
    -------
    Duplicates
        groups and kept.

    Raises
    ------
    InputError
        On codes, a radius or `keep` of another kind, a state of other codes or another radius, and without scipy.
    """
    check_progress(progress)
    noted = None if state is None else as_path(state, "state")
    tensor, was_numpy = as_tensor(codes, "codes")
    check_codes(tensor, "codes")
    check_values(tensor, "codes")
    radius = min(as_integer(radius, "radius", 0), 8 * tensor.shape[1])
    if keep not in get_args(Keep):
        raise InputError(f"keep must be one of {', '.join(get_args(Keep))}, got {keep!r}")
    if len(tensor) > MAX_CODES:
        raise InputError(f"codes must be fewer than 2^31, got {len(tensor)}")
    _dispatch.how(None, threads)
    if radius:
        _check_scipy()
    done = progress or (lambda more: None)
    device, database = tensor.device, tensor.cpu().contiguous()
    leader = _leaders(database, _dispatch.choose_threads(threads), done)
    labels = leader if radius == 0 else _joined(database, leader, radius, threads, done, noted)
    if radius == 0:
        done(len(leader))
    del leader
    first = labels == np.arange(len(labels), dtype=np.int32)
    numbers = np.cumsum(first, dtype=np.int32)
    numbers -= 1
    kept = np.flatnonzero(first)
    groups = np.take(numbers, labels).astype(np.int64)
    if keep == "last":
        kept = np.empty_like(kept)
        kept[groups] = np.arange(len(labels))  # the last to be written stays
        kept.sort()
    return Duplicates(*(like_input(torch.from_numpy(x).to(device), was_numpy) for x in (groups, kept)))


def _check_scipy() -> None:
    """InputError where scipy is missing: now, and not after the first pairs."""
    try:
        import scipy.sparse.csgraph  # noqa: F401
    except ImportError as error:
        raise InputError('near_duplicates needs scipy: pip install "cmr-fast[train]"') from error


def _leaders(codes: torch.Tensor, threads: int, done: Callable[[int], object]) -> np.ndarray:
    """int32 (N,): the lowest row that holds an equal code; `done` is told 0 rows now and then, so that it can speak."""
    n = len(codes)
    if _dispatch.choose_backend("hamming_topk", "cpu") != "cpp":
        _, first, of = np.unique(codes.numpy(), axis=0, return_index=True, return_inverse=True)
        return first[of.reshape(-1)].astype(np.int32)
    if n <= _TOGETHER:
        return _leaders_of_few(codes, threads)
    heap, out = np.empty(n, np.uint8), np.empty(n, np.int32)
    for start in range(0, n, _ROWS):
        sums = codes[start : start + _ROWS].numpy().sum(axis=1, dtype=np.uint8)
        heap[start : start + _ROWS] = sums * np.uint8(157) >> 5
    for number in range(8):  # equal codes are in one heap
        done(0)
        rows = np.flatnonzero(heap == number).astype(np.int32)
        if len(rows):
            out[rows] = rows[_leaders_of_few(codes[torch.from_numpy(rows)], threads)]
    return out


def _leaders_of_few(codes: torch.Tensor, threads: int) -> np.ndarray:
    """`_leaders` by sorting, in 24 bytes a code."""
    n, nbytes = codes.shape
    native, bits, out = native_kernels(), 8 * nbytes, np.empty(n, np.int32)
    order, entries = empty(n, torch.int32), empty(n * native.multi_index_entry_bytes, torch.uint8)
    key_bits = min(bits, _KEY_BITS)
    offsets = empty((1 << key_bits) + 2, torch.int32)
    native.multi_index_order(
        codes.data_ptr(), n, nbytes, bits, key_bits, threads, offsets.data_ptr(), entries.data_ptr(),
        order.data_ptr(), 0,
    )  # fmt: skip
    rows, last = order.numpy(), -1
    for start in range(0, n, _ROWS):  # equal codes lie side by side in `rows`, the lowest first
        block = rows[start : start + _ROWS]
        here = codes[torch.from_numpy(block).long()].numpy()
        new = np.ones(len(block), dtype=bool)
        new[1:] = (here[1:] != here[:-1]).any(axis=1)
        if start:
            new[0] = bool((here[0] != codes[int(rows[start - 1])].numpy()).any())
        begins = np.where(new, np.arange(len(block)), -1)
        at = np.maximum.accumulate(begins)
        leaders = np.where(at >= 0, block[at], last)
        out[block] = leaders
        last = int(leaders[-1])
    return out


def _joined(
    codes: torch.Tensor,
    leader: np.ndarray,
    radius: int,
    threads: int | None,
    done: Callable[[int], object],
    state: Path | None,
) -> np.ndarray:
    """int32 (N,): the lowest row of each code's component."""
    buckets = bucket_join(codes, radius)
    components, start = _Components(len(leader)), 0
    stamp = None if state is None else _stamp(codes, radius, buckets)
    if state is not None and stamp is not None and state.exists():
        components.parents, start = _read_state(state, stamp)
        done(start if buckets is None else start // (radius + 1))
    among = torch.from_numpy(leader == np.arange(len(leader), dtype=np.int32))
    noted = time.monotonic()
    for at, rows, a, b in _edges(codes, radius, buckets, threads, among, start):
        components.add(a, b)
        done(rows)
        if state is not None and stamp is not None and time.monotonic() - noted >= _SAVED:
            components.merge()
            _write_state(state, stamp, components.parents, at)
            noted = time.monotonic()
    del buckets, among
    components.merge()
    return components.lowest(leader)


def _edges(
    codes: torch.Tensor,
    radius: int,
    buckets: BucketJoin | None,
    threads: int | None,
    among: torch.Tensor,
    start: int,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """How far it has come and by how many rows, and the pairs found on the way: bucket by bucket, or row by row."""
    if buckets is None:
        for first, lims, _, indices in join(codes, codes, radius, True, start=start, threads=threads, among=among):
            counts = lims.diff().numpy()
            rows = np.repeat(first + np.arange(len(counts)), counts)
            yield first + len(counts), len(counts), rows, indices.numpy()
        return
    before = start // (radius + 1)
    for at, keys, _ in buckets.pairs(radius, threads, allowed=among, start=start):
        yield at, at // (radius + 1) - before, (keys >> 32).numpy(), (keys & 0xFFFFFFFF).numpy()
        before = at // (radius + 1)


class _Components:
    """Connected components of rows 0 .. n - 1 whose edges come in pieces.

    `parents` are lower rows of the same component, or the row itself where it is the lowest.
    """

    def __init__(self, n: int) -> None:
        self.parents = np.arange(n, dtype=np.int32)
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        self._edges.append((a.astype(np.int32), b.astype(np.int32)))
        self._count += len(a)
        if self._count >= _EDGES:
            self.merge()

    def merge(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if self._count == 0:
            return
        ends = np.concatenate([end for side in zip(*self._edges, strict=True) for end in side])
        self._edges = []
        nodes, at = np.unique(self.lowest(ends), return_inverse=True)
        edges = (at[: self._count].astype(np.int32), at[self._count :].astype(np.int32))
        graph = coo_array((np.ones(self._count, np.uint8), edges), shape=(len(nodes), len(nodes)))
        count, component = connected_components(graph, directed=False)
        first = np.empty(count, np.int32)
        first[component[::-1]] = nodes[::-1]  # the last to be written stays
        self.parents[nodes] = first[component]
        self._count = 0

    def lowest(self, rows: np.ndarray) -> np.ndarray:
        """The lowest row of the component of each."""
        above = self.parents[rows]
        while not np.array_equal(above, rows):
            rows, above = above, self.parents[above]
        return np.asarray(rows)


def _stamp(codes: torch.Tensor, radius: int, buckets: BucketJoin | None) -> np.ndarray:
    """int64: what a state belongs to."""
    order, check = 0 if buckets is None else 1 + zlib.crc32(buckets.split.masks.data), 0  # of what is done first
    for start in range(0, len(codes), _ROWS):
        check = zlib.crc32(codes[start : start + _ROWS].numpy().data, check)
    return np.array([*codes.shape, radius, order, check], dtype=np.int64)


def _write_state(path: Path, stamp: np.ndarray, parents: np.ndarray, at: int) -> None:
    with write_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, stamp=stamp, parents=parents, at=np.int64(at))


def _read_state(path: Path, stamp: np.ndarray) -> tuple[np.ndarray, int]:
    check_regular(path, "state")
    with named(path), open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as state:
                seen, parents, at = state["stamp"], state["parents"], int(state["at"])
        # what numpy and zipfile make of a damaged one, which is also taken for encrypted, or for an array
        except (ValueError, KeyError, EOFError, TypeError, OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path}: not the state of an earlier run, or damaged: remove it to begin again"
            ) from error
    if not np.array_equal(seen, stamp) or parents.shape != (stamp[0],):
        raise InputError(f"{path}: the state of a run over other codes or another radius: remove it to begin again")
    return parents, at
