"""A Unix socket from a caller to an actor on the caller's own machine: a call by it costs a quarter of one by Ray.

Ray places actors, starts lost ones anew, and carries calls between machines. The socket lies in a folder that only the
caller's user may enter. Whatever goes wrong with it, the call is made by Ray instead, which knows what became of the
actor. A call fits into the socket's buffer, and a line on which an answer was not waited for is closed, so that neither
end ever waits for the other to read.
"""

import socket
import struct
import threading
import traceback
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

MOST = 1 << 16
"""Bytes of a call's arrays, at most; a socket's buffer holds three times as many."""


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
        method, arguments = connection.recv()
        try:
            found = getattr(target, method)(*arguments)
        except Exception as error:
            error.add_note(f"in the actor:\n{traceback.format_exc()}")
            found = error
        connection.send(found)


class Line:
    """The caller's end. One call at a time: `take` it, `send`, `receive`, `give_back`.

    timeout     seconds after which a call that does not get on counts as lost; None waits
    """

    def __init__(self, address: str, timeout: float | None) -> None:
        self._connection: Connection[Any, Any] = Client(address, "AF_UNIX")
        self._timeout = timeout
        self._lock = threading.Lock()
        self.broken = False
        if timeout is not None:
            limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
            with socket.socket(fileno=self._connection.fileno()) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
                one.detach()

    def take(self) -> bool:
        """Whether it is whole and nobody else is using it."""
        if not self._lock.acquire(blocking=False):
            return False
        if self.broken:
            self._lock.release()
        return not self.broken

    def give_back(self, answered: bool = True) -> None:
        """End a call; without its answer the line is closed."""
        if not answered:
            self._close()
        self._lock.release()

    def send(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Begin a call; OSError where the actor is gone."""
        try:
            self._connection.send((method, arguments))
        except BaseException:  # perhaps a part of it was sent
            self._close()
            raise

    def receive(self) -> Any:
        """What the call returned or raised; EOFError, OSError: the actor is gone; TimeoutError: it does not answer."""
        try:
            if not self._connection.poll(self._timeout):
                raise TimeoutError
            return self._connection.recv()
        except BlockingIOError:  # it stopped in the middle of its answer
            self._close()
            raise TimeoutError from None
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        self.broken = True
        self._connection.close()
