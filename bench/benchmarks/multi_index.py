"""Exact top-k by search tables, one thread: 16 and 48 bits beside faiss-cpu, longer codes beside our own scan."""

from collections.abc import Iterator

import numpy as np

import cmr_fast as cf
from cmr_fast.ops.multi_index import SearchTables

from . import hamming
from .common import QUICK, Comparison, cost

QUERIES, CODES = 256, 20_000_000


def learned_like_codes(
    bits: int, queries: int, codes: int, *, flips: float = 0.06, centres: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Codes as a trained hash function spreads them: around centres, with bits of unequal certainty.

    Assumed: `centres` random centres, whose bits are 1 with probabilities from 0.3 to 0.7 and whose sizes fall off as
    rank^-0.5. A code flips each bit of its centre with that bit's own chance, exponential over the bits with mean
    `flips`: most bits are sure, a few are close to coins. In each run of four bits one code in three flips by a
    single draw, so that neighbouring bits go together. Queries are drawn like the codes and are not among them. Real
    codes may be tighter, with more equal ones, or looser: 0.12 is a network that is unsure, and with 0.5 for all bits
    the codes would be random.
    """
    rng = np.random.default_rng(seed)
    total, nbytes = queries + codes, bits // 8
    centre = np.packbits(rng.random((centres, bits)) < rng.uniform(0.3, 0.7, bits), axis=1, bitorder="little")
    share = np.cumsum(np.arange(1, centres + 1) ** -0.5)
    chance = np.minimum(rng.exponential(flips, bits), 0.5)
    out = np.empty((total, nbytes), np.uint8)
    for start in range(0, total, 1 << 20):
        n = min(1 << 20, total - start)
        member = np.searchsorted(share, rng.random(n) * share[-1])
        draw = rng.random((n, bits // 4, 4), dtype=np.float32)
        together = rng.random((n, bits // 4), dtype=np.float32) < 1 / 3
        draw[together] = draw[together][:, :1]
        flipped = np.packbits(draw.reshape(n, bits) < chance, axis=1, bitorder="little")
        out[start : start + n] = centre[member] ^ flipped
    return out[:queries], out[queries:]


def few_bits(build: bool, bits: int = 16, k: int = 10, codes: int = hamming.CODES) -> Comparison:
    """The table built in every round, or beforehand."""
    scan = hamming.topk(bits, k, codes=codes)
    q, db = hamming.random_codes(bits, hamming.QUERIES, codes)
    tables = SearchTables.build(db, threads=1)

    def ours() -> object:
        return (SearchTables.build(db, threads=1) if build else tables).search(q, k, threads=1)

    def check() -> None:
        scan.check()
        assert_equal(tables, q, db, k)

    return Comparison(
        name=f"top-k {bits} bits, k={k}, {len(q)} x {codes:,}, table {'built each time' if build else 'there'}",
        alternative=scan.alternative,
        ours=ours,
        theirs=scan.theirs,
        check=check,
        work=scan.work,
        unit=scan.unit,
    )


def beside_scan(
    kind: str, q: np.ndarray, db: np.ndarray, tables: SearchTables, k: int = 10, queries: int = QUERIES
) -> Comparison:
    """What tables that are there save, or what trying them in vain costs: `speed-up` is against our own scan."""
    q = q[:queries]
    return Comparison(
        name=f"{kind}, {8 * db.shape[1]} bits, k={k}, {len(q)} x {len(db):,}",
        alternative="own scan",
        ours=lambda: tables.search(q, k, threads=1),
        theirs=lambda: cf.hamming_topk(q, db, k, threads=1),
        check=lambda: assert_equal(tables, q, db, k),
        work=len(q) * len(db) / 1e9,
        unit="G codes",
    )


def assert_equal(tables: SearchTables, q: np.ndarray, db: np.ndarray, k: int) -> None:
    ours, scan = tables.search(q, k, threads=1), cf.hamming_topk(q, db, k, threads=1)
    np.testing.assert_array_equal(ours[0], scan[0])
    np.testing.assert_array_equal(ours[1], scan[1])


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    if quick:
        q, db = learned_like_codes(64, 64, 500_000, centres=5000)
        yield beside_scan("learned-like, 0.06 flips", q, db, SearchTables.build(db, threads=1))
        return
    yield few_bits(build=False)
    yield few_bits(build=True)
    yield hamming.topk(16, 10)
    yield hamming.topk(48, 10)
    for flips in (0.06, 0.12):
        q, db = learned_like_codes(64, QUERIES, CODES, flips=flips)
        tables = SearchTables.build(db, threads=1)
        yield beside_scan(f"learned-like, {flips} flips", q, db, tables)
        yield beside_scan(f"learned-like, {flips} flips", q, db, tables, k=100)
        yield beside_scan(f"learned-like, {flips} flips", q, db, tables, queries=1)
        others, _ = hamming.random_codes(64, QUERIES, 1)
        yield beside_scan(f"random queries, codes with {flips} flips", others, db, tables)
        del q, db, tables
    for bits, codes in ((64, CODES), (64, 1_000_000), (128, 1_000_000)):
        q, db = hamming.random_codes(bits, QUERIES, codes)
        yield beside_scan("random", q, db, SearchTables.build(db, threads=1))


class MultiIndex:
    """Lower is better: seconds, and our time as a share of the scan's."""

    version = "1"
    params = (["learned-like", "random"],)
    param_names = ("codes",)
    timeout = 600

    def setup(self, codes: str) -> None:
        make = learned_like_codes if codes == "learned-like" else hamming.random_codes
        self.q, self.db = make(64, 64, 100_000 if QUICK else 1_000_000)
        self.tables = SearchTables.build(self.db, threads=1)

    def time_build(self, codes: str) -> None:
        SearchTables.build(self.db, threads=1)

    def time_search(self, codes: str) -> None:
        self.tables.search(self.q, 10, threads=1)

    def track_bytes_per_code(self, codes: str) -> float:
        return self.tables.nbytes / len(self.db)

    def track_time_over_scan(self, codes: str) -> float:
        return cost(lambda: beside_scan(codes, self.q, self.db, self.tables))

    track_bytes_per_code.unit = "bytes"
    track_time_over_scan.unit = "ours / scan"
