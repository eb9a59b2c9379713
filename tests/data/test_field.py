"""Kinds of real input that people reported as broken elsewhere, each with its right outcome.

Needs the cases beside the checkout (or CHIPVIZ_FIELD); each has a README with source and outcome.
"""

import os
import subprocess
from pathlib import Path

import pytest

from chipviz.cli.inputs import from_file
from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.tables import read_table
from chipviz.errors import ChipvizError, ConfigError, SourceError, TaskError

FIELD = Path(
    os.environ.get("CHIPVIZ_FIELD") or Path(__file__).resolve().parents[3] / "shared/field"
)
pytestmark = pytest.mark.skipif(not FIELD.is_dir(), reason=f"no cases at {FIELD}")


def task_of(case, name="", **settings):
    path = FIELD / case / name if name else FIELD / case
    config = RunConfig.checked(backbone="x", data=str(path), **settings)
    return make_task(read_table(config.data, Path("nowhere"), keep=False), config)


def codes(task):
    return {notice.code: notice for notice in task.notices}


def n_texts(task):
    return sum(map(len, task.splits.values()))


def test_03_a_quotation_over_two_sentences_leaves_80_texts():
    task = task_of("03-tsv-quotation-over-two-sentences", "data.tsv")
    assert n_texts(task) == 80
    assert "quotes-are-text" in codes(task)


def test_08_the_hint_for_a_windows_file_gives_typographic_apostrophes(tmp_path):
    path = FIELD / "08-cp1252-smart-quotes" / "data.csv"
    with pytest.raises(SourceError, match=r"data\.csv is not UTF-8: line \d+ holds") as refused:
        task_of("08-cp1252-smart-quotes", "data.csv")
    command = refused.value.hint.split("`")[1]
    new = tmp_path / "new.csv"
    command = command.replace("OLD", str(path)).replace("NEW", str(new))
    subprocess.run(["bash", "-c", command], check=True)
    text = new.read_text("utf-8")
    assert "\u2019" in text
    assert "\u0092" not in text


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("11-pipe-delimited", "data.csv"),
        ("32-json-object-with-data", "data.json"),
        ("41-parquet-text-in-index", "data.parquet"),
        ("58-space-after-comma", "data.csv"),
        ("58-space-after-comma", "quoted.csv"),
    ],
)
def test_tables_of_other_forms_are_read_whole(case, name):
    task = task_of(case, name)
    assert n_texts(task) == 80
    assert all(name == name.strip(' "') for name in task.label_names)
    assert task.n_classes == 2


@pytest.mark.parametrize(
    ("case", "code"), [("16-label-case", "labels-look-alike"), ("17-label-trailing-space", "")]
)
def test_labels_that_look_alike_are_named_or_one(case, code):
    task = task_of(case, "data.csv")
    if code:
        assert codes(task)[code].examples
    else:
        assert len({name.strip() for name in task.label_names}) == task.n_classes
        assert "labels-trimmed" in codes(task)


def test_18_a_class_without_training_text_is_left_out_by_name():
    task = task_of("18-class-only-in-validation", max_train=60)
    assert "sport" not in task.label_names
    assert "sport" in codes(task)["class-without-training"].examples[0]


@pytest.mark.parametrize("case", ["19-labels-0.0-in-one-split", "20-True-and-true"])
def test_one_class_in_two_spellings_is_one(case):
    task = task_of(case)
    assert task.n_classes == 2
    assert "labels-merged" in codes(task)


def test_23_numbers_stand_in_their_order_in_every_format():
    names = [
        task_of("23-number-classes-order", f"data.{kind}").label_names for kind in ("csv", "jsonl")
    ]
    assert names[0] == names[1] == tuple(str(n) for n in range(len(names[0])))


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("26-hidden-labels-in-csv", "hidden-labels"),
        ("43-test-without-labels", "split-without-labels"),
    ],
)
def test_a_test_split_without_labels_is_left_out_and_named(case, code):
    task = task_of(case)
    assert code in codes(task)
    assert "test" in task.made
    assert "-1" not in task.label_names


@pytest.mark.parametrize(
    ("case", "name", "error", "said"),
    [
        ("29-joined-labels", "data.csv", TaskError, "several labels in a cell"),
        ("31-label-studio", "data.json", ChipvizError, "columns are 'id', 'data', 'annotations'"),
        ("33-json-by-columns", "data.json", SourceError, "is one JSON object with the fields"),
        ("53-csv-open-quote-swallows-rows", "data.csv", SourceError, r"Lines \d+ to \d+ of data"),
    ],
)
def test_what_is_no_table_of_single_labels_is_refused_in_words_that_fit(case, name, error, said):
    with pytest.raises(error, match=said):
        task_of(case, name)


def test_46_texts_with_two_labels_are_counted_and_kept():
    task = task_of("46-same-text-two-labels", "data.csv")
    assert codes(task)["contradicting-labels"].n == 40
    assert n_texts(task) == 120
    assert all(set(rows.labels.tolist()) == {0, 1, 2} for rows in task.splits.values())


def test_55_numbers_and_their_strings_are_one_class():
    assert task_of("55-mixed-float-str", "data.jsonl").n_classes == 2


def test_61_a_text_file_in_utf16_is_read():
    rows = from_file(FIELD / "61-predict-file-utf16" / "texts.txt", Path("nowhere")).rows
    assert not any("\ufeff" in text or "\0" in text for text in rows["text"])
    assert len(rows) > 1


def test_99_a_blank_line_is_refused_by_its_number():
    with pytest.raises(ConfigError, match=r"Line \d+ of .* is blank"):
        from_file(FIELD / "99-predict-text-file-with-blank-line" / "texts.txt", Path("nowhere"))
