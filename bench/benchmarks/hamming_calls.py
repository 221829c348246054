"""What a call costs beside its scan: one query over few codes, against faiss-cpu; one query on two threads.

The limit of the last is the memory's: one query reads every code once.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

import cmr_fast as cf

from . import hamming
from .common import QUICK, Comparison, cost, on_all_processors

WAYS = ("index.search", "index.searcher", "hamming_topk")


def few_codes(codes: int, way: str, bits: int = 64, k: int = 10, calls: int = 200) -> Comparison:
    """One query over so few codes that a call costs more than its scan."""
    together = hamming.topk(bits, k, 1, codes)
    flat, (q, db) = hamming.flat_index(bits, codes), hamming.random_codes(bits, 1, codes)
    index = cf.HammingIndex(bits)
    index.add(db)
    searcher = index.searcher(k)
    one = {
        "index.search": lambda: index.search(q, k),
        "index.searcher": lambda: searcher.search(q),
        "hamming_topk": lambda: cf.hamming_topk(q, db, k),
    }[way]

    def check() -> None:
        together.check()
        for a, b in zip(one(), cf.hamming_topk(q, db, k), strict=True):
            np.testing.assert_array_equal(a, b)

    return replace(
        together,
        name=f"{way}, {bits} bits, k={k}, one query x {codes:,}",
        ours=lambda: [one() for _ in range(calls)],
        theirs=lambda: [flat.search(q, k) for _ in range(calls)],
        check=check,
        work=calls / 1e3,
        unit="thousand calls",
        limit=None,
    )


def reading(db: np.ndarray) -> float:
    """G codes a second of a sum over their words, on one thread or two: what memory gives."""
    words, seconds = torch.from_numpy(db.reshape(-1).view(np.int64)), []
    before = torch.get_num_threads()
    with on_all_processors():
        for threads in (1, 2) * 3:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            words.sum()
            seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return len(db) / 1e9 / min(seconds)


def on_two_threads(bits: int = 64, k: int = 10, codes: int = 10_000_000) -> Comparison:
    """One query whose codes are split over threads."""
    q, db = hamming.random_codes(bits, 1, codes)

    def two() -> tuple[np.ndarray, np.ndarray]:
        with on_all_processors():
            return cf.hamming_topk(q, db, k, threads=2)

    def check() -> None:
        for a, b in zip(two(), cf.hamming_topk(q, db, k, threads=1), strict=True):
            np.testing.assert_array_equal(a, b)

    return Comparison(
        name=f"top-k {bits} bits, k={k}, 1 x {codes:,}, two threads",
        alternative="own scan, one thread",
        ours=two,
        theirs=lambda: cf.hamming_topk(q, db, k, threads=1),
        check=check,
        work=codes / 1e9,
        unit="G comparisons",
        limit=lambda: reading(db),
    )


class TwoThreads:
    """Lower is better: two threads as a share of one, in asv's process, where no faiss is loaded."""

    version = "1"
    timeout = 600

    def track_time_over_one_thread(self) -> float:
        return cost(lambda: on_two_threads(codes=200_000 if QUICK else 10_000_000), pinned=False)

    track_time_over_one_thread.unit = "two threads / one"


class Calls:
    """Lower is better: 200 calls over few codes as a share of faiss's."""

    version = "1"
    params = ((1_000, 20_000), WAYS)
    param_names = ("codes", "way")

    def track_time_over_faiss(self, codes: int, way: str) -> float:
        return cost(lambda: few_codes(codes, way))

    track_time_over_faiss.unit = "ours / faiss"


def comparisons(quick: bool = False) -> Iterator[Comparison]:
    for codes in (1_000, 20_000):
        for way in WAYS:
            yield few_codes(codes, way, calls=20 if quick else 200)
    yield on_two_threads(codes=200_000 if quick else 10_000_000)
