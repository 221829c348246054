"""Callers at once: each gets its own rows, what waits is searched together, and too many are refused."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cmr_fast.distributed import OverloadedError
from cmr_fast.distributed._batches import Batches


class Held:
    """A search that waits until it is let go, and notes what it was given."""

    def __init__(self):
        self.sizes, self.begun, self.go = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, q):
        self.sizes.append(len(q))
        self.begun.release()
        assert self.go.acquire(timeout=30)
        return q * 2, q + 1


def waiting(batches):
    """How many rows wait or run."""
    with batches._lock:
        return batches._rows


def until(condition):
    event = threading.Event()
    for _ in range(3000):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("never so")


def test_what_waits_is_searched_together_and_each_gets_its_own_rows():
    batches, run = Batches(8, 100), Held()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batches.search, "k", np.arange(2), run)
        assert run.begun.acquire(timeout=30)
        others = [pool.submit(batches.search, "k", np.arange(3) + 10 * i, run) for i in range(4)]
        until(lambda: waiting(batches) == 14)
        run.go.release(3)
        assert first.result(30)[0].tolist() == [0, 2]
        for i, other in enumerate(others):
            doubled, more = other.result(30)
            assert doubled.tolist() == [20 * i, 20 * i + 2, 20 * i + 4]
            assert more.tolist() == [10 * i + 1, 10 * i + 2, 10 * i + 3]
    assert run.sizes == [2, 6, 6], "8 rows at most together"
    assert waiting(batches) == 0
    assert not batches._queues


def test_calls_of_other_settings_do_not_wait():
    batches, run = Batches(8, 100), Held()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batches.search, ("k", 1), np.arange(2), run)
        assert run.begun.acquire(timeout=30)
        assert batches.search(("k", 2), np.arange(3), lambda q: (q,))[0].tolist() == [0, 1, 2]
        run.go.release()
        first.result(30)


def test_a_batch_that_fails_fails_for_each_of_it_and_for_nobody_after():
    batches, run = Batches(8, 100), Held()

    def fails(q):
        raise ValueError("no")

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batches.search, "k", np.arange(2), run)
        assert run.begun.acquire(timeout=30)
        others = [pool.submit(batches.search, "k", np.arange(1), fails) for _ in range(2)]
        until(lambda: waiting(batches) == 4)
        run.go.release()
        first.result(30)
        for other in others:
            with pytest.raises(ValueError, match="no"):
                other.result(30)
    assert batches.search("k", np.arange(2), lambda q: (q,))[0].tolist() == [0, 1]


def test_too_many_are_refused_at_once_and_one_large_call_alone_is_not():
    batches, run = Batches(8, 5), Held()
    assert len(batches.search("k", np.arange(9), lambda q: (q,))[0]) == 9
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batches.search, "k", np.arange(4), run)
        assert run.begun.acquire(timeout=30)
        with pytest.raises(OverloadedError, match=r"4 queries wait, 5 are allowed"):
            batches.search("k", np.arange(2), run)
        run.go.release()
        first.result(30)


def test_who_is_stopped_while_waiting_leaves_nothing_behind(monkeypatch):
    batches, run = Batches(8, 5), Held()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(batches.search, "k", np.arange(2), run)
        assert run.begun.acquire(timeout=30)

        def stopped():
            raise KeyboardInterrupt

        monkeypatch.setattr(batches._lock, "wait", stopped)
        with pytest.raises(KeyboardInterrupt):
            batches.search("k", np.arange(3), run)
        monkeypatch.undo()
        assert waiting(batches) == 2
        run.go.release()
        first.result(30)
    assert waiting(batches) == 0
    assert not batches._queues
    assert run.sizes == [2]


def test_every_caller_of_many_gets_what_is_its_own():
    batches = Batches(16, 10_000)

    def ask(i):
        q = np.arange(i % 5 + 1) + 1000 * i
        return (batches.search(i % 2, q, lambda x: (x * 3,))[0] == q * 3).all()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(400)))
    assert waiting(batches) == 0
