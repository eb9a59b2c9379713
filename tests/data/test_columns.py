"""Columns are named or guessed, a guess is said, and it holds for every split."""

import pandas as pd
import pytest

from chipviz.config import RunConfig
from chipviz.data.columns import find_columns
from chipviz.data.task import say_columns
from chipviz.errors import TaskError


def found(columns, **named):
    frame = pd.DataFrame({name: ["some words"] * 3 for name in columns})
    return find_columns(frame, RunConfig.checked(backbone="x", data="y", **named))


@pytest.mark.parametrize(
    ("columns", "text", "pair", "label"),
    [
        (["text", "label"], "text", None, "label"),
        (["idx", "Sentence", "Label"], "Sentence", None, "Label"),
        (["headline", "topic"], "headline", None, "topic"),
        (["sentence1", "sentence2", "label"], "sentence1", "sentence2", "label"),
        (["premise", "hypothesis", "label"], "premise", "hypothesis", "label"),
        (["question1", "question2", "label"], "question1", "question2", "label"),
        (["question", "passage", "answer"], "passage", "question", "answer"),
        (["question", "passage", "title", "label"], "passage", "question", "label"),
        (["question", "sentence", "label"], "question", "sentence", "label"),
        (["text", "target", "note"], "text", None, "target"),
        (["label", "class", "text"], "text", None, "label"),
    ],
)
def test_columns_are_guessed_by_their_usual_names(columns, text, pair, label):
    columns = found(columns)
    assert (columns.text, columns.text_pair, columns.label) == (text, pair, label)
    assert set(columns.guessed) == set(columns.roles)


def test_naming_one_text_turns_guessing_of_its_partner_off():
    columns = found(["premise", "hypothesis", "label"], text="hypothesis")
    assert (columns.text, columns.text_pair) == ("hypothesis", None)
    assert columns.guessed == ("label",)
    columns = found(["text", "question", "label"], text_pair="question")
    assert (columns.text, columns.text_pair) == ("text", "question")


def test_the_longest_strings_are_the_text_where_no_name_says_so():
    frame = pd.DataFrame(
        {"id": ["x1", "x2"], "words": ["a long one", "b"], "n": [1, 2], "label": [0, 1]}
    )
    assert find_columns(frame, RunConfig(backbone="x", data="y")).text == "words"


@pytest.mark.parametrize("option", ["text", "text_pair", "label", "choices"])
def test_a_named_column_that_is_not_there_is_refused_with_its_option(option):
    with pytest.raises(TaskError, match=r"no column 'zz'; columns are 'text', 'label'") as refused:
        found(["text", "label"], **{option: "zz"})
    assert refused.value.fields == (option,)


def test_a_guess_is_said_in_words():
    roles = {"text": "headline", "label": "topic"}
    assert say_columns(roles, ["text", "label"]) == "text = `headline`, label = `topic`, guessed"
    assert say_columns(roles, ["label"]) == "text = `headline`, label = `topic` (guessed)"
    assert say_columns(roles, []) == "text = `headline`, label = `topic`"
