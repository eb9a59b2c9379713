"""Splits are fair and never share a text, and a table that makes no task is refused in words."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.splits import stratified_order
from chipviz.data.tables import Table, read_table
from chipviz.data.task import Examples, Task
from chipviz.errors import TaskError


def task_of(frames, *, names=None, **settings):
    frames = frames if isinstance(frames, dict) else {"all": frames}
    config = RunConfig.checked(backbone="tiny", data="toy", **settings)
    return make_task(Table("toy", frames, names or {}), config)


def frame_of(n=60, classes=("no", "yes", "maybe")):
    labels = [classes[i % len(classes)] for i in range(n)]
    return pd.DataFrame({"text": [f"text {i}" for i in range(n)], "label": labels})


def all_texts(task):
    return {split: list(rows.texts) for split, rows in task.splits.items()}


# --- order and splits ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.integers(0, 1000))
def test_every_prefix_of_the_order_is_stratified(labels, seed):
    """By arithmetic: a class is off by one row of its own, and by its share of the others' rows."""
    labels = np.array(labels)
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    classes, counts = np.unique(labels, return_counts=True)
    for label, count in zip(classes, counts, strict=True):
        share = count / len(labels)
        found = np.cumsum(labels[order] == label)
        expected = share * np.arange(1, len(labels) + 1)
        bound = (1 - share) + share * (len(classes) - 1)
        assert np.abs(found - expected).max() <= bound + 1e-9


def test_of_two_classes_each_is_within_one_row_of_its_share_in_every_prefix():
    labels = np.array([0] * 90 + [1] * 10)
    for seed in range(20):
        order = stratified_order(labels, np.random.default_rng(seed))
        rare = np.cumsum(labels[order])
        assert np.abs(rare - 0.1 * np.arange(1, 101)).max() <= 1.0


def test_rows_of_one_class_are_shuffled_and_evenly_so():
    """The first row of ten must come first about once in ten orders."""
    labels = np.repeat([0, 1], 10)
    orders = [stratified_order(labels, np.random.default_rng(seed)) for seed in range(300)]
    firsts = [next(row for row in order if row < 10) for order in orders]
    assert all(10 <= count <= 60 for count in Counter(firsts).values())
    assert len(set(firsts)) == 10


def test_made_splits_share_no_text_and_lose_none():
    task = task_of(frame_of(100, ("no", "yes")))
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    assert sizes == {"train": 70, "validation": 10, "test": 20}
    assert task.made == ("validation", "test")
    every = [text for texts in all_texts(task).values() for text in texts]
    assert sorted(every) == sorted(frame_of(100)["text"])
    for rows in task.splits.values():
        assert abs(rows.labels.mean() - 0.5) <= 0.1


@given(st.lists(st.sampled_from(["a b", "A  B", "a\nb ", "c", "C", "d", "e"]), min_size=30))
def test_repeated_texts_never_straddle_two_made_splits(repeated):
    texts = [*repeated, *(f"text {i}" for i in range(30))]
    frame = pd.DataFrame(
        {"text": texts, "label": [("no", "yes")[i % 2] for i in range(len(texts))]}
    )
    task = task_of(frame)
    same = [{" ".join(t.lower().split()) for t in texts} for texts in all_texts(task).values()]
    assert sum(map(len, same)) == len(set.union(*same))


def test_a_text_counts_as_repeated_only_with_its_second_text():
    frame = frame_of().assign(text="one passage", question=[f"question {i}" for i in range(60)])
    task = task_of(frame, text_pair="question")
    assert sum(len(rows) for rows in task.splits.values()) == 60


