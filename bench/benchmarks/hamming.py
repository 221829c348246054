"""Exact Hamming top-k, one thread, 256 queries x 1M random codes, against faiss-cpu's IndexBinaryFlat and usearch's
exact search; the whole table of distances against NumKong's."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

import cmr_fast as cf
from cmr_fast.ops import _dispatch

from .common import QUICK, Comparison, cost

QUERIES, CODES = 256, 100_000 if QUICK else 1_000_000
BITS, KS = (32, 64, 128, 256), (10, 100, 1000)
LARGE_KS = (10_000, 100_000)


def random_codes(bits: int, queries: int = QUERIES, codes: int = CODES) -> tuple[np.ndarray, np.ndarray]:
    of_queries, of_codes = np.random.default_rng(bits).spawn(2)
    shape = (bits // 8,)
    return of_queries.integers(0, 256, (queries, *shape), np.uint8), of_codes.integers(
        0, 256, (codes, *shape), np.uint8
    )


def limit(bits: int) -> float:
    """G comparisons a second of xor, popcount and add alone on cached codes: the rate of words over words a code."""
    native, isa = _dispatch.native(), _dispatch.choose_isa()
    rounds = 3000
    start = time.perf_counter()
    pairs = native.hamming_arithmetic(isa, next((n for n in (1, 2, 4) if bits <= 8 * n), 8), rounds)
    return pairs / (time.perf_counter() - start) / 1e9 / max(1, -(-bits // 64))


def flat_index(bits: int, codes: int = CODES) -> Any:
    import faiss

    index = faiss.IndexBinaryFlat(bits)
    index.add(random_codes(bits, 1, codes)[1])
    return index


def topk(bits: int, k: int, queries: int = QUERIES, codes: int = CODES) -> Comparison:
    q, db = random_codes(bits, queries, codes)
    index = flat_index(bits, codes)

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


def beside_usearch(bits: int, k: int = 10, queries: int = 32, codes: int = CODES) -> Comparison:
    """The exact search of usearch's index, which is twice as fast as its search without one. The graph goes unused."""
    q, db = random_codes(bits, queries, codes)
    made: list[Any] = []

    def theirs(q: np.ndarray = q) -> Any:
        from usearch.index import Index, MetricKind, ScalarKind

        if not made:
            made.append(
                Index(ndim=bits, metric=MetricKind.Hamming, dtype=ScalarKind.B1, connectivity=2, expansion_add=1)
            )
            made[0].add(np.arange(codes), db, threads=1)
        return made[0].search(q, k, exact=True, threads=1)

    def check() -> None:
        ours, found = cf.hamming_topk(q[:8], db, k, threads=1), theirs(q[:8])
        np.testing.assert_array_equal(ours[0], found.distances)
        for i in range(len(ours[0])):  # ties come in any order
            sure = ours[0][i] < ours[0][i, -1]
            assert set(ours[1][i][sure]) == set(found.keys[i][sure].astype(int)), "different neighbours"

    return Comparison(
        name=f"top-k {bits} bits, k={k}, {queries} x {codes:,}",
        alternative="usearch Index, exact=True",
        ours=lambda: cf.hamming_topk(q, db, k, threads=1),
        theirs=theirs,
        check=check,
        work=queries * codes / 1e9,
        unit="G comparisons",
        limit=lambda: limit(bits),
    )


def beside_numkong(bits: int, queries: int = 64, codes: int = CODES // 10) -> Comparison:
    """The whole table, 32-bit numbers on either side; NumKong's database is packed before, as its calls want it."""
    q, db = random_codes(bits, queries, codes)
    packed: list[Any] = []

    def theirs() -> Any:
        import numkong

        if not packed:
            packed.append(numkong.hammings_pack(db))
        return numkong.hammings_packed(q, packed[0])

    def check() -> None:
        np.testing.assert_array_equal(cf.hamming_distances(q, db, threads=1), np.asarray(theirs()))

    return Comparison(
        name=f"all distances, {bits} bits, {queries} x {codes:,}",
        alternative="NumKong hammings_packed",
        ours=lambda: cf.hamming_distances(q, db, threads=1),
        theirs=theirs,
        check=check,
        work=queries * codes / 1e9,
        unit="G comparisons",
        limit=lambda: limit(bits),
    )


def one_by_one(bits: int = 64, k: int = 10, queries: int = 20, codes: int = CODES) -> Comparison:
    """Queries that come one after the other, a call for each."""
    together = topk(bits, k, queries, codes)
    index, (q, db) = flat_index(bits, codes), random_codes(bits, queries, codes)
    return replace(
        together,
        name=f"top-k {bits} bits, k={k}, {queries} single queries x {codes:,}, a call each",
        ours=lambda: [cf.hamming_topk(q[i : i + 1], db, k, threads=1) for i in range(queries)],
        theirs=lambda: [index.search(q[i : i + 1], k) for i in range(queries)],
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        small = {"queries": 16, "codes": 100_000}
        return [topk(64, 10, **small), beside_usearch(64, **small), beside_numkong(64, **small)]
    return [
        *(topk(bits, k) for bits in BITS for k in KS),
        *(topk(64, k, queries=32) for k in LARGE_KS),
        topk(64, 10, queries=1),
        one_by_one(),
        *(beside_usearch(bits) for bits in BITS),
        *(beside_numkong(bits) for bits in BITS),
    ]


class TopK:
    """Lower is better: seconds, and our time as a share of faiss's."""

    version = "1"
    params = (BITS, KS)
    param_names = ("bits", "k")
    timeout = 600

    def setup(self, bits: int, k: int) -> None:
        self.q, self.db = random_codes(bits, 64)

    def time_topk(self, bits: int, k: int) -> None:
        cf.hamming_topk(self.q, self.db, k, threads=1)

    def track_time_over_faiss(self, bits: int, k: int) -> float:
        return cost(lambda: topk(bits, k, queries=64))

    track_time_over_faiss.unit = "ours / faiss"


class Others:
    """Lower is better: our time as a share of usearch's and of NumKong's."""

    version = "1"
    params = (BITS,)
    param_names = ("bits",)
    timeout = 600

    def track_time_over_usearch(self, bits: int) -> float:
        return cost(lambda: beside_usearch(bits))

    def track_time_over_numkong(self, bits: int) -> float:
        return cost(lambda: beside_numkong(bits))

    track_time_over_usearch.unit = "ours / usearch"
    track_time_over_numkong.unit = "ours / NumKong"
