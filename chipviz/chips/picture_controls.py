"""Reference classifiers of pictures: how far do small grey pictures, or colours alone, get?"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from chipviz.data.processor import PictureReader
from chipviz.data.task import Examples, Task

SIDE = 16
"""Pixels of a side of the grey picture."""
LEVELS = 6
"""Levels of each colour in a histogram."""
STRENGTHS = (1e-3, 1e-2, 1e-1)
MOST = 5_000
"""Maximum training pictures."""

Found = tuple[float, float]
"""Accuracy on validation and on test."""


def grey_pixels(picture: Image.Image) -> NDArray[np.float32]:
    """A small grey picture, shape (`SIDE`²,)."""
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).ravel() / np.float32(255)


def colour_histogram(picture: Image.Image) -> NDArray[np.float32]:
    """Shares of the pixels by colour, shape (`LEVELS`³,)."""
    pixels = np.asarray(picture.resize((64, 64)), dtype=np.int64).reshape(-1, 3)
    levels = pixels * LEVELS // 256
    places = (levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]
    counts = np.bincount(places, minlength=LEVELS**3)
    return counts.astype(np.float32) / np.float32(len(pixels))


def measure_pictures(task: Task, reader: PictureReader) -> tuple[Found, Found]:
    """Accuracy of grey pixels and of colours with logistic regression, C chosen on validation.

    Each picture is opened once.

    Args:
        task: The pictures.
        reader: Opens them.

    Returns:
        Of pixels and of colours, each on validation and on test.
    """
    train, fold = task.splits["train"], task.fold
    if fold is not None:  # those of the pictures that are taken
        fold = np.concatenate([fold[:MOST], fold[max(MOST, len(train)) :]])
    train = train.take(range(min(MOST, len(train))))
    rows = (train, task.splits["validation"], task.splits["test"])
    seen = [_views(reader, one) for one in rows]
    labels = [one.labels for one in rows]
    with threadpool_limits(1):
        pixels, colours = (_best([views[i] for views in seen], labels, fold=fold) for i in (0, 1))
    return pixels, colours


def _views(reader: PictureReader, rows: Examples) -> tuple[NDArray[np.float32], ...]:
    found = [
        (grey_pixels(picture), colour_histogram(picture))
        for picture in map(reader.open, rows.texts)
    ]
    pixels, colours = zip(*found, strict=True)
    return np.stack(pixels), np.stack(colours)


def _best(
    features: list[NDArray[np.float32]],
    labels: list[NDArray[np.int64]],
    *,
    fold: NDArray[np.int64] | None,
) -> Found:
    """Accuracy on validation and test at the strength that validation prefers.

    With folds, validation means all labelled pictures, each judged by a model of the other folds.
    """
    (train, validation, test), (y, y_validation, y_test) = features, labels
    if fold is None:
        said = {c: _fitted(train, y, c) for c in STRENGTHS}
        right = {c: float(np.mean(m.predict(validation) == y_validation)) for c, m in said.items()}
        best = max(STRENGTHS, key=lambda c: right[c])
        return right[best], float(np.mean(said[best].predict(test) == y_test))
    both, y_both = np.concatenate([train, validation]), np.concatenate([y, y_validation])
    hits = dict.fromkeys(STRENGTHS, 0)
    for one in np.unique(fold):
        for c in STRENGTHS:
            model = _fitted(both[fold != one], y_both[fold != one], c)
            hits[c] += int(np.sum(model.predict(both[fold == one]) == y_both[fold == one]))
    best = max(STRENGTHS, key=lambda c: hits[c])
    on_test = _fitted(both, y_both, best).predict(test)
    return hits[best] / len(y_both), float(np.mean(on_test == y_test))


def _fitted(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> Any:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    return model.fit(features, labels)