def test_the_same_seed_gives_the_same_task_and_another_seed_another():
    first, again, other = (task_of(frame_of(), seed=seed) for seed in (7, 7, 8))
    assert all_texts(first) == all_texts(again) != all_texts(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_splits_that_a_source_gives_are_kept_repeated_texts_and_all():
    frames = {"train": frame_of(30), "validation": frame_of(9), "test": frame_of(12)}
    frames["train"].loc[1, "text"] = frames["train"].loc[0, "text"]
    task = task_of(frames)
    for split, frame in frames.items():
        assert Counter(task.splits[split].texts) == Counter(frame["text"])


def test_a_missing_validation_split_is_carved_from_the_training_rows_alone():
    held_out = frame_of(12).assign(text=[f"held out {i}" for i in range(12)])
    task = task_of({"train": frame_of(50), "test": held_out})
    assert set(task.splits["test"].texts) == set(held_out["text"])
    assert len(task.splits["validation"]) == 5
    assert not set(task.splits["validation"].texts) & set(task.splits["train"].texts)


def test_a_carved_split_shares_no_text_with_the_splits_there_are():
    train, held_out = frame_of(50), frame_of(12).replace({"text": {"text 3": "TEXT  3"}})
    task = task_of({"train": train, "test": held_out})
    assert set(task.splits["test"].texts) == set(held_out["text"])
    carved = {*task.splits["train"].texts, *task.splits["validation"].texts}
    assert carved == {f"text {i}" for i in range(12, 50)}
    assert task.made == ("validation",)


def test_a_test_split_whose_labels_are_hidden_is_made_anew():
    """As GLUE writes them: every label -1."""
    frames = {"train": frame_of(40, (0, 1)), "validation": frame_of(9, (0, 1))}
    frames["validation"]["text"] += " for validation"
    frames["test"] = frame_of(30, (-1,))
    task = task_of(frames, names={"label": ["no", "yes"]})
    assert task.made == ("test",)
    assert set(task.splits["test"].texts) <= set(frames["train"]["text"])


def test_minus_one_is_a_class_where_training_has_it():
    frames = {"train": frame_of(40, (-1, 1)), "test": frame_of(9, (-1,))}
    frames["test"]["text"] += " for test"
    task = task_of(frames)
    assert task.label_names == ("-1", "1")
    assert len(task.splits["test"]) == 9
    assert not task.notices


def test_splits_without_the_training_columns_are_refused_by_name():
    frames = {"train": frame_of(), "test": frame_of().rename(columns={"text": "body"})}
    with pytest.raises(TaskError, match=r"The test split has no column 'text'; columns are 'body'"):
        task_of(frames)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_without_labels_is_left_out_and_named(split):
    frames = {"train": frame_of(60), split: frame_of(12).drop(columns="label")}
    task = task_of(frames)
    assert split in task.made
    (notice,) = [n for n in task.notices if n.code == "split-without-labels"]
    assert notice.n == 12


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ("False", "True")),
        ([1.0, 0.0], ("0", "1")),
        ([0.5, 1.5], ("0.5", "1.5")),
        ([10, 9], ("9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, 1], ("1", "True")),
    ],
)
def test_labels_of_every_type_are_classes_by_their_own_names(labels, names):
    frame = frame_of(40).astype(object)
    frame["label"] = pd.Series([labels[i % 2] for i in range(40)], dtype=object)
    assert task_of(frame).label_names == names


def test_limits_take_the_first_rows_of_each_split():
    whole = task_of(frame_of())
    few = task_of(frame_of(), max_train=6, max_validation=3, max_test=4)
    for split, n in (("train", 6), ("validation", 3), ("test", 4)):
        assert few.splits[split].texts == whole.splits[split].texts[:n]


def test_labels_stay_with_their_texts():
    frame = frame_of()
    task = task_of(frame)
    truth = dict(zip(frame["text"], frame["label"], strict=True))
    for rows in task.splits.values():
        said = [task.label_names[label] for label in rows.labels]
        assert said == [truth[text] for text in rows.texts]


def test_labels_that_look_like_numbers_keep_their_spelling(tmp_path, home):
    path = tmp_path / "a.csv"
    lines = [f"text {i},{('007', '1.50', '7')[i % 3]}" for i in range(60)]
    path.write_text("text,label\n" + "\n".join(lines))
    table = read_table(str(path), home)
    assert make_task(table, RunConfig(backbone="x", data="y")).label_names == ("007", "1.50", "7")


def test_integers_are_class_numbers_where_the_source_declares_names_even_if_names_are_digits():
    """Names 1 to 3 with numbers 0 to 2: a split without number 0 must not be read as names."""
    train, test = (
        {"text": [f"text {i} {labels}" for i in range(20)], "label": (labels * 10)[:20]}
        for labels in ([0, 1, 2], [1, 2])
    )
    frames = {"train": pd.DataFrame(train), "test": pd.DataFrame(test)}
    task = task_of(frames, names={"label": ["1", "2", "3"]})
    assert set(task.splits["train"].labels.tolist()) == {0, 1, 2}
    assert set(task.splits["test"].labels.tolist()) == {1, 2}


