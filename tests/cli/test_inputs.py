"""What is asked is written as training wrote it, and what does not fit is refused."""

import codecs
import json

import numpy as np
import pandas as pd
import pytest

from chipviz.cli.inputs import from_file, from_options, in_fields
from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.tables import Table
from chipviz.errors import ChipvizError, ConfigError, SourceError, TaskError
from chipviz.results.report import TaskInfo

N = 40
OPTIONS = [["red", "blue", "a house"], ["near", "far"]]
FULL = pd.DataFrame(
    {
        "passage": [f"the old house {i}" for i in range(N)],
        "question": [f"what was it {i}?" for i in range(N)],
        "choices": [OPTIONS[i % 2] for i in range(N)],
        "label": [i // 2 % 2 for i in range(N)],
    }
)


def info_of(task):
    return TaskInfo(
        name=task.name,
        n_train=1,
        n_validation=1,
        n_test=1,
        n_classes=task.n_classes,
        label_names=list(task.label_names),
        template=task.template or "{text}",
        max_length=64,
        max_chars=64,
        n_truncated=0,
        columns=task.columns.roles,
        guessed=[],
        made=[],
    )


@pytest.mark.parametrize("preset", ["sound", "published"])
@pytest.mark.parametrize("left_out", [(), ("passage",), ("choices",), ("passage", "choices")])
def test_what_is_asked_is_written_as_in_training(left_out, preset, tmp_path):
    """From a table and from options; questions with options, below a passage or alone."""
    frame = FULL.drop(columns=list(left_out))
    config = RunConfig.checked(backbone="x", data="y", preset=preset)
    task = make_task(Table("toy", {"all": frame}, {}), config)
    trained = {
        (text, pair)
        for rows in task.splits.values()
        for text, pair in zip(rows.texts, rows.pairs or [None] * len(rows), strict=True)
    }
    frame.drop(columns="label").to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    roles = task.columns.roles
    by_options = from_options(
        frame[roles["text"]].tolist(),
        frame[roles["text_pair"]].tolist() if "text_pair" in roles else None,
        ["|".join(row) for row in frame["choices"]] if "choices" in roles else None,
    )
    for asked in (from_file(tmp_path / "a.jsonl", tmp_path), by_options):
        texts, pairs = in_fields(asked, info_of(task), preset)
        assert set(zip(texts, pairs or [None] * N, strict=True)) == trained


ONE = TaskInfo(
    name="one",
    n_train=1,
    n_validation=1,
    n_test=1,
    n_classes=2,
    label_names=["a", "b"],
    template="{text}",
    max_length=9,
    max_chars=9,
    n_truncated=0,
    columns={"text": "text", "label": "label"},
    guessed=[],
    made=[],
)
EXAM = ONE.model_copy(
    update={
        "template": "{text}\n{text_pair}",
        "columns": {"text": "question", "choices": "choices", "label": "answer"},
    }
)


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        (ONE, (["x"], ["y"], None), "A text must be given here; given was a text and a second"),
        (ONE, (["x"], None, ["a|b"]), "A text must be given here; given was a text and options"),
        (EXAM, (["x"], None, None), "A text and options must be given here; given was a text."),
        (EXAM, (["x"], None, ["a"]), "has 1 options, expected 2 to 26"),
        (EXAM, (["x"], ["y"], ["a|b"]), "given was a text and a second text and options"),
    ],
)
def test_what_the_prompt_has_no_place_for_is_refused_and_what_it_lacks(task, given, said):
    with pytest.raises(ChipvizError, match=said.replace("?", r"\?")):
        in_fields(from_options(*given), task, "sound")


def test_lines_and_a_json_list_are_texts_and_all_else_is_a_table(tmp_path):
    texts = ["one, two", "three"]
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one, two\r\nthree\r\n")
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + json.dumps(texts).encode())
    (tmp_path / "a.csv").write_text('text,other\n"one, two",1\nthree,2\n')
    for name in ("a.txt", "a.json", "a.csv"):
        assert in_fields(from_file(tmp_path / name, tmp_path), ONE, "sound")[0] == texts


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("a.txt", b"\xff\xfe\xff", SourceError, "a.txt is not UTF-16"),
        ("a.txt", b"a\n \nb\n", ConfigError, "Line 2 of .*a.txt is blank"),
        ("a.json", b'["a", ""]', ConfigError, "Item 2 of .*a.json is blank"),
        ("a.txt", b" \n\n", ConfigError, "holds no text"),
        ("a.json", b"[]", ConfigError, "holds no text"),
        ("a.json", b'["a", ', ChipvizError, "not well-formed JSON"),
        ("a.json", b"[1, 2]", ChipvizError, "item 1 is no JSON object"),
        ("a.csv", b"title\nx\n", TaskError, "no column 'text'; columns are 'title'"),
        ("a.csv", b"text,b\n,x\n", TaskError, "Row 1 has no value in column 'text'"),
        ("a.parquet", b"PK\x03\x04", ChipvizError, "a.parquet"),
    ],
)
def test_a_file_that_cannot_be_asked_is_one_sentence(tmp_path, name, content, error, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said) as refused:
        in_fields(from_file(tmp_path / name, tmp_path), ONE, "sound")
    assert "\n" not in refused.value.message


def test_a_missing_cell_of_a_table_is_named(tmp_path):
    pd.DataFrame({"text": ["a", None, np.nan]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(TaskError, match="Row 2 has no value"):
        in_fields(from_file(tmp_path / "a.parquet", tmp_path), ONE, "sound")
