"""Splits: every row is used, or named in a notice with its count; no text stands in two."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipviz.data.splits import make_splits, without_untrained
from chipviz.data.task import Examples, text_keys
from chipviz.errors import TaskError

NAMES = ["no", "yes", "maybe"]


def rows(texts, labels):
    return Examples(list(texts), None, np.array(labels, dtype=np.int64))


def made(found, contradictions="keep"):
    return make_splits(found, NAMES, contradictions, np.random.default_rng(0))


def count(made_splits, code):
    return sum(notice.n for notice in made_splits.notices if notice.code == code)


texts = st.sampled_from(["a", "A", "a ", "b", "B b", "b  b", "c", "d", "e", "f"])


@given(st.lists(st.tuples(texts, st.integers(0, 2)), min_size=12, max_size=60))
def test_every_row_is_used_or_named(drawn):
    found = rows([text for text, _ in drawn], [label for _, label in drawn])
    for fate in ("keep", "drop"):
        result = made({"all": found}, fate)
        used = sum(len(split) for split in result.splits.values())
        contradicting = {
            text for text, label in drawn if any(t == text and k != label for t, k in drawn)
        }
        gone = sum(text in contradicting for text, _ in drawn) if fate == "drop" else 0
        assert used + gone + count(result, "repeated-texts") == len(drawn)
        assert count(result, "contradicting-labels") == len(contradicting)


@given(st.lists(st.tuples(texts, st.integers(0, 2)), min_size=12, max_size=60))
def test_no_text_stands_in_two_splits_whatever_its_case(drawn):
    found = rows([text for text, _ in drawn], [label for _, label in drawn])
    keys = [set(text_keys(split)) for split in made({"all": found}).splits.values()]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_labels_that_case_carries_stay_apart():
    """The same word in two cases with two labels is no contradiction and no repeat."""
    found = rows([word for i in range(20) for word in (f"Word{i}", f"word{i}")], [0, 1] * 20)
    result = made({"all": found})
    assert sum(len(split) for split in result.splits.values()) == 40
    assert not result.notices


def test_a_text_with_two_labels_is_kept_dropped_or_refused_as_asked():
    found = rows([f"text {i // 2}" for i in range(40)] + [f"x {i}" for i in range(20)], [0, 1] * 30)
    kept, dropped = made({"all": found}), made({"all": found}, "drop")
    assert sum(map(len, kept.splits.values())) == 60
    assert sum(map(len, dropped.splits.values())) == 20
    assert count(kept, "contradicting-labels") == count(dropped, "contradicting-labels") == 20
    with pytest.raises(TaskError, match="20 texts have several labels: 'text 0' is no and yes"):
        made({"all": found}, "refuse")


def test_splits_of_the_source_are_kept_and_what_they_share_is_named():
    train, test = rows("abcdef", [0, 1] * 3), rows(["A", "x"], [0, 1])
    validation = rows(["y", "z"], [0, 1])
    result = made({"train": train, "validation": validation, "test": test})
    assert [len(split) for split in result.splits.values()] == [6, 2, 2]
    (notice,) = result.notices
    assert (notice.code, notice.examples) == ("shared-texts", ("1 in train and test",))


def test_rows_of_a_class_that_training_lacks_leave_by_name():
    splits = {
        "train": rows("abcd", [0, 2, 0, 2]),
        "validation": rows("ef", [1, 0]),
        "test": rows("gh", [2, 1]),
    }
    left, names, notices = without_untrained(splits, NAMES, renumber=True)
    assert names == ["no", "maybe"]
    assert [split.labels.tolist() for split in left.values()] == [[0, 1, 0, 1], [0], [1]]
    (notice,) = notices
    assert (notice.code, notice.n, notice.examples) == ("class-without-training", 2, ("yes (2)",))
    left, names, _ = without_untrained(splits, NAMES, renumber=False)
    assert names == NAMES
    assert left["test"].labels.tolist() == [2]


def test_a_class_of_one_text_is_named():
    splits = {"train": rows("abc", [0, 0, 1]), "validation": rows("d", [0]), "test": rows("e", [1])}
    _, _, (notice,) = without_untrained(splits, NAMES, renumber=False)
    assert (notice.code, notice.n, notice.examples) == ("class-with-one-text", 1, ("yes",))
