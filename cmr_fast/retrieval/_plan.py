"""How codes that do not change are searched: by the scan, and by tables once they pay."""

import threading

import numpy as np
import torch

from cmr_fast.ops import hamming_range, hamming_topk, multi_index, multi_index_range
from cmr_fast.ops._tensors import as_tensor
from cmr_fast.ops.multi_index import SearchTables
from cmr_fast.ops.multi_index_range import RangeTables, Sample, Split

Hits = tuple[np.ndarray, np.ndarray, np.ndarray]  # lims, distances, places


class SearchPlan:
    """Scans until scanning has cost as much as building tables would, then builds them if they pay for this k.

    The same for searches within a radius, whose tables are others: those for a larger radius serve a smaller one.

    So searching costs at most about twice what knowing the number of searches beforehand would have made it. Results
    are the same either way. While one thread builds, the others scan.
    """

    def __init__(self) -> None:
        self.tables: SearchTables | None = None
        self._scanned = 0.0
        self._hopeless: int | None = None  # the smallest k that tables were found not to pay for
        self.ranges: RangeTables | None = None
        self._ranged = 0.0
        self._split: Split | None = None  # of the tables to be built once that pays
        self._hopeless_radius: int | None = None  # the smallest that tables were found not to pay for
        self._building = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return sum(tables.nbytes for tables in (self.tables, self.ranges) if tables is not None)

    def topk(
        self, q: np.ndarray, codes: np.ndarray, k: int, bits: int, threads: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What hamming_topk(q, codes, k, bits=bits) returns; `codes` are the same in every call."""
        tables = self.tables_for(len(q), codes, k, bits, threads)
        if tables is not None:
            return tables.search(q, k, threads=threads)
        return hamming_topk(q, codes, k, bits=bits, threads=threads)

    def tables_for(
        self, num_queries: int, codes: np.ndarray, k: int, bits: int, threads: int | None
    ) -> SearchTables | None:
        """The tables that these queries are looked up in, perhaps built for them; None: they are to be scanned."""
        if self.tables is None and self._due(num_queries, codes, k, bits):
            self._build(codes, k, bits, threads)
        return self.tables if self.tables is not None and self.tables.worth_it(k) else None

    def _due(self, num_queries: int, codes: np.ndarray, k: int, bits: int) -> bool:
        if (self._hopeless is not None and k >= self._hopeless) or not multi_index.available(codes):
            return False
        self._scanned += multi_index.scan_cost(len(codes), codes.shape[1], num_queries, k)
        return self._scanned >= multi_index.build_cost(len(codes), bits)

    def _build(self, codes: np.ndarray, k: int, bits: int, threads: int | None) -> None:
        if not self._building.acquire(blocking=False):
            return
        try:
            if self.tables is None:
                single = multi_index.num_tables(bits, len(codes)) == 1  # built faster than estimated
                if single or multi_index.estimated_cost(codes, bits, k, threads) < multi_index.WORTH:
                    self.tables = SearchTables.build(codes, bits, threads=threads)
                else:
                    self._hopeless = k if self._hopeless is None else min(k, self._hopeless)
        finally:
            self._building.release()

    def range(
        self, q: np.ndarray, codes: np.ndarray, radius: int, threads: int | None, allowed: np.ndarray | None = None
    ) -> Hits | None:
        """What hamming_range(q, codes, radius) returns, of the codes where `allowed`; None: tables do not pay."""
        tables = self._range_tables(q, codes, radius, threads)
        if tables is None or (allowed is not None and tables.split.share > allowed.mean()):
            return None
        queries = as_tensor(q, "q")[0].contiguous()
        mask = None if allowed is None else torch.from_numpy(allowed)
        lims, distances, places = tables.range_search(queries, radius, threads, allowed=mask)
        return lims.numpy(), distances.numpy(), places.numpy()

    def _range_tables(self, q: np.ndarray, codes: np.ndarray, radius: int, threads: int | None) -> RangeTables | None:
        tables = self.ranges
        if tables is not None and radius <= tables.split.radius:
            return tables
        if self._hopeless_radius is not None and radius >= self._hopeless_radius:
            return None
        n, nbytes = codes.shape
        if not multi_index_range.available(as_tensor(codes, "codes")[0]):
            return None
        self._ranged += multi_index_range.scan_cost(n, nbytes, len(q)) if len(q) else 0
        if self._ranged < multi_index_range.least_cost(n) or not self._building.acquire(blocking=False):
            return None
        try:
            database, split = as_tensor(codes, "codes")[0], self._split
            if split is None or split.radius < radius:
                split = self._split = Sample(database).best(radius, multi_index_range.MEMORY)
            if split is None or split.share > multi_index_range.WORTH:
                self._hopeless_radius, self._split = radius, None
                return None
            if self._ranged < n * split.build_cost:
                return None
            self.ranges, self._ranged = RangeTables(database, split, threads), 0.0
            return self.ranges
        finally:
            self._building.release()


def scan_hits(q: np.ndarray, codes: np.ndarray, radius: int, threads: int | None, tables: bool) -> Hits:
    """hamming_range's triple, with tables that last for this call at most."""
    return hamming_range(q, codes, radius, tables=tables, threads=threads)


def nearest_of(hits: Hits, k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits within a radius -> the k nearest of each query, by (distance, place); bits + 1 and -1 pad."""
    lims, distances, places = hits
    count = len(lims) - 1
    query = np.repeat(np.arange(count), np.diff(lims))
    order = np.argsort(query * (bits + 2) + distances, kind="stable")  # places rise within a query
    rank = np.arange(len(order)) - lims[:-1][query]
    kept = rank < k
    out, named = np.full((count, k), bits + 1, np.int32), np.full((count, k), -1, np.int64)
    out[query[kept], rank[kept]] = distances[order[kept]]
    named[query[kept], rank[kept]] = places[order[kept]]
    return out, named
