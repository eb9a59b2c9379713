"""Labels: one class has one name over all splits, and what only looks alike is named."""

import unicodedata

import pytest

from chipviz.data.labels import read_labels
from chipviz.errors import TaskError


def names_and_codes(*splits):
    values = dict(zip(("train", "test"), splits, strict=False))
    found = read_labels(values, "label")
    return found, [notice.code for notice in found.notices]


HUGE = 2**53
"""From here on not every whole number is a float."""


@pytest.mark.parametrize(
    ("train", "test", "names", "codes"),
    [
        ([1, 0, 2], [0.0, 1.0, 2.0], ["0", "1", "2"], ["labels-merged"]),
        (["1", "0", "1"], [1, 0], ["0", "1"], []),
        (["10", "9", "9"], ["10"], ["9", "10"], []),
        (["01", "1", "1"], ["01"], ["01", "1"], []),
        ([True, False, True], ["true", "FALSE"], ["False", "True"], ["labels-merged"]),
        (["a ", "b", "a"], [" b"], ["a", "b"], ["labels-trimmed"]),
        (["Food", "food", "b"], ["b"], ["Food", "b", "food"], ["labels-look-alike"]),
        ([0.5, 1.5, 0.5], ["0.5"], ["0.5", "1.5"], []),
        (
            ["9007199254740993", "9007199254740992"] * 2,
            [],
            ["9007199254740992", "9007199254740993"],
            [],
        ),
        (["-0", "1", "0"], ["1"], ["0", "1"], ["labels-merged"]),
    ],
)
def test_what_is_one_class_has_one_name(train, test, names, codes):
    found, said = names_and_codes(train, test)
    assert found.names == names
    assert said == codes
    assert set(found.by_split["test"]) <= set(names)


def test_composed_and_decomposed_letters_are_one_class():
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    found, _ = names_and_codes([composed, decomposed, "b"])
    assert found.names == ["b", composed]


def test_a_notice_counts_the_rows_and_shows_them():
    found, _ = names_and_codes(["Food"] * 30 + ["food"] * 5 + ["x "] * 2)
    trimmed, alike = found.notices
    assert (trimmed.n, trimmed.examples) == (2, ("'x ' (2)",))
    assert (alike.n, alike.examples) == (5, ("'Food' (30) and 'food' (5)",))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([f"word {i}" for i in range(30)], "has 30 different values in 30 rows"),
        ([i / 7 for i in range(30)] * 2, "different numbers such as .*: a quantity"),
        (["a", "b", "a|b", "b|c", "c", "a|c"] * 5, "several labels in a cell, such as 'a|b'"),
        (["a, b", "b, c", "a, c", "a, b, c"] * 5, "several labels in a cell"),
    ],
)
def test_what_is_no_class_is_refused(labels, said):
    with pytest.raises(TaskError, match=said) as refused:
        names_and_codes(labels)
    assert refused.value.fields == ("label",)


def test_a_class_may_hold_a_comma():
    found, _ = names_and_codes(["arts, music", "sport, tennis", "news"] * 5)
    assert found.names == ["arts, music", "news", "sport, tennis"]