def test_declared_names_are_found_by_name_where_the_labels_are_names():
    task = task_of(frame_of(), names={"label": ["yes", "no", "maybe", "never"]})
    assert task.label_names == ("yes", "no", "maybe", "never")
    assert task.n_classes == 4


def test_a_fingerprint_changes_with_any_text_label_or_name():
    frames = {split: frame_of(12) for split in ("train", "validation", "test")}
    before = task_of(frames).fingerprint
    for split, column, value in [("test", "text", "other"), ("validation", "label", "yes")]:
        changed = {**frames, split: frames[split].copy()}
        changed[split].loc[0, column] = value
        assert task_of(changed).fingerprint != before
    renamed = {split: frame.replace({"label": {"no": "nein"}}) for split, frame in frames.items()}
    assert task_of(renamed).fingerprint != before
    splits: list[dict] = [
        {"test": Examples(["a", "b"], None, np.array(y))} for y in ([0, 1], [1, 0])
    ]
    one, other = (Task("toy", ("no", "yes"), rows) for rows in splits)
    assert one.fingerprint != other.fingerprint


# --- columns ------------------------------------------------------------------------------------


def test_columns_are_guessed_by_their_usual_names_then_by_length():
    usual = pd.DataFrame({"Category": ["a", "b"] * 20, "Title": [f"t{i}" for i in range(40)]})
    assert task_of(usual).splits["train"].texts[0].startswith("t")
    odd = usual.rename(columns={"Title": "words"}).assign(note="x")
    assert task_of(odd).splits["train"].texts[0].startswith("t")


def test_named_columns_are_taken_before_guessed_ones():
    frame = frame_of().assign(other=[f"other {i}" for i in range(60)], topic=["a", "b"] * 30)
    task = task_of(frame, text="other", label="topic")
    assert task.splits["train"].texts[0].startswith("other")
    assert task.label_names == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"text": "zz"}, "text"), ({"label": "zz"}, "label"), ({"text_pair": "zz"}, "text_pair")],
)
def test_a_column_that_does_not_exist_is_refused_with_those_that_do(settings, field):
    with pytest.raises(TaskError, match=r"no column 'zz'; columns are 'text', 'label'") as no:
        task_of(frame_of(), **settings)
    assert no.value.fields == (field,)


def test_a_table_without_a_label_column_is_refused_with_its_columns():
    with pytest.raises(TaskError, match=r"No label column was found; columns are 'text', 'y'"):
        task_of(frame_of().rename(columns={"label": "y"}))


def test_a_table_without_a_text_column_is_refused_with_its_columns():
    with pytest.raises(TaskError, match=r"No text column was found; columns are 'n', 'label'"):
        task_of(pd.DataFrame({"n": range(6), "label": ["a", "b"] * 3}))


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_value_is_refused_by_row_and_column(column):
    frame = frame_of()
    frame.loc[[4, 9], column] = None
    with pytest.raises(TaskError, match=rf"Row 5 has no value in column '{column}' \(2 rows"):
        task_of(frame)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("label", ["a"], "a list"),
        ("label", {"a": 1}, "a dict"),
        ("text", ["a", "b"], "a list"),
        ("text", "half \ud800", "half of a surrogate pair"),
    ],
)
def test_a_value_that_is_no_text_or_label_is_refused_by_row_and_column(column, value, said):
    frame = frame_of().astype(object)
    frame.at[2, column] = value
    with pytest.raises(TaskError, match=rf"Row 3 of test has {said} in column '{column}'"):
        task_of({"train": frame_of(), "test": frame})


def test_a_label_that_is_no_class_is_refused_by_row_and_split():
    frames = {"train": frame_of(20, (0, 1)), "test": frame_of(20, (0, -1))}
    with pytest.raises(TaskError, match=r"Row 2 of test has label '-1'.* 2 classes"):
        task_of(frames, names={"label": ["no", "yes"]})


def test_one_class_is_refused_by_its_own_name():
    with pytest.raises(TaskError, match="one class only, 'yes'"):
        task_of(frame_of(60, (1,)), names={"label": ["no", "yes"]})


@pytest.mark.parametrize("frame", [frame_of(2), frame_of(60).assign(text="always the same")])
def test_too_few_different_texts_are_refused_by_the_split_that_stays_empty(frame):
    with pytest.raises(TaskError, match="No text is left for the train split"):
        task_of(frame)
