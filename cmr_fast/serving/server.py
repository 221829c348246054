"""The socket, the signals and uvicorn."""

import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cmr_fast.errors import InputError

_GRACE = 30  # seconds for requests that are under way at the end
_STOP = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; requests that come before the server runs wait in it.

    Raises
    ------
    InputError
        Where the port is in use, not allowed, or the host is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host}: not a name or address of this machine ({error})") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port} of {host} is in use; --port {_free(host, port)} is free now") from error
        raise InputError(f"--port {port} of {host} cannot be listened at: {error.strerror}") from error
    return made


def _free(host: str, port: int) -> int:
    """The next port that nobody listens at, or 0, which takes any."""
    for other in range(port + 1, min(port + 100, 1 << 16)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, other))
            except OSError:
                continue
            return other
    return 0


@contextmanager
def until_stopped() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, and both end it without an error.

    Ctrl-C does so in a background job of a shell as well, which is started with SIGINT ignored.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in _STOP}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(app: Any, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then let requests that are under way finish; raises KeyboardInterrupt."""
    import uvicorn

    settings = uvicorn.Config(
        app, log_level="warning", lifespan="off", server_header=False, timeout_graceful_shutdown=_GRACE
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own in place
    uvicorn.Server(settings).run(sockets=[listening])  # which hands signals on, once it has stopped
