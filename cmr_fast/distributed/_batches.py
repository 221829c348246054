"""Many callers at once: what waits while a search runs is searched together next."""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np

_Waiting = tuple[np.ndarray, "Future[tuple[np.ndarray, ...]]"]


class OverloadedError(RuntimeError):
    """More queries wait than are allowed: the caller shall come again later."""


class Batches:
    """Calls with the same settings, joined while an earlier one is under way; nobody waits for company.

    The caller whose turn it is searches for all who wait with the same settings, then hands the turn on, so that no
    caller works longer than for one batch.
    """

    def __init__(self, most: int, waiting: int) -> None:
        self._most, self._waiting = most, waiting
        self._lock = threading.Condition()
        self._queues: dict[Hashable, deque[_Waiting]] = {}
        self._running: set[Hashable] = set()
        self._rows = 0

    def search(
        self, key: Hashable, q: np.ndarray, run: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """The rows of run(queries) that belong to `q`; `run` is the same for all calls of a key."""
        mine: Future[tuple[np.ndarray, ...]] = Future()
        with self._lock:
            if self._rows and self._rows + len(q) > self._waiting:
                raise OverloadedError(
                    f"{self._rows} queries wait, {self._waiting} are allowed (most_waiting): come again later"
                )
            self._rows += len(q)
            self._queues.setdefault(key, deque()).append((q, mine))
        while True:
            with self._lock:
                try:
                    while not mine.done() and key in self._running:
                        self._lock.wait()
                except BaseException:  # such as Ctrl-C: nobody waits for it any more
                    self._leave(key, mine)
                    raise
                if mine.done():
                    return mine.result()
                self._running.add(key)
                batch = self._next(key)
            try:
                self._run(batch, run)
            finally:
                with self._lock:
                    self._running.discard(key)
                    self._rows -= sum(len(rows) for rows, _ in batch)
                    self._lock.notify_all()

    def _leave(self, key: Hashable, mine: "Future[tuple[np.ndarray, ...]]") -> None:
        queue = self._queues.pop(key, deque())
        self._rows -= sum(len(rows) for rows, future in queue if future is mine)
        if others := [each for each in queue if each[1] is not mine]:
            self._queues[key] = deque(others)

    def _next(self, key: Hashable) -> "list[_Waiting]":
        batch: list[_Waiting] = []
        queue, rows = self._queues[key], 0
        while queue and (not batch or rows + len(queue[0][0]) <= self._most):
            batch.append(queue.popleft())
            rows += len(batch[-1][0])
        if not queue:
            del self._queues[key]
        return batch

    @staticmethod
    def _run(
        batch: "list[_Waiting]",
        run: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    ) -> None:
        try:
            found = run(batch[0][0] if len(batch) == 1 else np.concatenate([rows for rows, _ in batch]))
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error if isinstance(error, Exception) else RuntimeError("the search was stopped"))
            if not isinstance(error, Exception):  # of this caller alone, such as Ctrl-C
                raise
            return
        at = 0
        for rows, future in batch:
            future.set_result(tuple(each[at : at + len(rows)] for each in found))
            at += len(rows)
