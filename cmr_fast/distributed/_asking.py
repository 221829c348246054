"""One question to all shards: who is asked, by which way, and what happens where nobody answers."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cmr_fast.distributed._line import MOST, Line
from cmr_fast.distributed._worker import Answer
from cmr_fast.errors import InputError
from cmr_fast.retrieval._shards import GoneError, ShardFile

if TYPE_CHECKING:
    from cmr_fast.distributed._pool import Pool

_PAUSE = 0.05  # seconds between two attempts, while actors start anew
_DOUBT = 2.0  # seconds for which a replica that failed comes last


class ShardLostError(RuntimeError):
    """A shard does not answer, and no replica of it does. `shard` is its number."""

    def __init__(self, shard: int, why: str) -> None:
        super().__init__(why)
        self.shard = shard


@dataclass
class Replica:
    """An actor of a shard, and the line to it."""

    actor: Any
    doubted: float = 0.0  # when it failed last
    answered: bool = False  # before, it is being started, which no timeout is for
    line: Line | None = None
    offer: Any = None  # Ray's reference to where it listens
    apart: bool = False  # on another machine


@dataclass
class _Call:
    """A call of one shard that is to be answered."""

    shard: int
    tried: set[int] = field(default_factory=set)
    replica: int = -1
    sent: float = 0.0
    why: str = ""


class Asking:
    """A call of each shard that has files, as of `Pool.ask`: by lines where it may be, the others by Ray."""

    def __init__(
        self,
        pool: "Pool",
        method: str,
        files: Sequence[tuple[ShardFile, ...]],
        arguments: Callable[[int], tuple[Any, ...]],
        *,
        partial: bool,
        wait: float,
        direct: bool,
    ) -> None:
        self._pool, self._method, self._files, self._arguments = pool, method, files, arguments
        self._partial, self._wait, self._direct = partial, wait, direct
        self._turn = pool.turn()
        self._by_line: list[tuple[_Call, Line]] = []
        self._by_ray: dict[Any, _Call] = {}
        self._answers: dict[int, Answer] = {}
        self._begun = time.monotonic()

    def answered(self) -> dict[int, Answer]:
        """All answers, by the shards' numbers."""
        try:
            for number, held in enumerate(self._files):
                if held:
                    self._send(_Call(number))
            arrived = self._at_once()
            while self._by_line or self._by_ray:
                if self._by_line:
                    self._receive(*self._by_line.pop())
                else:
                    self._next_of_ray(arrived)
        finally:
            for _, line in self._by_line:
                line.give_back(answered=False)
        return self._answers

    def _replica(self, call: _Call) -> Replica:
        return self._pool.shards[call.shard][call.replica]

    def _send(self, call: _Call) -> bool:
        """To a replica that was not tried, if there is one."""
        replicas = self._pool.shards[call.shard]
        left = [number for number in range(len(replicas)) if number not in call.tried]
        if not left:
            return False
        now = time.monotonic()
        call.replica = min(left, key=lambda n: (now - replicas[n].doubted < _DOUBT, (n + self._turn) % len(replicas)))
        call.sent = now
        arguments = self._arguments(call.shard)
        direct = self._direct and sum(getattr(each, "nbytes", 0) for each in arguments) <= MOST
        line = self._pool.line(replicas[call.replica]) if direct else None
        if line is None:
            self._send_by_ray(call)
            return True
        self._by_line.append((call, line))
        with suppress(OSError):  # it is closed then, as `_receive` finds
            line.send(self._method, (self._files[call.shard], *arguments))
        return True

    def _send_by_ray(self, call: _Call) -> None:
        method = getattr(self._replica(call).actor, self._method)
        self._by_ray[method.remote(self._files[call.shard], *self._arguments(call.shard))] = call

    def _receive(self, call: _Call, line: Line) -> None:
        try:
            found = line.receive()
        except TimeoutError:
            self._failed(call, self._no_answer())
        except (EOFError, OSError):  # of the line, not of the actor
            self._send_by_ray(call)
        else:
            if isinstance(found, Exception):
                self._refused(call, found, found)
            else:
                self._keep(call, found)
        finally:
            line.give_back()

    def _at_once(self) -> dict[Any, Answer]:
        """All of Ray's answers, fetched by one call, which costs least; none where there is something to say of one."""
        ray, calls = self._pool.ray, list(self._by_ray)
        if not calls or self._by_line:
            return {}
        try:
            return dict(zip(calls, ray.get(calls, timeout=self._pool.timeout), strict=True))
        except ray.exceptions.RayError:
            return {}

    def _next_of_ray(self, arrived: dict[Any, Answer]) -> None:
        ray = self._pool.ray
        done = list(arrived)[:1] or ray.wait(list(self._by_ray), num_returns=1, timeout=self._left())[0]
        if not done:
            now = time.monotonic()
            for ref in [ref for ref, deadline in self._deadlines().items() if deadline <= now]:
                self._failed(self._by_ray.pop(ref), self._no_answer())
            return
        call = self._by_ray.pop(done[0])
        try:
            answer = arrived.pop(done[0], None) or ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            self._refused(call, error.cause, error)
        except ray.exceptions.RayError as error:
            self._failed(call, error)
        else:
            self._keep(call, answer)
            self._pool.offer(self._replica(call))

    def _keep(self, call: _Call, answer: Answer) -> None:
        expected = sum(file.rows for file in self._files[call.shard])
        if answer.rows != expected:
            raise GoneError(f"shard {call.shard} looked at {answer.rows} codes, expected {expected}")
        self._replica(call).answered = True
        self._answers[call.shard] = answer

    def _refused(self, call: _Call, cause: Exception, error: Exception) -> None:
        """What the worker itself raised: `cause`, which came as `error`."""
        if not isinstance(cause, GoneError | OSError | MemoryError):  # those are perhaps of that node alone
            raise cause if isinstance(cause, InputError) else error from None
        self._failed(call, cause)

    def _no_answer(self) -> TimeoutError:
        return TimeoutError(f"no answer in {self._pool.timeout:g} s")

    def _failed(self, call: _Call, error: Exception) -> None:
        """Another replica is asked, or after a while all of them again; ShardLostError where that is over."""
        replicas = self._pool.shards[call.shard]
        call.tried.add(call.replica)
        call.why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        replicas[call.replica].doubted = time.monotonic()
        if self._pool.closed:
            raise InputError("this ShardedIndex was closed while it was searched") from None
        if self._send(call):
            return
        if isinstance(error, GoneError):
            raise error
        if len(replicas) > 1 and time.monotonic() - self._begun < self._wait:
            time.sleep(_PAUSE)  # Ray is starting them anew
            call.tried.clear()
            self._send(call)
        elif not self._partial:
            rows = sum(file.rows for file in self._files[call.shard])
            raise ShardLostError(
                call.shard,
                f"shard {call.shard} of {len(self._files)} ({rows} codes) does not answer, nor does a replica "
                f"({len(replicas)} of it): {call.why}; Ray starts it anew, so ask again, or go without it "
                "(partial=True, --partial)",
            )

    def _deadlines(self) -> dict[Any, float]:
        """When each call by Ray counts as lost; one whose actor is being started never does."""
        timeout = self._pool.timeout
        if timeout is None:
            return {}
        return {ref: call.sent + timeout for ref, call in self._by_ray.items() if self._replica(call).answered}

    def _left(self) -> float | None:
        """Seconds until the next call counts as lost."""
        if self._pool.timeout is None:
            return None
        now = time.monotonic()
        return max(0.0, min(self._deadlines().values(), default=now + self._pool.timeout) - now)
