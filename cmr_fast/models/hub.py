"""Whether the hub of pretrained models can be reached: its own client tries for half a minute a file, and says each."""

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECONDS = 3.0
_lock, _inside = threading.Lock(), 0


@contextmanager
def hub_for(name: str | Path) -> Iterator[None]:
    """Inside, a name that is no folder is looked for in the hub's cache alone where the hub cannot be reached.

    Parameters
    ----------
    name
        Of a model: a folder, which needs no hub, or a name there.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    if constants.HF_HUB_OFFLINE or Path(name).is_dir() or reached(constants.ENDPOINT):
        yield
        return
    with _offline(constants):
        yield


@contextmanager
def _offline(constants: Any) -> Iterator[None]:
    """The hub's client asks nobody, for as long as any thread is in here."""
    global _inside
    with _lock:
        _inside += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            constants.HF_HUB_OFFLINE = _inside > 0


def reached(endpoint: str) -> bool:
    """Whether a connection to an address comes about; behind a proxy that is for the proxy to say.

    Parameters
    ----------
    endpoint
        https://huggingface.co, or what HF_ENDPOINT names.
    """
    place = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    if (proxies.get(place.scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(place.hostname or ""):
        return True
    try:
        with socket.create_connection(
            (place.hostname or "", place.port or (80 if place.scheme == "http" else 443)), timeout=SECONDS
        ):
            return True
    except OSError:
        return False
