"""A pair of worker processes, one a commit, and the rounds A B B A through them."""

import json
import os
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from gate.verdict import Samples

WORKER = Path("bench", "gate", "worker.py")
TOTALS = re.compile(r"^desc: Trigger: Client Request: (\w+)$.*?^totals: (\d+)", re.MULTILINE | re.DOTALL)


class Broken(Exception):
    """What a case or a whole worker did not do."""


class Worker:
    """The library of `tree` under the benchmark code of `code`."""

    def __init__(self, tree: Path, code: Path, before: tuple[str, ...] = (), patience: float = 300.0) -> None:
        drop = ("CMR_FAST_", "PYTHON", "MALLOC_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        env |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        env |= {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"CMR_FAST_BACKEND": "cpp"}  # a forced backend that cannot run raises
        self.tree, self.patience = tree, patience
        self.process = subprocess.Popen(
            [*before, sys.executable, str(code / WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd=tree,
        )  # fmt: skip
        self._rest = b""

    def __call__(self, order: str, *arguments: object) -> object:
        self.send(order, *arguments)
        return self.answer()

    def send(self, order: str, *arguments: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([order, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise Broken("the process ended") from None

    def answer(self) -> object:
        assert self.process.stdout is not None
        end = time.monotonic() + self.patience
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                self.close()
                raise Broken(f"no answer within {self.patience:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise Broken(f"the process ended ({self.process.wait()})")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise Broken(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def pair(trees: tuple[Path, Path], code: Path, **options: object) -> Iterator[list[Worker]]:
    """Both commits' workers, both started before either is waited for."""
    with ExitStack() as stack:
        workers = [Worker(tree, code, **options) for tree in trees]  # type: ignore[arg-type]
        for worker in workers:
            stack.callback(worker.close)
            worker.send("describe", str(worker.tree))
        yield workers


def described(workers: list[Worker]) -> list[dict]:
    """What each side runs. Where their best instruction sets differ, both run the best that they have in common."""
    found: list[dict] = []
    for side, worker in zip("AB", workers, strict=False):  # A alone where one tree is measured
        try:
            found.append(worker.answer())  # type: ignore[arg-type]
        except Broken as error:
            raise Broken(f"{side}: {error}") from None
    a, b = found[0]["isas"], found[-1]["isas"]
    if a[0] != b[0]:
        common = next((isa for isa in a if isa in b), None)
        if common is None or any(worker("force", common) != common for worker in workers):
            raise Broken(f"A has {', '.join(a)} and B {', '.join(b)}: they can run none in common")
    return found


def asked(workers: list[Worker], side: int, order: str, *arguments: object) -> float:
    """One side's answer; a failure says whose it is."""
    try:
        return workers[side](order, *arguments)  # type: ignore[return-value]
    except Broken as error:
        raise Broken(f"{'AB'[side]}: {error}") from None


def agree(workers: list[Worker], case: str, folder: Path) -> None:
    """Broken where a side has no result, AssertionError where the two differ."""
    results = []
    for side in (0, 1):
        path = folder / f"{case}-{side}.npz"
        asked(workers, side, "result", case, str(path))
        with np.load(path) as arrays:
            results.append([arrays[name] for name in arrays.files])
        path.unlink()
    a, b = results
    assert len(a) == len(b), f"A gives {len(a)} arrays and B {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.shape == y.shape, f"array {i} has shape {x.shape} of A and {y.shape} of B"
        if x.dtype.kind == "f":
            apart = float(np.abs(x.astype(float) - y).max() / (np.abs(x).max() or 1)) if x.size else 0.0
            assert apart <= 1e-4, f"array {i} is apart by {apart:.1e} of its largest"
        else:
            assert np.array_equal(x, y), f"array {i} differs in {int((x != y).sum())} of {x.size} places"


def rounds(
    trees: tuple[Path, Path], code: Path, wanted: dict[str, tuple[str, ...]], count: int, quads: int, seconds: float
) -> tuple[dict[tuple[str, str], Samples], dict[str, str]]:
    """Samples of time and memory, and why a case has none. Every round has new processes."""
    samples = {(case, cost): Samples() for case, costs in wanted.items() for cost in costs if cost != "instructions"}
    broken: dict[str, str] = {}
    numbers: dict[str, float] = {}
    orders = ((0, 1, 1, 0), (1, 0, 0, 1))
    for turn in range(count):
        with pair(trees, code) as workers:
            described(workers)
            for case, cost in samples:
                if case in broken:
                    continue
                try:
                    for i in range(quads if cost == "time" else 1):
                        if cost == "time":
                            if case not in numbers:
                                numbers[case] = asked(workers, 0, "calls_of", case, seconds)
                            ask = ("sample", case, numbers[case])
                        else:
                            ask = ("memory", case)
                        order = orders[(turn + i) % 2]
                        a, b, c, d = (asked(workers, side, *ask) for side in order)
                        samples[case, cost].quads.append((a, b, c, d) if order[0] == 0 else (b, a, d, c))
                except Broken as error:
                    broken[case] = str(error)
                    if any(worker.process.poll() is not None for worker in workers):
                        break  # the rest of the round is lost; the next one has new processes
    return samples, broken


def instructions(
    trees: tuple[Path, ...], code: Path, cases: list[str], folder: Path, shim: Path
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """What callgrind counts of one call on each tree, and why a case has no count. At once: a count has no noise."""
    broken: dict[str, str] = {}
    left, sides = list(cases), "AB"[: len(trees)]
    while left:  # a case that ends its process costs itself alone: the others go on in new ones
        with ExitStack() as stack:
            workers = []
            for side, tree in zip(sides, trees, strict=True):
                out = f"--callgrind-out-file={folder / f'callgrind.{side}.{len(left)}'}"
                before = ("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", out)
                workers.append(Worker(tree, code, before, patience=900.0))
                stack.callback(workers[-1].close)
                workers[-1].send("describe", str(tree))
            described(workers)
            while left and all(worker.process.poll() is None for worker in workers):
                case = left.pop(0)
                sent = []
                for side, worker in zip(sides, workers, strict=True):
                    try:
                        worker.send("instructions", case, str(shim))
                        sent.append((side, worker))
                    except Broken as error:
                        broken[case] = f"{side}: {error}"
                for side, worker in sent:
                    try:
                        worker.answer()
                    except Broken as error:
                        broken[case] = f"{side}: {error}"
    found: list[dict[str, int]] = [{} for _ in sides]
    for counts, side in zip(found, sides, strict=True):
        for path in folder.glob(f"callgrind.{side}.*"):
            if match := TOTALS.search(path.read_text()):
                counts[match[1]] = int(match[2])
    every = {case: tuple(counts[case] for counts in found) for case in cases if all(case in x for x in found)}
    return every, broken


def shim(folder: Path) -> Path:
    """The library that tells callgrind where to begin and end."""
    path = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [*shlex.split(os.environ.get("CC", "cc")), "-O2", "-shared", "-fPIC", "-o", str(path), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Broken(f"no C compiler: {error}") from None
    if done.returncode:
        raise Broken(f"valgrind's headers do not compile: {done.stderr.strip()[:300]}")
    return path
