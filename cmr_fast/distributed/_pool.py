"""Ray actors that answer for shards, `replicas` of each, and what happens when one is lost.

Ray starts a lost actor anew, from its constructor alone. Since every call names its files, such an actor answers as the
one before; until it is there, another replica does.
"""

import itertools
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cmr_fast.distributed._asking import Asking, Replica
from cmr_fast.distributed._line import Line
from cmr_fast.distributed._worker import Answer, ShardWorker
from cmr_fast.errors import InputError
from cmr_fast.retrieval._shards import ShardFile

_OLDEST = (2, 9)


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


def _removed(folder: str, process: int) -> None:
    if os.getpid() == process:  # not a child that was forked
        shutil.rmtree(folder, ignore_errors=True)


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
        self.ray = ray_module()
        self._make = self.ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)(ShardWorker)
        self._folder, self._bits, self._mmap, self._threads = str(folder.resolve()), bits, mmap, threads
        self._replicas, self.timeout, self.wait = replicas, timeout, wait
        self._turn = itertools.count()
        self.closed = False
        self._sockets = tempfile.mkdtemp(prefix="cmr_fast-")
        self._sweep = weakref.finalize(self, _removed, self._sockets, os.getpid())
        self._lines = threading.Lock()
        self.shards: list[list[Replica]] = []

    def grow(self, shards: int) -> None:
        """Begin actors until there are so many shards."""
        if len(self.shards) >= shards:
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = [node for node in self.ray.nodes() if node["Alive"]]
        nodes = sorted(alive, key=lambda node: (-node["Resources"].get("CPU", 0), node["NodeID"]))
        while len(self.shards) < shards:
            number, actors = len(self.shards), []
            for replica in range(self._replicas):
                node = nodes[(number + replica) % len(nodes)]  # replicas of a shard on nodes of their own, if there are
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
                share = -(-shards * self._replicas // len(nodes))  # actors of a node
                threads = self._threads or max(1, int(node["Resources"].get("CPU", 1)) // share)
                make = self._make.options(scheduling_strategy=where)
                actors.append(Replica(make.remote(self._folder, self._bits, self._mmap, threads)))
            self.shards.append(actors)

    def ask(
        self,
        method: str,
        files: Sequence[tuple[ShardFile, ...]],
        arguments: Callable[[int], tuple[Any, ...]],
        partial: bool = False,
        wait: float | None = None,
        direct: bool = False,
    ) -> dict[int, Answer]:
        """Each shard's answer, that has files, by its number; shards without an answer are missing where `partial`.

        wait    seconds for lost replicas to come back; None: those of the pool
        direct  arguments and answers are few bytes, no reference of Ray's among them: a line may carry them

        Raises
        ------
        ShardLostError
            Where a shard has no answer, and not `partial`.
        GoneError
            Where the files of a shard are gone, for each of its replicas.
        """
        if self.closed:
            raise InputError("this ShardedIndex was closed; open the folder again")
        self.grow(len(files))
        return Asking(
            self, method, files, arguments, partial=partial, wait=self.wait if wait is None else wait, direct=direct
        ).answered()

    def line(self, replica: Replica) -> Line | None:
        """The replica's line, taken, where there is one and nobody else is using it."""
        with self._lines:
            if replica.offer is not None and self.ray.wait([replica.offer], timeout=0)[0]:
                listens, replica.offer = replica.offer, None
                try:
                    address = self.ray.get(listens)
                    replica.apart = address is None
                    replica.line = None if address is None else Line(address, self.timeout)
                except OSError:
                    replica.apart = True
                except self.ray.exceptions.RayError:
                    pass  # lost meanwhile
            line = replica.line
        return line if line is not None and line.take() else None

    def offer(self, replica: Replica) -> None:
        """Have a replica that answered Ray listen at a socket as well, unless it does, or is on another machine."""
        with self._lines:
            if replica.apart or replica.offer is not None or (replica.line is not None and not replica.line.broken):
                return
            replica.offer = replica.actor.listen.remote(self._sockets)

    def turn(self) -> int:
        """A number that rises with each question, so that replicas take turns."""
        return next(self._turn)

    def stored(self, value: Any) -> Any:
        """A reference to a value in Ray's object store, which calls take in place of the value."""
        return self.ray.put(value)

    def close(self) -> None:
        """End the actors; nothing can be asked any more."""
        self.closed = True
        for replica in itertools.chain.from_iterable(self.shards):
            self.ray.kill(replica.actor, no_restart=True)
        self._sweep()
