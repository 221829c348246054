"""A search over the parts of an index: how each is searched, and what they found put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmr_fast.ops import _dispatch, hamming_topk, multi_index
from cmr_fast.ops._tensors import MAX_K, neighbour_arrays
from cmr_fast.ops.hamming import LITTLE, plain, topk_of_arrays
from cmr_fast.retrieval._plan import Hits, SearchPlan, nearest_of, scan_hits
from cmr_fast.retrieval._segments import Part, is_mapped
from cmr_fast.retrieval._where import Rows, as_mask, chosen, count_of

_STRETCH = 1 << 28  # bytes of codes that are read from a file for all queries, who scan them in groups


@dataclass(frozen=True)
class Searched:
    """A part, the rows of it that count (None: all), and how it is searched (None: by the scan)."""

    part: Part
    rows: Rows | None
    plan: SearchPlan | None

    def subsets(self) -> list[Part]:
        """The rows that count, as parts."""
        return [self.part] if self.rows is None else list(chosen(self.part, self.rows))

    def nearest(
        self, q: np.ndarray, k: int, radius: int | None, bits: int, threads: int | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Distances and ids (Q, up to k) of the k nearest, of one subset after the other.

        radius    beyond it distances are bits + 1 and ids -1
        """
        if radius is not None and (hits := self._by_tables(q, radius, threads)) is not None:
            return [nearest_of(hits, min(k, len(self.part)), bits)]
        out = []
        for part in self.subsets() if self.rows is not None else _stretches(self.part, len(q) * k):
            kept = min(k, len(part))
            if self.plan is not None and self.rows is None:
                near, places = self.plan.topk(q, part.codes, kept, bits, threads)
            else:
                near, places = hamming_topk(q, part.codes, kept, bits=bits, threads=threads)
            ids = part.ids_of(places)
            if radius is not None:
                ids, near = np.where(near > radius, -1, ids), np.where(near > radius, bits + 1, near).astype(np.int32)
            out.append((near, ids))
        return out

    def within(self, q: np.ndarray, radius: int, threads: int | None) -> list[Hits]:
        """lims, distances and ids of everything at distance <= radius, of one subset after the other."""
        if (hits := self._by_tables(q, radius, threads)) is not None:
            return [hits]
        out = []
        for part in self.subsets():
            lims, distances, places = scan_hits(q, part.codes, radius, threads, self.plan is not None)
            out.append((lims, distances, part.ids_of(places)))
        return out

    def _by_tables(self, q: np.ndarray, radius: int, threads: int | None) -> Hits | None:
        if self.plan is None:
            return None
        part, allowed = self.part, None
        if self.rows is not None:
            if count_of(self.rows) * 2 < len(part):
                return None
            allowed = as_mask(self.rows, len(part))
        hits = self.plan.range(q, part.codes, radius, threads, allowed)
        return None if hits is None else (hits[0], hits[1], part.ids_of(hits[2]))


def _stretches(part: Part, results: int) -> list[Part]:
    """A part that is mapped, cut up so that its file is read once however many queries there are.

    results    numbers that each stretch gives: beyond what a stretch takes itself, the part stays whole
    """
    step = max(1, _STRETCH // part.codes.shape[1])
    if len(part) <= step or not is_mapped(part.codes) or 12 * results * (len(part) // step + 1) > _STRETCH:
        return [part]
    starts = range(0, len(part), step)
    return [Part(part.codes[start : start + step], part.ids[start : start + step]) for start in starts]


def nearest_at_once(
    parts: Sequence[Part], q: Any, k: object, bits: int, threads: object
) -> tuple[np.ndarray, np.ndarray] | None:
    """What a small search finds where one call of the native scan is all there is to do.

    None: it is a larger one, or something about it has to be looked at, be it to say what is wrong.
    """
    if len(parts) != 1 or bits % 8 or type(k) is not int or not 1 <= k <= MAX_K:
        return None
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _dispatch.MAX_THREADS):
        return None
    part = parts[0].sound()
    codes = part.codes
    size = len(codes)
    if not plain(q, codes) or size >= multi_index.MIN_CODES or len(q) * size > LITTLE:
        return None
    if not (isa := _dispatch.isa_of_arrays("hamming_topk", None)):
        return None
    distances, places = topk_of_arrays(isa, q, codes, k, bits, threads)
    if k <= size:
        return distances, part.ids_of(places)
    places[:, :size] = part.ids_of(places[:, :size])
    return distances, places


def nearest_of_all(
    found: Sequence[tuple[np.ndarray, np.ndarray]], count: int, k: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `count` queries among what several parts hold; equal distances in the parts' order."""
    if len(found) == 1 and found[0][1].shape[1] == k:
        return found[0]
    every = np.concatenate([np.empty((count, 0), dtype=np.int32), *(near for near, _ in found)], axis=1)
    names = np.concatenate([np.empty((count, 0), dtype=np.int64), *(ids for _, ids in found)], axis=1)
    best = np.argsort(every, axis=1, kind="stable")[:, :k]
    out, named = neighbour_arrays(count, k, bits, padded=k > best.shape[1])
    out[:, : best.shape[1]] = np.take_along_axis(every, best, axis=1)
    named[:, : best.shape[1]] = np.take_along_axis(names, best, axis=1)
    return out, named


def hits_of_all(found: Sequence[Hits], count: int) -> Hits:
    """The hits of `count` queries in several parts, query by query, in the order of the parts."""
    if len(found) == 1:
        return found[0]
    if not found:
        return np.zeros(count + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.int64)
    queries = np.concatenate([np.repeat(np.arange(count), np.diff(lims)) for lims, _, _ in found])
    order = np.argsort(queries, kind="stable")
    lims = np.sum([lims for lims, _, _ in found], axis=0)
    distances, ids = (np.concatenate([each[i] for each in found])[order] for i in (1, 2))
    return lims, distances, ids
