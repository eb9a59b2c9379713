"""A bundle as a web service: its own shape, text-embeddings-inference's and vLLM's."""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
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
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chipviz.bundle.batcher import Batcher, BusyError, Predict
from chipviz.bundle.classifier import load
from chipviz.bundle.fields import fields_of
from chipviz.bundle.metadata import Metadata
from chipviz.errors import ChipvizError
from chipviz.results.answers import Prediction

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


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictBody(_Body):
    """Texts in chipviz's own shape or as text-embeddings-inference takes them."""

    texts: list[str] | None = Field(None, description="Raw texts.")
    text_pairs: list[str] | None = Field(None, description="Second texts, one to each.")
    rows: list[dict[str, Any]] | None = Field(None, description="Rows with the run's columns.")
    inputs: str | list[str] | list[list[str]] | None = Field(
        None, description="As text-embeddings-inference takes them; the answer has its shape."
    )
    raw_scores: bool = Field(False, description="Of `inputs` alone, where true is refused.")
    truncate: bool | None = Field(None, description="Of `inputs`: texts are always cut as trained.")
    truncation_direction: str | None = None


class ClassifyBody(_Body):
    """Texts as vLLM's `/classify` takes them."""

    input: str | list[str]
    model: str | None = None
    user: str | None = None


class OnePrediction(BaseModel):
    """The answer for one text."""

    label: str
    score: float
    probabilities: dict[str, float]


class Predictions(BaseModel):
    """Answers in the order of the texts."""

    predictions: list[OnePrediction]


