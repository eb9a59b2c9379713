"""Workbooks, columns that name split or group, and tables that are no classification task."""

import datetime
import zipfile

import pandas as pd
import pytest
from openpyxl import Workbook

from chipviz.config import RunConfig
from chipviz.data.from_table import load_task
from chipviz.data.tables import read_table
from chipviz.errors import SourceError, TaskError
from chipviz.progress import silent
from tests.families import planted_rows

ROWS = planted_rows(90)


def workbook(path, rows, more=()):
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for row in rows:
        sheet.append(list(row))
    for title, other in more:
        extra = book.create_sheet(title)
        for row in other:
            extra.append(list(row))
    book.save(path)
    return path


def csv(path, frame):
    frame.to_csv(path, index=False)
    return path


def task_of(path, home, **settings):
    return load_task(RunConfig.checked(backbone="x", data=str(path), **settings), home, silent)


def frame_of(**more):
    return pd.DataFrame({"text": [t for t, _ in ROWS], "label": [c for _, c in ROWS], **more})


# --- workbooks ----------------------------------------------------------------------------------


def test_a_workbook_is_the_table_that_its_csv_file_is(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [("text", "label"), *ROWS])
    other = csv(tmp_path / "a.csv", frame_of())
    found = read_table(str(path), tmp_path).frames["all"]
    assert found.to_dict("list") == read_table(str(other), tmp_path).frames["all"].to_dict("list")
    again = read_table(str(path), tmp_path).frames["all"]  # from the kept copy
    assert again.to_dict("list") == found.to_dict("list")
    assert len(task_of(path, tmp_path).splits["train"])


def test_cells_of_a_workbook_keep_their_kind_and_dates_become_text(tmp_path):
    day = datetime.date(2026, 11, 26)
    rows = [("text", "label", "day", None), ("a", 1, day, None), ("b", 2.5, None, "x"), (None,)]
    found = read_table(str(workbook(tmp_path / "a.xlsx", rows)), tmp_path).frames["all"]
    assert list(found.columns) == ["text", "label", "day", "column 4"]
    assert found["label"].tolist() == [1, 2.5]
    assert found["day"].tolist() == ["2026-11-26 00:00:00", None]
    assert found["column 4"].tolist() == [None, "x"]


def test_other_sheets_with_rows_are_named(tmp_path):
    path = workbook(
        tmp_path / "a.xlsx", [("text", "label"), *ROWS], [("More", [("a",), ("b",)]), ("Empty", [])]
    )
    (notice,) = read_table(str(path), tmp_path).notices
    assert (notice.code, notice.n, notice.examples) == ("other-sheets", 1, ("More",))


@pytest.mark.parametrize("kind", ["text", "zip", "empty", "huge"])
def test_what_is_no_workbook_is_refused_in_words(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.xlsx"
    if kind == "text":
        path.write_text("text,label\na,b\n")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil.txt", "x")
    elif kind == "empty":
        workbook(path, [("text", "label")])
    else:
        workbook(path, [("text", "label"), *ROWS])
        monkeypatch.setattr("chipviz.data.excel.MAX_UNPACKED", 1_000)
    with pytest.raises(SourceError, match=r"a\.xlsx"):
        read_table(str(path), tmp_path)


# --- columns that name the split or the group ---------------------------------------------------


def test_a_column_names_the_split_of_each_row(tmp_path):
    where = ["Train"] * 60 + ["dev"] * 10 + [" test "] * 20
    task = task_of(csv(tmp_path / "a.csv", frame_of(part=where)), tmp_path, split="part")
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 60,
        "validation": 10,
        "test": 20,
    }
    assert set(task.splits["test"].texts) == {text for text, _ in ROWS[70:]}
    assert task.made == ()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["train"] * 89 + ["later"], "Row 90 has 'later'"),
        (["test"] * 90, "No row is of split train"),
        (None, "There is no column 'part'"),
    ],
)
def test_a_split_column_that_names_none_is_refused(tmp_path, where, message):
    more = {} if where is None else {"part": where}
    path = csv(tmp_path / "a.csv", frame_of(**more))
    with pytest.raises(TaskError, match=message):
        task_of(path, tmp_path, split="part")


