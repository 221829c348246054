"""One tree's process: measures a case when it is told to, over a pipe. Started by `bench/compare.py` alone.

A line of JSON comes in, one goes out. The benchmark code is this folder's, the library is the tree's on PYTHONPATH, so
both commits run the same benchmark.
"""

import ctypes
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from cases import CASES, Call

import cmr_fast
from cmr_fast.ops import _dispatch

READY: dict[str, Call] = {}


def call_of(name: str) -> Call:
    """The case, made once and called once: what follows finds everything loaded."""
    if name not in READY:
        READY[name] = CASES[name][0]()
        READY[name]()
    return READY[name]


def arrays(result: object) -> Iterator[np.ndarray]:
    """The arrays of a result, in their order."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        for part in result:
            yield from arrays(part)
    elif isinstance(result, torch.Tensor):
        yield result.detach().cpu().numpy()
    elif result is not None:
        yield np.asarray(result)


def result(name: str, path: str) -> int:
    found = list(arrays(call_of(name)()))
    if not found:
        raise ValueError(f"{name} returns nothing that could be compared")
    for x in found:
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise ValueError(f"{name} returns a number that is not finite")
    np.savez(path, *found)
    return len(found)


def waited() -> int:
    """Nanoseconds that this process's threads were ready and had no core (Linux's schedstat; 0 elsewhere).

    A case has one thread at work at a time, if not always the main one, so the clock counts their sum too much.
    """
    total = 0
    for path in TASKS.glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
            continue
    return total


TASKS = Path("/proc/self/task")


def moment() -> tuple[float, float]:
    """The clock, and the seconds waited by then."""
    while True:
        before, now = waited(), time.perf_counter()
        if waited() == before:  # else it lost its core between the two
            return now, before / 1e9


def sample(name: str, number: int) -> float:
    """Seconds a call: what passes on the clock less what the kernel gave to others meanwhile.

    At least the processor's time: a thread that is done and waits to go to sleep waits beside the one at work.
    """
    call = call_of(name)
    call()
    start, before = moment()
    used = -time.process_time()
    for _ in range(number):
        call()
    used += time.process_time()
    end, after = moment()
    return max(used, end - start - (after - before)) / number


def calls_of(name: str, seconds: float) -> int:
    """How many calls fill so many seconds."""
    return max(1, math.ceil(seconds / statistics.median(sample(name, 1) for _ in range(3))))


def status(what: str) -> int:
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def memory(name: str) -> float:
    """MB above its inputs that a call takes at its highest, in a child that ends with it."""
    call = call_of(name)
    gc.collect()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: what is freed goes back at once
                libc.mallopt(threshold, 1 << 16)
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            call()
            answer = str((status("VmHWM") - before) / 1024)
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return float(answer)


def instructions(name: str, shim: str) -> None:
    """One call, counted: callgrind writes a file under the case's name."""
    call = call_of(name)
    library = ctypes.CDLL(shim)
    library.begin()
    call()
    library.end(name.encode())


def describe(tree: str) -> dict[str, object]:
    """What runs: the tree's own kernels, or an error."""
    native = _dispatch.native()
    if isinstance(native, ImportError):
        raise native
    for module in (cmr_fast, native):
        if not Path(module.__file__).resolve().is_relative_to(Path(tree).resolve()):
            raise ImportError(f"{module.__name__} comes from {module.__file__}, not from {tree}")
    return {"isas": list(native.available_isas()), "cases": {name: costs for name, (_, costs) in CASES.items()}}


def force(isa: str) -> str:
    """An instruction set for all that follows; what runs then."""
    os.environ["CMR_FAST_ISA"] = isa
    return _dispatch.choose_isa()


ORDERS: dict[str, Callable[..., object]] = {
    "describe": describe,
    "force": force,
    "result": result,
    "calls_of": calls_of,
    "sample": sample,
    "memory": memory,
    "instructions": instructions,
}


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        try:
            answer = {"value": ORDERS[order](*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
