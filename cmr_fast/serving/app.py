"""The endpoints: POST /search, GET /health, /metrics, /items/ID, and the page at /."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import prometheus_client as prometheus
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cmr_fast.distributed import OverloadedError, ShardLostError
from cmr_fast.errors import InputError
from cmr_fast.ops import pack_codes
from cmr_fast.serving.galleries import Gallery
from cmr_fast.serving.requests import Asked, RefusedError, check_size, queries_of, read_json, read_parameters
from cmr_fast.serving.searchable import Found, Searchable

T = TypeVar("T")
_PAGE = Path(__file__).with_name("page.html")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' data:;"
_POLICY += " connect-src 'self'"
_SOON, _LATER = "1", "5"  # seconds, of Retry-After
_PATIENCE = 60.0  # seconds for a body to come, since it takes the place of a search
_DROPPED = 16  # times the largest body, which are read and dropped: a client that is cut off sees no answer
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """What /metrics shows, of one server."""

    def __init__(self, index: Searchable) -> None:
        self.registry = prometheus.CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus.Counter("cmr_fast_requests", "Searches, by what became of them", ["outcome"], **made)
        self.queries = prometheus.Counter("cmr_fast_queries", "Queries that were answered", **made)
        self.seconds = prometheus.Histogram(
            "cmr_fast_search_seconds", "From the body's last byte to the answer", buckets=_BUCKETS, **made
        )
        self.queue = prometheus.Gauge("cmr_fast_queue", "Searches under way or waiting", **made)
        self.lost = prometheus.Gauge("cmr_fast_lost_shards", "Lost shards, by the last search or /health", **made)
        prometheus.Gauge("cmr_fast_codes", "Codes of the index", **made).set_function(lambda: index.count)
        for outcome in ("ok", "partial", "refused", "overloaded", "lost", "failed"):
            self.requests.labels(outcome)


def make_app(
    index: Searchable, gallery: Gallery | None = None, *, most_bytes: int = 8 << 20, most_requests: int = 64
) -> FastAPI:
    """The server's application.

    Parameters
    ----------
    index : Searchable
        What is searched.
    gallery : Gallery, optional
        A run that encodes captions and images, and what ids stand for; None: queries are codes alone.
    most_bytes : int
        Of a body; larger ones are refused (413).
    most_requests : int
        Searches under way at once; more are refused (503, Retry-After).
    """
    app = FastAPI(title="cmr-fast serve", docs_url=None, redoc_url=None)
    metrics, under_way = Metrics(index), 0
    begun = f"{time.time_ns():x}"  # in addresses of items, which browsers keep: another server has others
    pool = ThreadPoolExecutor(most_requests, "search")

    async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *arguments))

    @app.post("/search", openapi_extra={"requestBody": _described()})
    async def search(request: Request) -> Response:
        """The nearest of each query."""
        nonlocal under_way
        if under_way >= most_requests:
            metrics.requests.labels("overloaded").inc()
            return _error(
                503, f"{under_way} searches are under way, {most_requests} are allowed", {"Retry-After": _SOON}
            )
        under_way += 1
        metrics.queue.set(under_way)
        try:
            body = await _body(request, most_bytes)
            since = time.perf_counter()
            answer = await in_thread(_answered, index, gallery, request, body)
            metrics.seconds.observe(time.perf_counter() - since)
            metrics.queries.inc(len(answer["ids"]))
            metrics.lost.set(len(answer.get("missing", ())))
            outcome, response = "partial" if answer.get("missing") else "ok", JSONResponse(answer)
        except RefusedError as error:
            outcome, response = "refused", _error(error.status, str(error), error.headers)
        except OverloadedError as error:
            outcome, response = "overloaded", _error(503, str(error), {"Retry-After": _SOON})
        except ShardLostError as error:
            metrics.lost.set(1)
            outcome, response = "lost", _error(503, str(error), {"Retry-After": _LATER}, shard=error.shard)
        except InputError as error:  # of the index's files, since what was asked is checked by then
            outcome, response = "failed", _error(503, str(error))
        except Exception:
            logging.getLogger("cmr_fast.serving").exception("a search failed")
            outcome, response = "failed", _error(500, "the search failed; the server's log says why")
        finally:
            under_way -= 1
            metrics.queue.set(under_way)
        metrics.requests.labels(outcome).inc()
        return response

    @app.get("/health")
    async def health() -> Response:
        """200 where every shard answers, else 503 with what is lost."""
        said: dict[str, Any] = {"bits": index.bits, "codes": index.count}
        try:
            lost = await asyncio.to_thread(index.lost)
        except InputError as error:  # a file that was changed
            return JSONResponse({"status": "damaged", **said, "error": str(error)}, 503)
        metrics.lost.set(len(lost))
        said["shards"] = {"all": index.shards, "alive": index.shards - len(lost)}
        if not lost:
            return JSONResponse({"status": "ok", **said})
        return JSONResponse({"status": "lost", **said, "lost": {str(n): codes for n, codes in lost.items()}}, 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Prometheus' text."""
        return Response(prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/items/{number}")
    async def item(number: int) -> Response:
        """The image or the caption that an id of the index stands for."""
        if gallery is None or not 0 <= number < gallery.count:
            raise HTTPException(404, "no such item" if gallery else "no items: the server was started without --run")
        try:
            kind, content = await asyncio.to_thread(gallery.item, number)
        except InputError as error:  # a photo that is gone
            return _error(503, str(error))
        kept = {"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=kind, headers=kept)

    @app.get("/")
    async def page() -> Response:
        """The page to search with."""
        run = gallery.described() if gallery else None
        said = {"bits": index.bits, "codes": index.count, "run": run, "begun": begun}
        text = _PAGE.read_text("utf-8").replace("{{settings}}", json.dumps(said).replace("<", "\\u003c"))
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), error.headers or {})

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(422, f"{first['loc'][-1]}: {first['msg']}")

    return app


