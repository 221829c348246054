"""How codes that do not change are searched: by the scan, and by tables once they pay."""

import threading

import numpy as np

from cmr_fast.ops import hamming_topk, multi_index
from cmr_fast.ops.multi_index import SearchTables


class SearchPlan:
    """Scans until scanning has cost as much as building tables would, then builds them if they pay for this k.

    So searching costs at most about twice what knowing the number of searches beforehand would have made it. Results
    are the same either way. While one thread builds, the others scan.
    """

    def __init__(self) -> None:
        self.tables: SearchTables | None = None
        self._scanned = 0.0
        self._hopeless: int | None = None  # the smallest k that tables were found not to pay for
        self._building = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return 0 if self.tables is None else self.tables.nbytes

    def topk(
        self, q: np.ndarray, codes: np.ndarray, k: int, bits: int, threads: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What hamming_topk(q, codes, k, bits=bits) returns; `codes` are the same in every call."""
        if self.tables is None and self._due(q, codes, k, bits):
            self._build(codes, k, bits, threads)
        if self.tables is not None and self.tables.worth_it(k):
            return self.tables.search(q, k, threads=threads)
        return hamming_topk(q, codes, k, bits=bits, threads=threads)

    def _due(self, q: np.ndarray, codes: np.ndarray, k: int, bits: int) -> bool:
        if (self._hopeless is not None and k >= self._hopeless) or not multi_index.available(codes):
            return False
        self._scanned += multi_index.scan_cost(len(codes), codes.shape[1], len(q), k)
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
