"""Reference classifiers a chip has to beat. Knows texts and labels only."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from chipviz.data.task import Examples

TFIDF_STRENGTHS = (1.0, 10.0, 100.0)


def majority(train: Examples, rows: Examples) -> float:
    """Accuracy of always answering the commonest training class."""
    commonest = int(np.bincount(train.labels).argmax())
    return float(np.mean(rows.labels == commonest))


def tfidf(train: Examples, validation: Examples, test: Examples) -> tuple[float, float]:
    """Accuracy of TF-IDF words with logistic regression, its C chosen on validation.

    Returns:
        Accuracy on validation and on test. Where no text has a word, that of the commonest class.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    try:
        features = vectorizer.fit_transform(_whole(train))
    except ValueError:  # empty vocabulary: digits or punctuation only
        return majority(train, validation), majority(train, test)
    fitted = [
        LogisticRegression(C=c, max_iter=1000).fit(features, train.labels) for c in TFIDF_STRENGTHS
    ]
    on_validation = [_accuracy(model, vectorizer, validation) for model in fitted]
    best = int(np.argmax(on_validation))
    return on_validation[best], _accuracy(fitted[best], vectorizer, test)


def _accuracy(model: LogisticRegression, vectorizer: TfidfVectorizer, rows: Examples) -> float:
    predicted = np.asarray(model.predict(vectorizer.transform(_whole(rows))))
    return float(np.mean(predicted == rows.labels))


def _whole(rows: Examples) -> Sequence[str]:
    if rows.pairs is None:
        return rows.texts
    return [f"{text}\n{pair}" for text, pair in zip(rows.texts, rows.pairs, strict=True)]