def _described() -> dict[str, Any]:
    image = {"schema": {"type": "string", "format": "binary"}}
    return {"content": {"application/json": {"schema": Asked.model_json_schema()}, "image/*": image}}


def _error(status: int, why: str, headers: Any = None, **more: Any) -> JSONResponse:
    return JSONResponse({"error": why, **more}, status, headers)


async def _body(request: Request, most: int) -> bytes:
    """The request's body. RefusedError 413 where it is longer than `most`, 408 where it does not come."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > _DROPPED * most:
                    break
    except TimeoutError:
        raise RefusedError(408, f"expected the body in {_PATIENCE:g} s") from None
    except ClientDisconnect:
        raise RefusedError(400, "the client went before its body had come") from None
    if size > most:
        raise RefusedError(413, f"expected a body of at most {most} bytes")
    return b"".join(parts)


def _answered(index: Searchable, gallery: Gallery | None, request: Request, body: bytes) -> dict[str, Any]:
    """The JSON that answers a request to search."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    image = body if kind.startswith("image/") else None
    if image is None and kind != "application/json":
        raise RefusedError(415, f"expected a body of application/json or image/..., got {kind}")
    asked = read_json(body) if image is None else read_parameters(request.query_params)
    given = [name for name in ("codes", "text", "row") if getattr(asked, name) is not None]
    if image is None and len(given) != 1:
        raise RefusedError(422, f"expected one of codes, text and row, got {' and '.join(given) or 'none'}")
    k = min(asked.k, max(1, index.count))
    if given == ["codes"]:
        if asked.by != "codes" or asked.attacked:
            raise RefusedError(422, "codes are compared as they are: expected text, row or an image for an embedding")
        return _hits(index, queries_of(asked.codes, index.bits), k, asked)
    if gallery is None:
        raise RefusedError(422, "expected codes: the server was started without --run, so that it encodes nothing")
    if asked.by == "embeddings" and (asked.radius is not None or asked.where is not None):
        raise RefusedError(422, "radius and where are for codes, got by: embeddings")
    try:
        query = gallery.query(asked.text, image, asked.row, asked.modality, asked.attacked)
    except InputError as error:
        raise RefusedError(422, str(error)) from error
    if asked.by == "codes":
        answer = _hits(index, pack_codes(query.signs, threshold=0.0).numpy(), k, asked)
    else:
        distances, ids = gallery.nearest(query, k)
        answer = {"bits": index.bits, "distances": [distances], "ids": [ids]}
    return answer | {"query": query.shown}


def _hits(index: Searchable, codes: Any, k: int, asked: Asked) -> dict[str, Any]:
    check_size(len(codes), k)
    try:
        found = index.search(codes, k, asked.radius, asked.where)
    except InputError as error:
        if asked.where is None:
            raise
        raise RefusedError(422, str(error)) from error
    return _listed(found, index.bits)


def _listed(found: Found, bits: int) -> dict[str, Any]:
    """Distances and ids of each query without the padding, and what is missing."""
    kept = (found.distances <= bits).sum(axis=1).tolist()
    answer: dict[str, Any] = {"bits": bits}
    for name in ("distances", "ids"):
        answer[name] = [row[:n] for row, n in zip(getattr(found, name).tolist(), kept, strict=True)]
    if found.missing:
        answer |= {"missing": list(found.missing), "missing_codes": found.missing_codes}
    return answer
