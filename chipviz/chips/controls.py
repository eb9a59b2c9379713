"""Reference classifiers a chip has to beat."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from chipviz.chips.picture_controls import measure_pictures
from chipviz.data.processor import Reader
from chipviz.data.prompt import Prompt, as_read
from chipviz.data.task import Examples, Task
from chipviz.keys import EMBEDDING_LAYER, Split
from chipviz.results.metrics import Score
from chipviz.results.report import Controls

Fold = NDArray[np.int64] | None
TFIDF_STRENGTHS = (1.0, 10.0, 100.0)


def measure(
    task: Task, prompt: Reader, scores: Sequence[Score], *, any_cut: bool
) -> dict[Split, Controls]:
    """Accuracy of every control on validation and test.

    TF-IDF reads what the model reads: a control that sees more says nothing about the model. Beside
    it stands TF-IDF on whole texts, where the length limit cuts any. Of pictures, small grey ones
    and colours stand in its place.

    Args:
        task: The texts or pictures.
        prompt: Knows where a text is cut, or opens pictures.
        scores: Those of all chips. The embedding control is on the pooling that validation prefers.
        any_cut: Whether the limit cuts any text.
    """
    splits, fold = task.splits, task.fold
    beside: dict[str, tuple[float, float]] = {}
    if isinstance(prompt, Prompt):
        read = [as_read(prompt, splits[name]) for name in ("train", "validation", "test")]
        # Its products are so small that a second thread doubles their time, and trebles it where
        # threads wait asleep, as a worker's do.
        with threadpool_limits(1):
            beside["tfidf"] = tfidf(*read, fold=fold)
            if any_cut:
                whole = (splits["train"], splits["validation"], splits["test"])
                beside["tfidf_whole"] = tfidf(*whole, fold=fold)
    else:
        beside["pixels"], beside["colours"] = measure_pictures(task, prompt)
    # Feed-forward sites have no embedding, and one is enough of chips that join layers.
    plain = [s for s in scores if not s.key.joins and s.site in ("block", "raw")]
    embedding = [s for s in plain if s.layer == EMBEDDING_LAYER]
    best = max((s for s in embedding if s.split == "validation"), key=lambda s: s.accuracy)
    names: tuple[Split, Split] = ("validation", "test")
    train = splits["train"] if fold is None else task.judged("validation")
    return {
        name: Controls(
            majority=majority(train, task.judged(name)),
            embedding=next(
                s.accuracy for s in embedding if s.split == name and s.key.vector == best.key.vector
            ),
        ).model_copy(update={control: found[i] for control, found in beside.items()})
        for i, name in enumerate(names)
    }


def majority(train: Examples, rows: Examples) -> float:
    """Accuracy of always answering the commonest training class."""
    commonest = int(np.bincount(train.labels).argmax())
    return float(np.mean(rows.labels == commonest))


def tfidf(
    train: Examples, validation: Examples, test: Examples, *, fold: Fold = None
) -> tuple[float, float]:
    """Accuracy of TF-IDF words with logistic regression, its C chosen on validation.

    Args:
        train: The training texts.
        validation: The validation texts.
        test: The test texts.
        fold: Fold of each training and then of each validation text. With it C is chosen, as for
            chips, on all of them, each judged by a model of the other folds.

    Returns:
        Accuracy on validation and on test.
    """
    if fold is None:
        said, on_test = _answers(train, TFIDF_STRENGTHS, [validation, test])
        right = [np.mean(one == validation.labels) for one in said]
        best = int(np.argmax(right))
        return float(right[best]), float(np.mean(on_test[best] == test.labels))
    rows, hits = train.joined(validation), np.zeros(len(TFIDF_STRENGTHS))
    for one in np.unique(fold):
        held = rows.take(np.flatnonzero(fold == one))
        (said,) = _answers(rows.take(np.flatnonzero(fold != one)), TFIDF_STRENGTHS, [held])
        hits += [np.sum(answers == held.labels) for answers in said]
    best = int(np.argmax(hits))
    ((on_test,),) = _answers(rows, TFIDF_STRENGTHS[best : best + 1], [test])
    return float(hits[best]) / len(rows), float(np.mean(on_test == test.labels))


def _answers(
    train: Examples, strengths: Sequence[float], asked: Sequence[Examples]
) -> list[list[NDArray[np.int64]]]:
    """Classes of the texts that are asked about, at each strength.

    Where no training text has a word, the commonest class.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    try:
        features = vectorizer.fit_transform(_whole(train))
        if len(np.unique(train.labels)) < 2:
            raise ValueError("one class only")
    except ValueError:  # empty vocabulary: digits or punctuation only
        commonest = int(np.bincount(train.labels).argmax())
        return [[np.full(len(rows), commonest)] * len(strengths) for rows in asked]
    questions = [vectorizer.transform(_whole(rows)) for rows in asked]
    said: list[list[NDArray[np.int64]]] = [[] for _ in asked]
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=1000).fit(features, train.labels)
        for answers, question in zip(said, questions, strict=True):
            answers.append(np.asarray(model.predict(question)))
    return said


def _whole(rows: Examples) -> Sequence[str]:
    if rows.pairs is None:
        return rows.texts
    return [f"{text}\n{pair}" for text, pair in zip(rows.texts, rows.pairs, strict=True)]