class RefusedError(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, message: str, hint: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.hint, self.headers = status, message, hint, headers


@dataclass(frozen=True)
class _Meters:
    registry: CollectorRegistry
    requests: Counter
    seconds: Histogram
    rows: Counter
    pass_requests: Histogram

    @classmethod
    def new(cls) -> "_Meters":
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
        self.pass_requests.observe(requests)
        self.rows.inc(rows)


def open_batcher(bundle: Path, *, pair: bool, adaptive: bool = False) -> Batcher:
    """What answers the texts of a bundle, loaded and warm.

    Args:
        bundle: The bundle's folder.
        pair: Whether it reads two texts.
        adaptive: Let texts leave at its early exits.

    Raises:
        BundleError: If it cannot be loaded.
    """

    def opening() -> Predict:
        predict: Predict = load(bundle, adaptive=adaptive).predict
        predict(["A first text."], ["A second."] if pair else None)  # memory and kernels
        return predict

    batcher = Batcher(opening)
    batcher.ready()
    return batcher


def make_app(
    metadata: Metadata,
    batcher: Batcher,
    *,
    name: str,
    key: str | None = None,
    hosts: Sequence[str] = ("*",),
    timeout_s: float = TIMEOUT_S,
) -> FastAPI:
    """The service of one loaded bundle.

    Args:
        metadata: Of the bundle.
        batcher: Answers its texts. Closed when the service ends.
        name: What the model is called in answers.
        key: What requests must carry. None lets everybody in who reaches the server.
        hosts: Names that it answers to. A page elsewhere may give this machine another name.
        timeout_s: Seconds that a request may wait and compute.
    """
    meters = _Meters.new()
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

    async def answer(texts: Sequence[str], pairs: Sequence[str] | None) -> list[Prediction]:
        _refuse_odd(metadata, texts, pairs)
        try:
            asked = asyncio.wrap_future(batcher.ask(texts, pairs))
            return await asyncio.wait_for(asked, timeout_s)
        except BusyError as busy:
            retry = {"Retry-After": str(round(busy.retry_s))}
            raise RefusedError(429, "Too many texts wait.", "Try again later.", **retry) from None
        except TimeoutError:
            raise RefusedError(504, f"No answer in {timeout_s:g} s.", "Send fewer texts.") from None

    _add_routes(app, metadata, name, meters, answer)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the service answers, and what it is."""
        labels = metadata.task.label_names
        return {"ok": True, "model": name, "labels": labels, "waiting": batcher.n_waiting}

    return app


Answer = Callable[[Sequence[str], Sequence[str] | None], Awaitable[list[Prediction]]]


def _add_routes(
    app: FastAPI, metadata: Metadata, name: str, meters: _Meters, answer: Answer
) -> None:
    labels = metadata.task.label_names

    @app.post("/predict", response_model=None)
    async def predict(body: PredictBody) -> Predictions | list[Any]:
        """Classify texts, or rows with the run's columns."""
        given = [body.texts, body.rows, body.inputs]
        if sum(one is not None for one in given) != 1:
            raise RefusedError(422, "Give either `texts`, `rows` or `inputs`.")
        if body.inputs is not None:
            texts, pairs, single = _of_inputs(body.inputs)
            if body.raw_scores:
                raise RefusedError(422, "Raw scores are not given.", "Leave out `raw_scores`.")
            shaped = [_sorted(p) for p in await answer(texts, pairs)]
            return shaped[0] if single else shaped
        texts, pairs = body.texts or [], body.text_pairs
        if body.rows is not None:
            texts, pairs = fields_of(pd.DataFrame(body.rows), metadata.task, metadata.preset)
        found = await answer(texts, pairs)
        return Predictions(
            predictions=[
                OnePrediction(label=p.label, score=p.score, probabilities=p.probabilities)
                for p in found
            ]
        )

    @app.post("/classify")
    async def classify(body: ClassifyBody) -> dict[str, Any]:
        """Classify texts, in vLLM's shape."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = await answer(texts, None)
        data = [
            {
                "index": i,
                "label": p.label,
                "probs": [p.probabilities[label] for label in labels],
                "num_classes": len(labels),
            }
            for i, p in enumerate(found)
        ]
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": name,
            "data": data,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)


def _add_guard(app: FastAPI, meters: _Meters, key: str | None) -> None:
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


def _refuse_odd(metadata: Metadata, texts: Sequence[str], pairs: Sequence[str] | None) -> None:
    """Refuse what the bundle cannot read, before it waits."""
    if not texts:
        raise RefusedError(422, "There is no text.", "Give one or more.")
    if len(texts) > MAX_TEXTS:
        raise RefusedError(413, f"A request may have {MAX_TEXTS} texts.", "Send several requests.")
    if any(len(text) > MAX_CHARS for text in [*texts, *(pairs or ())]):
        raise RefusedError(413, f"A text may have {MAX_CHARS:,} characters.", "Send its beginning.")
    if metadata.takes_pair != (pairs is not None) or len(pairs or texts) != len(texts):
        wanted = "two texts a row" if metadata.takes_pair else "one text a row"
        raise RefusedError(
            422, f"This bundle reads {wanted}.", 'Several `inputs` are lists: [["one"], ["two"]].'
        )


def _of_inputs(
    inputs: str | list[str] | list[list[str]],
) -> tuple[list[str], list[str] | None, bool]:
    """Texts, second texts and whether one alone was sent, as text-embeddings-inference reads it."""
    if isinstance(inputs, str):
        return [inputs], None, True
    if inputs and all(isinstance(one, str) for one in inputs):
        texts = [str(one) for one in inputs]
        # A list of two strings is one pair there; several texts are lists of one text each.
        if len(texts) > 2:
            raise RefusedError(
                422, "Several texts are lists of one text each.", 'Send [["one"], ["two"]].'
            )
        return texts[:1], texts[1:] or None, True
    rows = [list(one) for one in inputs]
    sizes = {len(row) for row in rows}
    if sizes == {1}:
        return [row[0] for row in rows], None, False
    if sizes == {2}:
        return [row[0] for row in rows], [row[1] for row in rows], False
    raise RefusedError(422, "Each of `inputs` is one text, or two.", "See /docs.")


def _sorted(prediction: Prediction) -> list[dict[str, Any]]:
    """Labels with scores, the best first."""
    shares = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    return [{"score": score, "label": label} for label, score in shares]
