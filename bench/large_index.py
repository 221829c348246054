"""Build, open and search an index of 100M 64-bit codes (800 MB), and print what it took: `python bench/large_index.py`.

The codes are made and indexed in chunks, so the machine needs about 2 GB of disk (in --folder) and far less memory.
Every step runs in a process of its own; private memory is RssAnon of /proc/self/status, sampled while it searches,
above what it was before the file was opened.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

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


STEPS = {step.__name__: step for step in (make, build, search, append)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=100_000_000)
    parser.add_argument("--bits", type=int, default=64, choices=(8, 16, 32, 64))
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments.folder, arguments.codes, arguments.bits // 8)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for step in STEPS:
            size = ["--codes", str(arguments.codes), "--bits", str(arguments.bits)]
            command = [sys.executable, __file__, *size, "--folder", folder, "--step", step]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            for name, value in json.loads(done.stdout).items():
                print(f"{name:40} {value:,.3f}" if isinstance(value, float) else f"{name:40} {value:,}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
