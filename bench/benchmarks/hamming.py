"""Exact Hamming top-k, one thread, 256 queries x 1M random codes, against faiss-cpu's IndexBinaryFlat."""

import time

import numpy as np

import cmr_fast as cf
from cmr_fast.ops import _dispatch

from .common import Comparison, compare, one_thread

QUERIES, CODES = 256, 1_000_000
BITS, KS = (32, 64, 128, 256), (10, 100, 1000)


def random_codes(bits: int, queries: int = QUERIES, codes: int = CODES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(bits)
    shape = (bits // 8,)
    return rng.integers(0, 256, (queries, *shape), np.uint8), rng.integers(0, 256, (codes, *shape), np.uint8)


def limit(bits: int) -> float:
    """G comparisons a second of xor, popcount and add alone on cached codes: the rate of words over words a code."""
    native, isa = _dispatch.native(), _dispatch.choose_isa()
    rounds = 3000
    start = time.perf_counter()
    pairs = native.hamming_arithmetic(isa, 4 if bits <= 32 else 8, rounds)
    return pairs / (time.perf_counter() - start) / 1e9 / max(1, -(-bits // 64))


def topk(bits: int, k: int, queries: int = QUERIES, codes: int = CODES) -> Comparison:
    import faiss

    q, db = random_codes(bits, queries, codes)
    index = faiss.IndexBinaryFlat(bits)
    index.add(db)

    def check() -> None:
        ours, theirs = cf.hamming_topk(q[:8], db, k, threads=1), index.search(q[:8], k)
        np.testing.assert_array_equal(ours[0], theirs[0])
        # faiss breaks ties by its heap, so compare the indices where the last distance leaves no choice
        for i in range(len(ours[0])):
            sure = ours[0][i] < ours[0][i, -1]
            assert set(ours[1][i][sure]) == set(theirs[1][i][sure]), "different neighbours"

    return Comparison(
        name=f"top-k {bits} bits, k={k}, {queries} x {codes:,}",
        alternative="faiss IndexBinaryFlat",
        ours=lambda: cf.hamming_topk(q, db, k, threads=1),
        theirs=lambda: index.search(q, k),
        check=check,
        work=queries * codes / 1e9,
        unit="G comparisons",
        limit=lambda: limit(bits),
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        return [topk(64, 10, queries=16, codes=100_000)]
    return [*(topk(bits, k) for bits in BITS for k in KS), topk(64, 10, queries=1)]


class TopK:
    """Lower is better: seconds, and our time as a share of faiss's."""

    params = (BITS, KS)
    param_names = ("bits", "k")
    timeout = 600

    def setup(self, bits: int, k: int) -> None:
        self.q, self.db = random_codes(bits, 64)

    def time_topk(self, bits: int, k: int) -> None:
        cf.hamming_topk(self.q, self.db, k, threads=1)

    def track_time_over_faiss(self, bits: int, k: int) -> float:
        with one_thread():
            return 1 / compare(topk(bits, k, queries=64), rounds=5).speedup

    track_time_over_faiss.unit = "ours / faiss"  # type: ignore[attr-defined]
