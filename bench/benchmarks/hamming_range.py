"""Searches within a radius, joins and filters, one thread: own scan, pynear (a process of its own), faiss-cpu.

pynear is looked for in the interpreter $CMR_FAST_PYNEAR, such as that of a virtual environment with pynear alone; its
rows are left out where there is none.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import cmr_fast as cf
from cmr_fast.ops.multi_index_range import MEMORY, RangeTables, Sample

from . import hamming
from .common import QUICK, Comparison, cost, on_all_processors
from .multi_index import learned_like_codes

CODES, QUERIES = 1_000_000, 10_000
FEWER = 10 if QUICK else 1  # the suite, run to see that it runs
K = 10
_PEER, _JOIN = (Path(__file__).with_name(name) for name in ("pynear_peer.py", "join_peer.py"))


def planted_codes(bits: int, queries: int, codes: int, flips: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Random codes, and queries that each have one neighbour within 0 to `flips` bits."""
    rng = np.random.default_rng(bits)
    db = rng.integers(0, 256, (codes, bits // 8), dtype=np.uint8)
    q = db[rng.choice(codes, queries, replace=False)].copy()
    for row in q:
        for place in rng.choice(bits, rng.integers(0, flips + 1), replace=False):
            row[place // 8] ^= 1 << place % 8
    return q, db


def near_copies(bits: int, codes: int, copies: int) -> np.ndarray:
    """Random codes, `copies` of which are others with up to 2 bits flipped."""
    rng = np.random.default_rng(bits)
    x = rng.integers(0, 256, (codes, bits // 8), dtype=np.uint8)
    at = rng.choice(np.arange(codes // 2, codes), copies, replace=False)
    x[at] = x[rng.integers(0, codes // 2, copies)]
    for _ in range(2):
        x[at, rng.integers(0, bits // 8, copies)] ^= (1 << rng.integers(0, 8, copies)).astype(np.uint8)
    return x


class Peer:
    """pynear over codes and queries, in its own process and on one thread."""

    def __init__(self, q: np.ndarray, db: np.ndarray, radius: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        np.save(folder / "db.npy", db)
        np.save(folder / "q.npy", q)
        threads = {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [os.environ["CMR_FAST_PYNEAR"], _PEER, folder / "db.npy", folder / "q.npy", str(K), str(radius)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env={**os.environ, **threads},
        )  # fmt: skip
        self._answer()

    def tell(self, order: str) -> None:
        assert self._process.stdin is not None
        print(order, file=self._process.stdin, flush=True)
        self._answer()

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        self.tell("search")
        path = Path(self._folder.name) / "found.npz"
        self.tell(f"save {path}")
        with np.load(path) as result:
            return result["distances"], result["ids"]

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("pynear's process ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def index_of(db: np.ndarray) -> cf.HammingIndex:
    index = cf.HammingIndex(8 * db.shape[1])
    index.add(db)
    return index


def beside_scan(kind: str, q: np.ndarray, db: np.ndarray, radius: int, few: int = 100) -> Comparison:
    """Range search by an index whose tables are there; the scan does `few` of the queries."""
    index = index_of(db)

    def check() -> None:
        index.range_search(q, radius, threads=1)  # builds the tables
        ours = index.range_search(q[:few], radius, threads=1)
        for a, b in zip(ours, cf.hamming_range(q[:few], db, radius, tables=False, threads=1), strict=True):
            np.testing.assert_array_equal(a, b)

    return Comparison(
        name=f"range {kind}, {8 * db.shape[1]} bits, radius {radius}, {len(q):,} x {len(db):,}, tables there",
        alternative="own scan",
        ours=lambda: index.range_search(q, radius, threads=1),
        theirs=lambda: cf.hamming_range(q[:few], db, radius, tables=False, threads=1),
        check=check,
        work=len(q) / 1e3,
        unit="thousand queries",
        share=few / len(q),
    )


def beside_pynear(bits: int, queries: int = 2000, codes: int = CODES, radius: int = 8) -> Iterator[Comparison]:
    """The work of its own README: the 10 nearest within 8 bits; then building the tables."""
    q, db = planted_codes(bits, queries, codes)
    index, peer = index_of(db), Peer(q, db, radius)
    index.range_search(np.tile(q, (10, 1)), radius, threads=1)  # enough to build the tables

    def check() -> None:
        ours, theirs = index.search(q, K, radius=radius, threads=1), peer.found()
        scan = cf.hamming_topk(q[:50], db, K, threads=1)
        near = scan[0] <= radius
        np.testing.assert_array_equal(ours[0][:50][near], scan[0][near])
        np.testing.assert_array_equal(ours[1][:50][near], scan[1][near])
        within = theirs[0] <= radius
        np.testing.assert_array_equal(np.sort(ours[0][ours[0] <= radius]), np.sort(theirs[0][within]))

    def build() -> None:
        database = torch.from_numpy(db)
        split = Sample(database).best(radius, MEMORY)
        assert split is not None
        RangeTables(database, split, 1)

    work = f"{bits} bits, {K} nearest within radius {radius}, {queries:,} x {codes:,}"
    yield Comparison(
        name=work,
        alternative="pynear MIHBinaryIndex",
        ours=lambda: index.search(q, K, radius=radius, threads=1),
        theirs=lambda: peer.tell("search"),
        check=check,
        work=queries / 1e3,
        unit="thousand queries",
    )
    if bits > 64:  # 64 bits are scanned
        yield Comparison(
            name=f"{bits} bits, tables for radius {radius}, {codes:,} codes",
            alternative="pynear MIHBinaryIndex, a tenth of the codes",
            ours=build,
            theirs=lambda: peer.tell(f"build {codes // 10}"),
            check=lambda: None,
            work=codes / 1e6,
            unit="million codes",
            share=0.1,
        )
    peer.close()


def join(bits: int, codes: int, radius: int, sample: int = 200) -> Comparison:
    """All pairs within a radius, tables built each time; faiss does a sample of the rows."""
    import faiss

    x = near_copies(bits, codes, codes // 20)
    index = faiss.IndexBinaryFlat(bits)
    index.add(x)

    def check() -> None:
        lims, distances, indices = cf.hamming_pairs(x, radius, threads=1)
        starts, near, ids = index.range_search(x[:sample], radius + 1)
        for i in range(sample):
            found = slice(starts[i], starts[i + 1])
            theirs = sorted((j, d) for j, d in zip(ids[found].tolist(), near[found].tolist(), strict=True) if j > i)
            ours = slice(lims[i], lims[i + 1])
            assert theirs == list(zip(indices[ours].tolist(), distances[ours].tolist(), strict=True)), "different pairs"

    return Comparison(
        name=f"all pairs within {radius}, {codes:,} x {bits} bits, tables built each time",
        alternative="faiss IndexBinaryFlat.range_search, a sample of rows",
        ours=lambda: cf.hamming_pairs(x, radius, threads=1),
        theirs=lambda: index.range_search(x[:sample], radius + 1),
        check=check,
        work=codes / 1e6,
        unit="million codes",
        share=sample / codes,
    )


def join_of_a_process(codes: int, bits: int = 64, radius: int = 2, most_mb: float = 1000) -> Iterator[Comparison]:
    """All pairs of many codes on two threads, start and reading included; red where it holds more memory."""
    with tempfile.TemporaryDirectory() as folder:
        path, copies = Path(folder) / "codes.npy", codes // 100
        np.save(path, near_copies(bits, codes, copies))

        def run(threads: int) -> tuple[int, float]:
            with on_all_processors():
                done = subprocess.run(
                    [sys.executable, _JOIN, path, str(radius), str(threads)], check=True, capture_output=True, text=True
                )
            pairs, megabytes = done.stdout.split()
            return int(pairs), float(megabytes)

        def check() -> None:
            (pairs, megabytes), (others, _) = run(2), run(1)
            assert pairs == others >= copies, (pairs, others, copies)
            assert megabytes < most_mb, f"{megabytes:.0f} MB"

        yield Comparison(
            name=f"all pairs within {radius}, {codes:,} x {bits} bits, process below {most_mb:,.0f} MB, two threads",
            alternative="the same, one thread",
            ours=lambda: run(2),
            theirs=lambda: run(1),
            check=check,
            work=codes / 1e6,
            unit="million codes",
        )


def filtered(index: cf.HammingIndex, flat: object, q: np.ndarray, kept: float, kind: str) -> Comparison:
    """The k nearest among a share of the codes, of random ids."""
    import faiss

    ids = np.sort(np.random.default_rng(0).choice(index.ntotal, int(index.ntotal * kept), replace=False))
    if kind == "bitmap":
        where = np.zeros(index.ntotal, bool)
        where[ids] = True
        bits = np.packbits(where, bitorder="little")
        selector = faiss.IDSelectorBitmap(index.ntotal, faiss.swig_ptr(bits))
    else:
        where, bits = ids, None
        selector = faiss.IDSelectorBatch(ids)
    parameters = faiss.SearchParameters(sel=selector)
    parameters.kept_alive = (selector, bits)

    def check() -> None:
        ours, theirs = index.search(q[:8], K, threads=1, where=where), flat.search(q[:8], K, params=parameters)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(np.isin(ours[1], ids), True)

    return Comparison(
        name=f"top-k {index.bits} bits, k={K}, {len(q)} x {index.ntotal:,}, a filter keeps {kept:.2%}",
        alternative=f"faiss IndexBinaryFlat, {type(selector).__name__}",
        ours=lambda: index.search(q, K, threads=1, where=where),
        theirs=lambda: flat.search(q, K, params=parameters),
        check=check,
        work=len(q) / 1e3,
        unit="thousand queries",
    )


def filters(queries: int = 256, codes: int = 10_000_000) -> Iterator[Comparison]:
    q, db = hamming.random_codes(64, queries, codes)
    index, flat = index_of(db), hamming.flat_index(64, codes)
    for kept, kind in ((0.1, "bitmap"), (0.01, "bitmap"), (0.0001, "batch")):
        yield filtered(index, flat, q, kept, kind)


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    if quick:
        q, db = learned_like_codes(64, 2000, 200_000, centres=2000)
        yield beside_scan("learned-like", q, db, 2, few=20)
        yield join(64, 50_000, 2, sample=20)
        yield from join_of_a_process(200_000)
        return
    makers: tuple[tuple[str, Callable[..., tuple[np.ndarray, np.ndarray]]], ...] = (
        ("random", hamming.random_codes),
        ("learned-like", learned_like_codes),
    )
    for kind, make in makers:
        q, db = make(64, QUERIES, CODES)
        for radius in (0, 2, 4):
            yield beside_scan(kind, q, db, radius)
    for bits in (64, 256, 512):
        q, db = planted_codes(bits, 2000, CODES)
        if bits > 64:
            yield beside_scan("planted", q, db, 8)
        if "CMR_FAST_PYNEAR" in os.environ:
            yield from beside_pynear(bits)
    yield join(256, 2_000_000, 2)
    yield from join_of_a_process(20_000_000)
    yield from filters()


class HammingRange:
    """Lower is better: seconds, and our time as a share of the scan's."""

    version = "1"
    params = (["learned-like", "random"], [0, 2, 4])
    param_names = ("codes", "radius")
    timeout = 600

    def setup(self, codes: str, radius: int) -> None:
        make = learned_like_codes if codes == "learned-like" else hamming.random_codes
        self.q, self.db = make(64, 1000, 200_000 // FEWER)
        self.index = index_of(self.db)
        self.index.range_search(np.tile(self.q, (10, 1)), radius, threads=1)

    def time_range(self, codes: str, radius: int) -> None:
        self.index.range_search(self.q, radius, threads=1)

    def track_time_over_scan(self, codes: str, radius: int) -> float:
        return cost(lambda: beside_scan(codes, self.q, self.db, radius, few=50))

    track_time_over_scan.unit = "ours / scan"


class Pairs:
    """Lower is better: seconds."""

    version = "1"
    timeout = 600

    def setup(self) -> None:
        self.x = near_copies(64, 500_000 // FEWER, 20_000 // FEWER)

    def time_pairs(self) -> None:
        cf.hamming_pairs(self.x, 2, threads=1)
