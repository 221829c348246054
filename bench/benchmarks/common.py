"""Timing ours against an alternative on the same work, so that a noisy machine hits both.

One round times both, in an order that is turned round every time; the result is the median over the rounds of
theirs / ours. A comparison whose correctness gate fails is not timed at all.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from cmr_fast.errors import InputError

QUICK = os.environ.get("CMR_FAST_BENCH_QUICK") == "1"

try:
    from asv_runner.benchmarks.mark import SkipNotImplemented
except ImportError:  # a table of peers needs no asv
    SkipNotImplemented = NotImplementedError


@dataclass(frozen=True)
class Comparison:
    """One row of the table. `check` raises where ours and theirs disagree; `work` is what one call does, in `unit`.

    Where the alternative is too slow for all of it, `theirs` does `share` of the work and its time is scaled.
    """

    name: str
    alternative: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    check: Callable[[], None]
    work: float
    unit: str
    limit: Callable[[], float] | None = None  # the machine's bound, in `unit` per second
    share: float = 1.0


@dataclass(frozen=True)
class Timing:
    comparison: Comparison
    ours: float  # seconds, median
    theirs: float
    speedup: float  # median over the rounds of theirs / ours
    limit: float | None  # units per second
    share_of_limit: float | None  # median over the rounds


def compare(comparison: Comparison, rounds: int = 7) -> Timing:
    """Check, warm both up, then time them in turn."""
    comparison.check()
    sides = {"ours": comparison.ours, "theirs": comparison.theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    limits = []
    for name in sides:
        sides[name]()
    for turn in range(rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            start = time.perf_counter()
            sides[name]()
            elapsed = time.perf_counter() - start
            seconds[name].append(elapsed / comparison.share if name == "theirs" else elapsed)
        if comparison.limit is not None:
            limits.append(comparison.limit())
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    shares = [comparison.work / a / most for a, most in zip(seconds["ours"], limits, strict=False)]
    return Timing(
        comparison,
        statistics.median(seconds["ours"]),
        statistics.median(seconds["theirs"]),
        statistics.median(ratios),
        statistics.median(limits) if limits else None,
        statistics.median(shares) if shares else None,
    )


def cost(make: Callable[[], Comparison], rounds: int = 5, pinned: bool = True) -> float:
    """For asv's `track_`: our time as a share of the alternative's, by pairs in turn in this process, their median.

    Skipped where the alternative is not installed; CMR_FAST_BENCH_QUICK=1 makes one round of it.
    """
    if QUICK:
        rounds = 1
    try:
        comparison = make()
    except (InputError, KeyError, ImportError) as error:  # no alternative, or no weights and captions to measure on
        raise SkipNotImplemented(str(error)) from error
    try:
        with one_thread() if pinned else nullcontext():
            return 1 / compare(comparison, rounds).speedup
    except ImportError as error:  # an alternative that is imported where it is called
        raise SkipNotImplemented(str(error)) from error


@contextmanager
def on_all_processors() -> Iterator[None]:
    """Inside `one_thread`: what begins here may run on every processor again."""
    allowed = getattr(os, "sched_getaffinity", lambda _: None)(0)
    if allowed:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Pin this process to one processor, where the platform can, and every library to one thread."""
    import torch

    threads, allowed = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    torch.set_num_threads(1)
    try:
        import faiss

        faiss.omp_set_num_threads(1)
    except ImportError:
        pass
    if allowed:
        os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if allowed:
            os.sched_setaffinity(0, allowed)
