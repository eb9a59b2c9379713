"""Several chips on one backbone as a web service: every task answered, or one by its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from chipviz.bundle.batcher import Batcher
from chipviz.bundle.joined import load_joined
from chipviz.bundle.metadata import Metadata
from chipviz.bundle.serve import ClassifyBody, OnePrediction, in_vllm_shape
from chipviz.bundle.web import TIMEOUT_S, Body, RefusedError, in_line, service, warm
from chipviz.errors import ConfigError
from chipviz.results.answers import Prediction

Each = dict[str, Prediction]
"""What every task says of a text."""


class TasksBody(Body):
    """Texts for all tasks."""

    texts: list[str] = Field(description="Raw texts.")
    text_pairs: list[str] | None = Field(None, description="Second texts, one to each.")


class TaskPredictions(BaseModel):
    """Answers in the order of the texts: one a task."""

    predictions: list[dict[str, OnePrediction]]


def refuse_mixed(tasks: Mapping[str, Metadata]) -> bool:
    """Whether the tasks read two texts.

    Raises:
        ConfigError: If some do and others do not: a request could not be right for all.
    """
    pairs = {metadata.takes_pair for metadata in tasks.values()}
    if len(pairs) > 1:
        raise ConfigError(
            "Some of these tasks read two texts and some one.", "Serve their bundles by themselves."
        )
    return pairs.pop()


def open_batcher(folder: Path, *, pair: bool) -> Batcher[Each]:
    """What answers the texts of a joined folder, loaded and warm.

    Args:
        folder: The folder.
        pair: Whether its tasks read two texts.

    Raises:
        BundleError: If it cannot be loaded.
    """
    return warm(lambda: load_joined(folder).predict, pair=pair)


def make_app(
    tasks: Mapping[str, Metadata],
    batcher: Batcher[Each],
    *,
    name: str,
    key: str | None = None,
    hosts: Sequence[str] = ("*",),
    timeout_s: float = TIMEOUT_S,
) -> FastAPI:
    """The service of a joined folder.

    Args:
        tasks: Of the folder, by name.
        batcher: Answers its texts. Closed when the service ends.
        name: What the model is called in answers.
        key: See `chipviz.bundle.web.service`.
        hosts: See there.
        timeout_s: Seconds that a request may wait and compute.

    Raises:
        ConfigError: If the tasks read one text and two.
    """
    labels = {task: metadata.task.label_names for task, metadata in tasks.items()}
    app = service(name, labels, batcher, key=key, hosts=hosts)
    answer = in_line(batcher, timeout_s, takes_pair=refuse_mixed(tasks))

    @app.post("/predict")
    async def predict(body: TasksBody) -> TaskPredictions:
        """Answer every task for texts."""
        found = await answer(body.texts, body.text_pairs)
        return TaskPredictions(
            predictions=[
                {task: OnePrediction.of(said) for task, said in row.items()} for row in found
            ]
        )

    @app.post("/classify")
    async def classify(body: ClassifyBody) -> dict[str, Any]:
        """Answer the task that `model` names, in vLLM's shape."""
        if body.model not in labels:
            known = ", ".join(labels)
            raise RefusedError(404, "`model` names no task.", f"Tasks: {known}.")
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = [row[body.model] for row in await answer(texts, None)]
        return in_vllm_shape(found, labels[body.model], body.model)

    return app
