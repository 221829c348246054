"""Build, open and search an index of 100M 64-bit codes (800 MB), and print what it took: `python bench/large_index.py`.

The codes are made and indexed in chunks, so the machine needs about 2 GB of disk (in --folder) and far less memory.
Every step runs in a process of its own; private memory is RssAnon of /proc/self/status, sampled while it searches,
above what it was before the file was opened.

`--stream` builds from an iterator instead, whose blocks are made as they are asked for, so that the codes are on disk
once: `python bench/large_index.py --stream --codes 1_000_000_000` needs 8 GB there. It searches with one thread, from
the disk (the file's pages are dropped from the page cache first) and again, beside the rate at which the same queries
scan the first codes in memory, before and after. Of 64 queries the ten neighbours are planted, which are compared
whole; three others are compared with a scan by numpy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from peers import commit, machine

CHUNK = 4_000_000


def private_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Watch:
    """The most private memory, in MB, above that at the start, while the block runs; and its seconds."""

    def __enter__(self) -> "Watch":
        self.base, self.most, self._done = private_mb(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()
        self.most = max(self.most, private_mb() - self.base)

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, private_mb() - self.base)


def make(folder: Path, codes: int, nbytes: int) -> dict:
    """Chunks of random codes as .npy files."""
    for number, start in enumerate(range(0, codes, CHUNK)):
        rng = np.random.default_rng(number)
        np.save(folder / f"{number:04}.npy", rng.integers(0, 256, (min(CHUNK, codes - start), nbytes), dtype=np.uint8))
    return {}


def build(folder: Path, codes: int, nbytes: int) -> dict:
    from cmr_fast import HammingIndex

    pieces = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
    with Watch() as watch:
        HammingIndex.build(folder / "index.cmrx", pieces)
    return {"build, s": watch.seconds, "build, private MB": watch.most}


def append(folder: Path, codes: int, nbytes: int) -> dict:
    from cmr_fast import HammingIndex

    piece = np.load(folder / "0000.npy", mmap_mode="r")[:1000]
    with Watch() as watch:
        HammingIndex.append(folder / "index.cmrx", piece)
    assert len(HammingIndex.load(folder / "index.cmrx")) == codes + 1000
    return {"append 1,000 codes, s": watch.seconds}


def search(folder: Path, codes: int, nbytes: int) -> dict:
    from cmr_fast import HammingIndex, hamming_topk

    q = np.random.default_rng(10**6).integers(0, 256, (1024, nbytes), dtype=np.uint8)
    hamming_topk(q[:8], q, 3)  # the kernels and their threads are there
    with Watch() as opened:
        index = HammingIndex.load(folder / "index.cmrx")
    out = {"open, s": opened.seconds, "codes": len(index)}
    with Watch() as first:
        index.search(q[:1], 10)
    out |= {"first query (checks the file), s": first.seconds, "first query, private MB": first.most}
    for count in (1, 64, 1024):
        with Watch() as watch:
            distances, ids = index.search(q[:count], 10)
        out |= {f"{count} queries, k=10, s": watch.seconds, f"{count} queries, private MB": watch.most}
    # the answer, for a few, by a scan of the pieces with numpy
    assert len(index) == codes
    best = [np.empty(0, dtype=np.int64) for _ in range(3)]
    start = 0
    for path in sorted(folder.glob("*.npy")):
        piece = np.load(path).view(f"<u{nbytes}").reshape(-1)
        for i in range(len(best)):
            far = np.bitwise_count(piece ^ q[i].view(f"<u{nbytes}")).astype(np.int64)
            near = np.argpartition(far, 10)[:10]
            near = np.flatnonzero(far <= far[near].max())
            best[i] = np.sort(np.concatenate([best[i], far[near] << 40 | near + start]))[:10]
        start += len(piece)
    for i, keys in enumerate(best):
        same = (keys >> 40 == distances[i]).all() and (keys & (1 << 40) - 1 == ids[i]).all()
        if not same:
            raise AssertionError(f"query {i}: wrong neighbours")
    return out


QUERIES, PLANTED, NEAR = 1024, 64, 10
SAMPLE = 10_000_000  # codes in memory that tell the scan's rate


def queries(nbytes: int) -> np.ndarray:
    return np.random.default_rng(10**6).integers(0, 256, (QUERIES, nbytes), dtype=np.uint8)


def planted(codes: int, nbytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (PLANTED, NEAR), spread over all, and codes there, of which the j-th is j // 2 bits from its query."""
    rows = np.random.default_rng(7).permutation(codes // 1000)[: PLANTED * NEAR].reshape(PLANTED, NEAR) * 1000
    near = np.repeat(queries(nbytes)[:PLANTED, None], NEAR, axis=1)
    for j in range(NEAR):
        for bit in range(j // 2):
            near[:, j, (j + bit) % nbytes] ^= np.uint8(1 << bit)
    return rows, near


def blocks(codes: int, nbytes: int):
    """Random codes, a chunk at a time, with the planted ones among them."""
    rows, near = (x.reshape(PLANTED * NEAR, -1) for x in planted(codes, nbytes))
    for number, start in enumerate(range(0, codes, CHUNK)):
        rng = np.random.default_rng(number)
        block = rng.integers(0, 256, (min(CHUNK, codes - start), nbytes), dtype=np.uint8)
        here = (rows[:, 0] >= start) & (rows[:, 0] < start + len(block))
        block[rows[here, 0] - start] = near[here]
        yield block


def stream(folder: Path, codes: int, nbytes: int) -> dict:
    from cmr_fast import HammingIndex

    with Watch() as watch:
        HammingIndex.build(folder / "index.cmrx", blocks(codes, nbytes))
    size = (folder / "index.cmrx").stat().st_size
    return {"build, s": watch.seconds, "build, private MB": watch.most, "file, MB": size / 1e6}


def disk(folder: Path, codes: int, nbytes: int) -> dict:
    """From the disk, then again, between two scans of codes in memory."""
    from cmr_fast import HammingIndex, hamming_topk

    path, q = folder / "index.cmrx", queries(nbytes)
    sample = np.concatenate(
        [block for block, _ in zip(blocks(codes, nbytes), range(-(-SAMPLE // CHUNK)), strict=False)]
    )

    def rate() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        hamming_topk(q, sample, NEAR, threads=1)
        work = len(q) * len(sample)
        return work / (time.perf_counter() - wall), work / (time.process_time() - cpu)

    rate()
    out: dict = {"codes": codes, "queries": QUERIES, "k": NEAR, "bits": 8 * nbytes}
    rates = [rate() for _ in range(3)]
    index = HammingIndex.load(path, check=False)
    times = {}
    for name in ("from disk", "again"):
        if name == "from disk":
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, cpu = read_bytes(), time.process_time()
        with Watch() as watch:
            distances, ids = index.search(q, NEAR, 1)
        times[name] = watch.seconds, time.process_time() - cpu
        out |= {f"{name}, s": watch.seconds, f"{name}, processor s": times[name][1]}
        out |= {f"{name}, private MB": watch.most, f"{name}, MB read": (read_bytes() - before) / 1e6}
        rates += [rate() for _ in range(3)]
    wall, cpu = (float(np.median([each[i] for each in rates])) for i in (0, 1))
    out |= {"scan in memory, comparisons a second": wall, "scan in memory, comparisons a processor second": cpu}
    for name, (seconds, processor) in times.items():
        out[f"{name}, of what the scan predicts"] = seconds * wall / (codes * QUERIES)
        out[f"{name}, of what the scan predicts by processor time"] = processor * cpu / (codes * QUERIES)
    with Watch() as watch:
        index.search(q[:1], NEAR, 1)
    out["one query, s"] = watch.seconds
    out["load"] = os.getloadavg()[0]
    check(index, q, distances, ids, codes, nbytes)
    with Watch() as watch:
        index.verify()
    return out | {"checksums of all, s": watch.seconds}


def check(index, q: np.ndarray, distances: np.ndarray, ids: np.ndarray, codes: int, nbytes: int) -> None:
    """AssertionError unless the planted neighbours are found, and for three other queries what numpy finds."""
    rows, _ = planted(codes, nbytes)
    for i in range(PLANTED):
        order = np.lexsort((rows[i], np.arange(NEAR) // 2))
        assert ids[i].tolist() == rows[i][order].tolist(), f"query {i}: the planted neighbours are not found"
        assert distances[i].tolist() == [j // 2 for j in range(NEAR)], f"query {i}: wrong distances"
    others = range(PLANTED, PLANTED + 3)
    best = {i: np.empty(0, dtype=np.int64) for i in others}
    words = index.codes.reshape(-1).view(f"<u{nbytes}")
    for start in range(0, codes, CHUNK):
        piece = words[start : start + CHUNK]
        for i in others:
            far = np.bitwise_count(piece ^ q[i].view(f"<u{nbytes}")).astype(np.int64)
            near = np.flatnonzero(far <= np.partition(far, NEAR)[NEAR])
            best[i] = np.sort(np.concatenate([best[i], far[near] << 40 | near + start]))[:NEAR]
    for i, keys in best.items():
        assert (keys >> 40 == distances[i]).all() and (keys & (1 << 40) - 1 == ids[i]).all(), f"query {i}"


def read_bytes() -> int:
    """What this process had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


STEPS = {step.__name__: step for step in (make, build, search, append)}
STREAMED = {step.__name__: step for step in (stream, disk)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=100_000_000)
    parser.add_argument("--bits", type=int, default=64, choices=(8, 16, 32, 64))
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--step", choices=STEPS | STREAMED, help=argparse.SUPPRESS)
    parser.add_argument("--stream", action="store_true", help="build from an iterator, and search from the disk")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps((STEPS | STREAMED)[arguments.step](arguments.folder, arguments.codes, arguments.bits // 8)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = {"machine": machine() | {"commit": commit(), "processors": str(os.cpu_count())}}
        for step in STREAMED if arguments.stream else STEPS:
            size = ["--codes", str(arguments.codes), "--bits", str(arguments.bits)]
            command = [sys.executable, __file__, *size, "--folder", folder, "--step", step]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            measured[step] = json.loads(done.stdout)
            for name, value in measured[step].items():
                print(f"{name:40} {value:,.3f}" if isinstance(value, float) else f"{name:40} {value:,}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
