"""A server in front of an index: JSON over HTTP, health, metrics, and a page to search with.

`searchable` is the index that it asks, `requests` what a body means, `galleries` what a trained run makes of captions
and images, `app` the endpoints, `server` the socket and the signals.
"""

from cmr_fast.serving.app import make_app
from cmr_fast.serving.searchable import InProcess, OverShards
from cmr_fast.serving.server import listen, run, until_stopped

__all__ = ["InProcess", "OverShards", "listen", "make_app", "run", "until_stopped"]