def test_a_split_column_beside_splits_of_the_source_is_refused(tmp_path):
    csv(tmp_path / "train.csv", frame_of(part="train"))
    with pytest.raises(TaskError, match="has splits of its own"):
        task_of(tmp_path, tmp_path / "home", split="part")


def test_no_group_stands_in_two_splits(tmp_path):
    group = [f"author {i // 5}" for i in range(90)]
    path = csv(tmp_path / "a.csv", frame_of(author=group))
    task = task_of(path, tmp_path, group="author")
    of = dict(zip((text for text, _ in ROWS), group, strict=True))
    groups = [{of[text] for text in rows.texts} for rows in task.splits.values()]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    alone = task_of(path, tmp_path)  # without it groups are parted
    assert {of[t] for t in alone.splits["train"].texts} & {
        of[t] for t in alone.splits["test"].texts
    }


def test_groups_that_the_source_itself_parts_are_named(tmp_path):
    csv(tmp_path / "train.csv", frame_of(author=[f"a{i % 9}" for i in range(90)]))
    csv(
        tmp_path / "test.csv",
        frame_of(author=["a1"] * 90).assign(text=[f"x{i}" for i in range(90)]),
    )
    task = task_of(tmp_path, tmp_path / "home", group="author")
    (notice,) = [notice for notice in task.notices if notice.code == "shared-groups"]
    assert (notice.n, notice.examples) == (1, ("a1",))


def test_a_group_column_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TaskError, match="There is no column 'author'"):
        task_of(csv(tmp_path / "a.csv", frame_of()), tmp_path, group="author")


# --- no classification of one class a text --------------------------------------------------------


def test_columns_of_several_annotators_are_refused_with_the_way_out(tmp_path):
    frame = frame_of().rename(columns={"label": "annotator_1"})
    path = csv(tmp_path / "a.csv", frame.assign(annotator_2=frame["annotator_1"]))
    with pytest.raises(TaskError, match="several annotators") as caught:
        task_of(path, tmp_path)
    assert "what most of them say" in caught.value.hint
    assert len(task_of(path, tmp_path, label="annotator_2").splits["train"])


def test_several_labels_a_row_are_recognised(tmp_path):
    path = tmp_path / "a.jsonl"
    frame_of(label=[["a", "b"]] * 90).to_json(path, orient="records", lines=True)
    with pytest.raises(TaskError, match="has a list in column 'label'") as caught:
        task_of(path, tmp_path)
    assert "a run for each column" in caught.value.hint


def test_a_quantity_is_recognised_and_ratings_are_classes(tmp_path):
    price = csv(tmp_path / "a.csv", frame_of(label=[0.37 * i for i in range(90)]))
    with pytest.raises(TaskError, match=r"90 different numbers .* a quantity"):
        task_of(price, tmp_path)
    counts = csv(tmp_path / "b.csv", frame_of(label=[10 * i for i in range(90)]))
    with pytest.raises(TaskError, match="90 different"):
        task_of(counts, tmp_path)
    stars = csv(tmp_path / "c.csv", frame_of(label=[i % 9 / 2 for i in range(90)]))
    assert task_of(stars, tmp_path).n_classes == 9
    many = csv(
        tmp_path / "d.csv",
        pd.concat([frame_of(label=range(90))] * 3).assign(text=[f"text {i}" for i in range(270)]),
    )
    assert task_of(many, tmp_path).n_classes == 90


def test_a_file_without_a_row_of_names_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(f"{text},{label}" for text, label in ROWS))
    with pytest.raises(TaskError, match="No label column was found") as caught:
        task_of(path, tmp_path)
    assert "a file without a row of names needs one" in caught.value.hint
    path.write_text("text,label\n" + path.read_text())  # the hint, to the letter
    assert len(task_of(path, tmp_path).splits["train"])
