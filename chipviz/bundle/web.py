"""What every service of ours has: errors in sentences, a key, limits, counts, and a line."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chipviz.bundle.batcher import A, Batcher, BusyError, Predict
from chipviz.errors import ChipvizError

MAX_TEXTS = 512
"""Texts of one request, at most."""
MAX_CHARS = 1_000_000
"""Characters of one text, at most."""
MAX_BYTES = 16 << 20
"""Bytes of one request, at most."""
TIMEOUT_S = 60.0
_OPEN = ("/health", "/metrics", "/docs", "/openapi.json")
"""What answers without a key. None of it shows a text."""
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Body(BaseModel):
    """A request. What it does not know is refused."""

    model_config = ConfigDict(extra="forbid")


class RefusedError(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, message: str, hint: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.hint, self.headers = status, message, hint, headers


@dataclass(frozen=True)
class Meters:
    """Counts and times, for Prometheus."""

    registry: CollectorRegistry
    requests: Counter
    seconds: Histogram
    rows: Counter
    pass_requests: Histogram

    @classmethod
    def new(cls) -> "Meters":
        """All at zero."""
        registry = CollectorRegistry()
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        return cls(
            registry,
            Counter("chipviz_requests", "Requests.", ["path", "status"], registry=registry),
            Histogram(
                "chipviz_request_seconds",
                "Seconds of a request.",
                buckets=_TIMES,
                registry=registry,
            ),
            Counter("chipviz_texts", "Texts classified.", registry=registry),
            Histogram(
                "chipviz_pass_requests", "Requests of one pass.", buckets=sizes, registry=registry
            ),
        )

    def seen(self, requests: int, rows: int) -> None:
        """Count a pass."""
        self.pass_requests.observe(requests)
        self.rows.inc(rows)


Answer = Callable[[Sequence[str], Sequence[str] | None], Awaitable[list[Any]]]


def warm(load: Callable[[], Predict[A]], *, pair: bool) -> Batcher[A]:
    """A line before a model that is loaded and has answered once.

    Args:
        load: Loads it.
        pair: Whether it reads two texts.

    Raises:
        BundleError: If it cannot be loaded.
    """

    def opening() -> Predict[A]:
        predict = load()
        predict(["A first text."], ["A second."] if pair else None)  # memory and kernels
        return predict

    batcher = Batcher(opening)
    batcher.ready()
    return batcher


def service(
    name: str,
    labels: Any,
    batcher: Batcher[Any],
    *,
    key: str | None,
    hosts: Sequence[str],
) -> FastAPI:
    """A service without its questions: it says how it is, and lets in whom it should.

    Args:
        name: What the model is called in answers.
        labels: Of the classes, as /health says them.
        batcher: Answers its texts. Closed when the service ends.
        key: What requests must carry. None lets everybody in who reaches the server.
        hosts: Names that it answers to. A page elsewhere may give this machine another name.
    """
    meters = Meters.new()
    batcher.seen = meters.seen
    waiting = Gauge("chipviz_waiting_texts", "Texts that wait.", registry=meters.registry)
    waiting.set_function(lambda: batcher.n_waiting)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title=f"chipviz: {name}", lifespan=lifespan, redoc_url=None)
    _add_errors(app)
    app.add_middleware(_Limit)
    _add_guard(app, meters, key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the service answers, and what it is."""
        return {"ok": True, "model": name, "labels": labels, "waiting": batcher.n_waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def in_line(batcher: Batcher[Any], timeout_s: float, *, takes_pair: bool) -> Answer:
    """What answers texts: refuses what cannot be read, waits its turn, and no longer than this.

    Args:
        batcher: The line.
        timeout_s: Seconds that a request may wait and compute.
        takes_pair: Whether two texts a row are read.
    """

    async def answer(texts: Sequence[str], pairs: Sequence[str] | None) -> list[Any]:
        _refuse_odd(texts, pairs, takes_pair=takes_pair)
        try:
            asked = asyncio.wrap_future(batcher.ask(texts, pairs))
            return await asyncio.wait_for(asked, timeout_s)
        except BusyError as busy:
            retry = {"Retry-After": str(round(busy.retry_s))}
            raise RefusedError(429, "Too many texts wait.", "Try again later.", **retry) from None
        except TimeoutError:
            raise RefusedError(504, f"No answer in {timeout_s:g} s.", "Send fewer texts.") from None

    return answer


def _add_guard(app: FastAPI, meters: Meters, key: str | None) -> None:
    """Let in who has the key, and count."""

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        start, path = time.perf_counter(), request.url.path
        if key is not None and path not in _OPEN and not _has_key(request, key):
            response: Response = _said(401, "A key is wanted.", "Send `Authorization: Bearer KEY`.")
        else:
            response = await call_next(request)
        known = path if any(getattr(route, "path", None) == path for route in app.routes) else "*"
        meters.requests.labels(known, str(response.status_code)).inc()
        if known in ("/predict", "/classify"):
            meters.seconds.observe(time.perf_counter() - start)
        return response


class _Limit:
    """Breaks off requests that are too large, whatever length they say they have."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > MAX_BYTES:
                raise HTTPException(413, f"A request may have {MAX_BYTES:,} bytes.")
            return message

        await self._app(scope, counted, send)


def _add_errors(app: FastAPI) -> None:
    """Say every error in one shape: a sentence and a hint."""

    @app.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> Response:
        return _said(error.status, error.message, error.hint, **error.headers)

    @app.exception_handler(StarletteHTTPException)
    async def refused_by_the_web(_request: Request, error: StarletteHTTPException) -> Response:
        return _said(error.status_code, f"{error.detail}", "See /docs.")

    @app.exception_handler(ChipvizError)
    async def refused_by_us(_request: Request, error: ChipvizError) -> Response:
        return _said(422, error.message, error.hint)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:100]
        return _said(422, f"The request is malformed: {where} {first['msg']}.", "See /docs.")


def _said(status: int, message: str, hint: str = "", **headers: str) -> JSONResponse:
    return JSONResponse({"error": message, "hint": hint}, status_code=status, headers=headers)


def _has_key(request: Request, key: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    given = given or request.headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode(), key.encode())


def _refuse_odd(texts: Sequence[str], pairs: Sequence[str] | None, *, takes_pair: bool) -> None:
    """Refuse what the bundle cannot read, before it waits."""
    if not texts:
        raise RefusedError(422, "There is no text.", "Give one or more.")
    if len(texts) > MAX_TEXTS:
        raise RefusedError(413, f"A request may have {MAX_TEXTS} texts.", "Send several requests.")
    if any(len(text) > MAX_CHARS for text in [*texts, *(pairs or ())]):
        raise RefusedError(413, f"A text may have {MAX_CHARS:,} characters.", "Send its beginning.")
    if takes_pair != (pairs is not None) or len(pairs or texts) != len(texts):
        wanted = "two texts a row" if takes_pair else "one text a row"
        raise RefusedError(
            422, f"This bundle reads {wanted}.", 'Several `inputs` are lists: [["one"], ["two"]].'
        )
