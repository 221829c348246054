"""Whether the hub of pretrained models can be reached: its own client tries for half a minute a file, and says each."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 3.0


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
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = bool(before) or not (Path(name).is_dir() or reached(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def reached(endpoint: str) -> bool:
    """Whether a connection to an address comes about; behind a proxy that is for the proxy to say.

    Parameters
    ----------
    endpoint
        https://huggingface.co, or what HF_ENDPOINT names.
    """
    place = urlsplit(endpoint)
    if urllib.request.getproxies().get(place.scheme) and not urllib.request.proxy_bypass(place.hostname or ""):
        return True
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=SECONDS):
            return True
    except OSError:
        return False
