"""How the search scales, beside faiss: `python bench/scaling.py [--json FILE] [--plot FILE]`.

Size      time of one thread against the number of 64-bit codes, for one query and for 256, with a picture.
Threads   two threads against one, on the machine as it is and with every processor kept busy by another process.

Ours and faiss do the same work in the same run, in turn; times and ratios are medians.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import faiss
import numpy as np
from benchmarks.common import one_thread
from benchmarks.hamming import random_codes
from peers import machine

import cmr_fast as cf

BITS, K = 64, 10


def in_turn(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; each round runs all sides, starting one later than the round before."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for name in names:
        sides[name]()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def problem(queries: int, codes: int) -> tuple[np.ndarray, np.ndarray, faiss.IndexBinaryFlat]:
    q, db = random_codes(BITS, queries, codes)
    index = faiss.IndexBinaryFlat(BITS)
    index.add(db)
    some = slice(0, min(8, queries))
    np.testing.assert_array_equal(cf.hamming_topk(q[some], db, K)[0], index.search(q[some], K)[0])
    return q, db, index


def sizes(rounds: int, most: int) -> list[dict]:
    rows = []
    with one_thread():
        for queries in (1, 256):
            codes = 10_000
            while codes <= most:
                q, db, index = problem(queries, codes)
                seconds = in_turn(
                    {
                        "ours": lambda q=q, db=db: cf.hamming_topk(q, db, K, threads=1),
                        "faiss": lambda q=q, index=index: index.search(q, K),
                    },
                    rounds,
                )
                ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["faiss"], strict=True))
                row = {"queries": queries, "codes": codes, "speedup": ratio}
                row |= {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
                rows.append(row)
                print(
                    f"{queries:4} x {codes:>11,}  ours {1e3 * row['ours_s']:9.3f} ms  "
                    f"faiss {1e3 * row['faiss_s']:9.3f} ms  {ratio:5.1f}x",
                    flush=True,
                )
                codes = codes * 3 if str(codes).startswith("1") else codes // 3 * 10
    return rows


def spin() -> None:
    while True:
        pass


def threads(rounds: int, codes: int) -> list[dict]:
    q, db, index = problem(256, codes)

    def faiss_with(count: int) -> None:
        faiss.omp_set_num_threads(count)
        index.search(q, K)

    sides: dict[str, Callable[[], object]] = {}
    for count in (1, 2):
        sides[f"ours, {count}"] = lambda count=count: cf.hamming_topk(q, db, K, threads=count)
        sides[f"faiss, {count}"] = lambda count=count: faiss_with(count)
    rows = []
    for state in ("as it is", "busy"):
        others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
        if state == "busy":
            for other in others:
                other.start()
        try:
            seconds = in_turn(sides, rounds)
        finally:
            for other in others:
                if other.is_alive():
                    other.kill()
        for name in ("ours", "faiss"):
            ratio = statistics.median(a / b for a, b in zip(seconds[f"{name}, 1"], seconds[f"{name}, 2"], strict=True))
            rows.append({"machine": state, "who": name, "codes": codes, "two_threads_over_one": ratio})
            print(f"machine {state:9} {name:6} two threads are {ratio:.2f}x one", flush=True)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for panel, queries in zip(panels, (1, 256), strict=True):
        some = [row for row in rows if row["queries"] == queries]
        for name, label in (("faiss_s", "faiss IndexBinaryFlat"), ("ours_s", "cmr_fast")):
            panel.plot([r["codes"] for r in some], [1e3 * r[name] for r in some], marker="o", markersize=3, label=label)
        panel.set(xscale="log", yscale="log", xlabel="codes in the database", ylabel="milliseconds, one thread")
        panel.set_title(f"{queries} quer{'y' if queries == 1 else 'ies'}, 64 bits, k = {K}, exact", fontsize=10)
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--most", type=int, default=10_000_000, help="the largest database")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, help="also draw time against size into this file")
    arguments = parser.parse_args()
    found = {"machine": machine(), "sizes": sizes(arguments.rounds, arguments.most)}
    found["threads"] = threads(arguments.rounds, min(arguments.most, 1_000_000))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.plot:
        plot(found["sizes"], arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
