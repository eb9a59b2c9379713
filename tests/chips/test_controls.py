"""What a chip has to beat is measured on held-out texts, against a re-computation."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from chipviz.chips import controls
from chipviz.data.task import Examples

WORDS = ("goal", "bank", "atom")


def planted(n, seed, noise=0.0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, n)
    shown = np.where(draw.random(n) < noise, draw.integers(0, 3, n), labels)
    texts = [f"we saw {WORDS[c]} number {draw.integers(100)} there" for c in shown]
    return Examples(texts, None, labels.astype(np.int64))


def test_majority_answers_the_commonest_training_class_on_other_rows():
    train = Examples(["x"] * 5, None, np.array([2, 2, 2, 0, 1]))
    rows = Examples(["x"] * 4, None, np.array([0, 0, 2, 1]))
    assert controls.majority(train, rows) == 0.25


def test_tfidf_learns_a_planted_word():
    train, validation, test = planted(200, 0), planted(50, 1), planted(50, 2)
    assert controls.tfidf(train, validation, test) == (1.0, 1.0)


def test_tfidf_is_at_chance_on_shuffled_labels():
    train, validation, test = planted(300, 0, 1.0), planted(300, 1, 1.0), planted(300, 2, 1.0)
    assert controls.tfidf(train, validation, test)[1] == pytest.approx(1 / 3, abs=0.12)


def murmured(n, seed):
    """Sixty words, of which every one says a little about the class: strengths differ."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, n)
    rows = [(draw.integers(0, 60, 12) + 5 * c) // draw.integers(1, 3) for c in labels]
    texts = [" ".join(f"word{w}" for w in row) for row in rows]
    return Examples(texts, None, labels.astype(np.int64))


def test_tfidf_is_scikit_learns_and_its_strength_is_chosen_on_validation_alone():
    for seed in range(4):
        splits = murmured(90, seed), murmured(70, 50 + seed), murmured(70, 90 + seed)
        train, validation, test = splits
        reached = []
        for strength in controls.TFIDF_STRENGTHS:
            model = make_pipeline(
                TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=strength, max_iter=1000)
            ).fit(train.texts, train.labels)
            reached.append(tuple(model.score(r.texts, r.labels) for r in (validation, test)))
        best = max(reached, key=lambda pair: pair[0])
        assert controls.tfidf(*splits) == pytest.approx(best)


def test_tfidf_reads_the_second_text_too():
    def second(rows):
        return Examples(["the same"] * len(rows), rows.texts, rows.labels)

    splits = planted(200, 0), planted(50, 1), planted(50, 2)
    assert controls.tfidf(*map(second, splits)) == (1.0, 1.0)


def test_texts_without_a_word_leave_the_majority():
    train = Examples(["1", "2", "?"], None, np.array([1, 1, 0]))
    assert controls.tfidf(train, train, train) == pytest.approx((2 / 3, 2 / 3))
