"""Ray actors that answer for shards, `replicas` of each, and what happens when one is lost.

Ray starts a lost actor anew, from its constructor alone. Since every call names its files, such an actor answers as the
one before; until it is there, another replica does.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cmr_fast.distributed._worker import Answer, ShardWorker
from cmr_fast.errors import InputError
from cmr_fast.retrieval._shards import GoneError, ShardFile

_OLDEST = (2, 9)
_PAUSE = 0.05  # seconds between two attempts, while actors start anew
_DOUBT = 2.0  # seconds for which a replica that failed comes last


class ShardLostError(RuntimeError):
    """A shard does not answer, and no replica of it does. `shard` is its number."""

    def __init__(self, shard: int, why: str) -> None:
        super().__init__(why)
        self.shard = shard


@dataclass
class _Replica:
    actor: Any
    doubted: float = 0.0  # when it failed last
    answered: bool = False  # before, it is being started, which no timeout is for


@dataclass
class _Call:
    """A call of one shard that is to be answered."""

    shard: int
    tried: set[int] = field(default_factory=set)
    replica: int = -1
    sent: float = 0.0
    why: str = ""


def ray_module() -> Any:
    """Ray, started where it is not yet; InputError where it is absent or too old."""
    try:
        import ray
    except ImportError as error:
        raise InputError("sharded search needs Ray: pip install 'cmr-fast[dist]'") from error
    found = version("ray")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise InputError(f"sharded search needs Ray {'.'.join(map(str, _OLDEST))} or later, found {found}")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray


class Pool:
    """Actors for the shards 0, 1, 2 and so on; more are begun as shards are."""

    def __init__(
        self,
        folder: Path,
        bits: int,
        replicas: int,
        mmap: bool,
        threads: int | None,
        timeout: float | None,
        wait: float,
    ) -> None:
        self._ray = ray_module()
        self._make = self._ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)(ShardWorker)
        self._folder, self._bits, self._mmap, self._threads = str(folder.resolve()), bits, mmap, threads
        self._replicas, self._timeout, self._wait = replicas, timeout, wait
        self._turn = itertools.count()
        self._closed = False
        self.shards: list[list[_Replica]] = []

    def grow(self, shards: int) -> None:
        """Begin actors until there are so many shards."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = [node for node in self._ray.nodes() if node["Alive"]]
        nodes = sorted(alive, key=lambda node: (-node["Resources"].get("CPU", 0), node["NodeID"]))
        while len(self.shards) < shards:
            number, actors = len(self.shards), []
            for replica in range(self._replicas):
                node = nodes[(number + replica) % len(nodes)]  # replicas of a shard on nodes of their own, if there are
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
                share = -(-shards * self._replicas // len(nodes))  # actors of a node
                threads = self._threads or max(1, int(node["Resources"].get("CPU", 1)) // share)
                make = self._make.options(scheduling_strategy=where)
                actors.append(_Replica(make.remote(self._folder, self._bits, self._mmap, threads)))
            self.shards.append(actors)

    def ask(
        self,
        method: str,
        files: Sequence[tuple[ShardFile, ...]],
        arguments: Callable[[int], tuple[Any, ...]],
        partial: bool = False,
        wait: float | None = None,
    ) -> dict[int, Answer]:
        """Each shard's answer, that has files, by its number; shards without an answer are missing where `partial`.

        wait    seconds for lost replicas to come back; None: those of the pool

        Raises
        ------
        ShardLostError
            Where a shard has no answer, and not `partial`.
        GoneError
            Where the files of a shard are gone, for each of its replicas.
        """
        if self._closed:
            raise InputError("this ShardedIndex was closed; open the folder again")
        self.grow(len(files))
        ray, answers = self._ray, dict[int, Answer]()
        pending: dict[Any, _Call] = {}
        wait = self._wait if wait is None else wait
        begun = time.monotonic()

        def send(call: _Call) -> bool:
            replicas = self.shards[call.shard]
            left = [number for number in range(len(replicas)) if number not in call.tried]
            if not left:
                return False
            turn, now = next(self._turn), time.monotonic()
            call.replica = min(left, key=lambda n: (now - replicas[n].doubted < _DOUBT, (n + turn) % len(replicas)))
            call.sent = now
            actor = replicas[call.replica].actor
            pending[getattr(actor, method).remote(files[call.shard], *arguments(call.shard))] = call
            return True

        def failed(call: _Call, error: Exception) -> None:
            call.tried.add(call.replica)
            call.why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            self.shards[call.shard][call.replica].doubted = time.monotonic()
            if send(call):
                return
            if isinstance(error, GoneError):
                raise error
            if len(self.shards[call.shard]) > 1 and time.monotonic() - begun < wait:
                time.sleep(_PAUSE)  # Ray is starting them anew
                call.tried.clear()
                send(call)
            elif not partial:
                rows = sum(file.rows for file in files[call.shard])
                raise ShardLostError(
                    call.shard,
                    f"shard {call.shard} of {len(files)} ({rows} codes) does not answer, nor does a replica "
                    f"({len(self.shards[call.shard])} of it): {call.why}; Ray starts it anew, so ask again, or with "
                    "partial=True go without it",
                )

        for number, held in enumerate(files):
            if held:
                send(_Call(number))
        arrived = self._at_once(list(pending))
        while pending:
            done = list(arrived)[:1] or ray.wait(list(pending), num_returns=1, timeout=self._left(pending))[0]
            if not done:
                for ref in [ref for ref, deadline in self._deadlines(pending).items() if deadline <= time.monotonic()]:
                    failed(pending.pop(ref), TimeoutError(f"no answer in {self._timeout:g} s"))
                continue
            call = pending.pop(done[0])
            try:
                answer = arrived.pop(done[0], None) or ray.get(done[0])
            except ray.exceptions.RayTaskError as error:  # the worker itself refused
                cause = error.cause
                if isinstance(cause, GoneError | OSError | MemoryError):  # perhaps of that node alone
                    failed(call, cause)
                    continue
                raise cause if isinstance(cause, InputError) else error from None
            except ray.exceptions.RayError as error:
                failed(call, error)
                continue
            expected = sum(file.rows for file in files[call.shard])
            if answer.rows != expected:
                raise GoneError(f"shard {call.shard} looked at {answer.rows} codes, expected {expected}")
            self.shards[call.shard][call.replica].answered = True
            answers[call.shard] = answer
        return answers

    def _at_once(self, calls: list[Any]) -> dict[Any, Answer]:
        """All answers, fetched by one call, which costs least; none where there is something to say about one."""
        try:
            return dict(zip(calls, self._ray.get(calls, timeout=self._timeout), strict=True))
        except self._ray.exceptions.RayError:
            return {}

    def _deadlines(self, pending: dict[Any, _Call]) -> dict[Any, float]:
        """When each call counts as lost; one whose actor is being started never does."""
        if self._timeout is None:
            return {}
        running = {ref: call for ref, call in pending.items() if self.shards[call.shard][call.replica].answered}
        return {ref: call.sent + self._timeout for ref, call in running.items()}

    def _left(self, pending: dict[Any, _Call]) -> float | None:
        """Seconds until the next call counts as lost."""
        if self._timeout is None:
            return None
        now = time.monotonic()
        return max(0.0, min(self._deadlines(pending).values(), default=now + self._timeout) - now)

    def stored(self, value: Any) -> Any:
        """A reference to a value in Ray's object store, which calls take in place of the value."""
        return self._ray.put(value)

    def close(self) -> None:
        """End the actors; nothing can be asked any more."""
        self._closed = True
        for replica in itertools.chain.from_iterable(self.shards):
            self._ray.kill(replica.actor, no_restart=True)
        self.shards = []
