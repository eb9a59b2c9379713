"""A bundle as a web service: its own shape, text-embeddings-inference's and vLLM's."""

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from fastapi import FastAPI
from pydantic import BaseModel, Field

from chipviz.bundle.batcher import Batcher
from chipviz.bundle.classifier import load
from chipviz.bundle.fields import fields_of
from chipviz.bundle.metadata import Metadata
from chipviz.bundle.web import TIMEOUT_S, Answer, Body, RefusedError, in_line, service, warm
from chipviz.results.answers import Prediction


class PredictBody(Body):
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


class ClassifyBody(Body):
    """Texts as vLLM's `/classify` takes them."""

    input: str | list[str]
    model: str | None = None
    user: str | None = None


class OnePrediction(BaseModel):
    """The answer for one text."""

    label: str
    score: float
    probabilities: dict[str, float]

    @classmethod
    def of(cls, said: Prediction) -> "OnePrediction":
        """The same, without the layer."""
        return cls(label=said.label, score=said.score, probabilities=said.probabilities)


class Predictions(BaseModel):
    """Answers in the order of the texts."""

    predictions: list[OnePrediction]


def open_batcher(bundle: Path, *, pair: bool, adaptive: bool = False) -> Batcher[Prediction]:
    """What answers the texts of a bundle, loaded and warm.

    Args:
        bundle: The bundle's folder.
        pair: Whether it reads two texts.
        adaptive: Let texts leave at its early exits.

    Raises:
        BundleError: If it cannot be loaded.
    """
    return warm(lambda: load(bundle, adaptive=adaptive).predict, pair=pair)


def make_app(
    metadata: Metadata,
    batcher: Batcher[Prediction],
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
    app = service(name, metadata.task.label_names, batcher, key=key, hosts=hosts)
    _add_routes(app, metadata, name, in_line(batcher, timeout_s, takes_pair=metadata.takes_pair))
    return app


def _add_routes(app: FastAPI, metadata: Metadata, name: str, answer: Answer) -> None:
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
        return Predictions(predictions=[OnePrediction.of(p) for p in found])

    @app.post("/classify")
    async def classify(body: ClassifyBody) -> dict[str, Any]:
        """Classify texts, in vLLM's shape."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        return in_vllm_shape(await answer(texts, None), labels, name)


def in_vllm_shape(found: Sequence[Prediction], labels: Sequence[str], model: str) -> dict[str, Any]:
    """Answers as vLLM's `/classify` gives them."""
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
        "model": model,
        "data": data,
    }


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
