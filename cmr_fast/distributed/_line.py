"""A Unix socket from a caller to an actor on the caller's own machine: a call by it costs a quarter of one by Ray.

Ray places actors, starts lost ones anew, and carries calls between machines. The socket lies in a folder that only the
caller's user may enter. Whatever goes wrong with it, the call is made by Ray instead, which knows what became of the
actor.
"""

import threading
from multiprocessing.connection import Client, Connection, Listener
from typing import Any


def serve(address: str, target: object) -> None:
    """Answer calls of the target's methods at this address, one by one, in a thread; OSError where none can be."""
    listener = Listener(address, "AF_UNIX")
    threading.Thread(target=_accept, args=(listener, target), name="cmr_fast line", daemon=True).start()


def _accept(listener: Listener, target: object) -> None:
    while True:
        try:
            with listener.accept() as connection:
                _answer(connection, target)
        except (OSError, EOFError):  # the caller is gone
            continue


def _answer(connection: Any, target: object) -> None:
    while True:
        number, method, arguments = connection.recv()
        try:
            found = getattr(target, method)(*arguments)
        except Exception as error:
            found = error
        connection.send((number, found))


class Line:
    """The caller's end. One call at a time: `take` it, `send`, `receive`, `give_back`."""

    def __init__(self, address: str) -> None:
        self._connection: Connection[Any, Any] = Client(address, "AF_UNIX")
        self._lock = threading.Lock()
        self._number = 0
        self.broken = False

    def take(self) -> bool:
        """Whether nobody else is using it."""
        return not self.broken and self._lock.acquire(blocking=False)

    def give_back(self) -> None:
        """End a call, answered or not."""
        self._lock.release()

    def send(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Begin a call; OSError where the actor is gone."""
        self._number += 1
        try:
            self._connection.send((self._number, method, arguments))
        except BaseException:  # perhaps a part of it was sent
            self.close()
            raise

    def receive(self, timeout: float | None) -> Any:
        """What the call returned or raised; EOFError or OSError: the actor is gone; TimeoutError after `timeout`."""
        try:
            while True:
                if not self._connection.poll(timeout):
                    raise TimeoutError
                number, found = self._connection.recv()
                if number == self._number:  # others are of calls that were given up
                    return found
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it for good."""
        self.broken = True
        self._connection.close()
