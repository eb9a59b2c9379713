"""Tables become tasks: fields are read, classes named, missing splits made, sizes limited."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chipviz.config import Preset, RunConfig
from chipviz.data.columns import find_columns, list_columns, named_column, options_of
from chipviz.data.labels import check_declared, read_labels
from chipviz.data.multiple_choice import (
    LETTERS,
    answer_indices,
    check_options,
    exam_question,
    template_for,
    with_options,
)
from chipviz.data.pictures import names_a_reference
from chipviz.data.splits import (
    folds_of,
    look_alikes,
    make_splits,
    split_by_column,
    without_untrained,
)
from chipviz.data.streaming import FIRST
from chipviz.data.tables import Table, read_table
from chipviz.data.task import MAX_TEXT, Columns, Examples, Task, TaskKind, say_columns
from chipviz.errors import Notice, TaskError
from chipviz.keys import Split
from chipviz.progress import Progress, ProgressFn


def load_task(config: RunConfig, home: Path, progress: ProgressFn) -> Task:
    """Read the data of a run, and say which columns were taken.

    Raises:
        ChipvizError: If the data cannot be had or read, or is no classification task.
    """
    progress(Progress("loading", "reading the texts"))
    task = make_task(read_table(config.data, home, progress), config)
    if task.columns:
        progress(Progress("loading", say_columns(task.columns.roles, task.columns.guessed)))
    return task


def make_task(table: Table, config: RunConfig) -> Task:
    """Turn a table into a task: find columns, name classes, make missing splits, limit sizes.

    Raises:
        TaskError: If columns, labels or classes do not make a classification task.
        ConfigError: If folds are asked for together with what has none.
    """
    if config.split is not None:
        table = replace(table, frames=split_by_column(table.frames, config.split))
    columns = guess_columns(table, config)
    kind: TaskKind = "image" if columns.text in table.pictures else "text"
    declared = table.label_names.get(columns.label)
    check_declared(declared or [], columns.label)
    frames, unanswered = _answered(table.frames, columns)
    rows = {split: _rows(frame, split, columns, config) for split, frame in frames.items()}
    own = declared is None and columns.choices is None
    if own:
        labels = read_labels({split: found.labels for split, found in rows.items()}, columns.label)
        rows = {split: replace(rows[split], labels=labels.by_split[split]) for split in rows}
        names, said = labels.names, labels.notices
    else:
        names, said = (_exam_names(rows, declared) if columns.choices else list(declared or [])), []
    examples = {
        split: _examples(found, split, names, numbered=not own) for split, found in rows.items()
    }
    made = make_splits(examples, names, config.contradictions, np.random.default_rng(config.seed))
    limits = (config.max_train, config.max_validation, config.max_test)
    taken: dict[Split, Examples] = {
        split: rows.take(range(min(len(rows), limit or len(rows))))
        for (split, rows), limit in zip(made.splits.items(), limits, strict=True)
    }
    taken, names, untrained = without_untrained(taken, names, renumber=own)
    _check_sizes(taken, table.name, names)
    task = Task(
        table.name,
        tuple(names),
        taken,
        config.template or _template(columns, config),
        columns,
        tuple(split for split in taken if split not in examples and split != "train"),
        table.revision,
        (*table.notices, *unanswered, *said, *made.notices, *untrained),
        kind,
    )
    if kind == "image":
        task = replace(task, notices=(*map(_of_pictures, task.notices), *look_alikes(task)))
    return replace(task, fold=folds_of(task, config))


def guess_columns(table: Table, config: RunConfig) -> Columns:
    """The column of every role, found on the training rows: see `find_columns`."""
    first = "all" if "all" in table.frames else "train"
    return find_columns(table.frames[first], config, table.pictures)


def _of_pictures(notice: Notice) -> Notice:
    """What is said of texts, said of pictures. No reference stands for an example."""
    message = re.sub(r"\b([Tt])ext(s?)\b", _picture_word, notice.message)
    examples = tuple(one for one in notice.examples if not names_a_reference(one))
    return replace(notice, message=message, examples=examples)


def _picture_word(found: re.Match[str]) -> str:
    return ("P" if found[1] == "T" else "p") + "icture" + found[2]


def _check_sizes(splits: dict[Split, Examples], name: str, names: Sequence[str]) -> None:
    for split, rows in splits.items():
        if not len(rows):
            raise TaskError(
                f"No text is left for the {split} split of {name}.",
                "Give more different texts: three splits are needed to fit, choose and report.",
            )
    if len(present := set(splits["train"].labels.tolist())) < 2:
        raise TaskError(
            f"The training texts of {name} have one class only, {names[present.pop()]!r}; "
            "a classifier needs two.",
            "Give data with at least two labels, or name another column.",
            "label",
        )


def _template(columns: Columns, config: RunConfig) -> str | None:
    """The prompt of a question, where the columns are those of one."""
    pair = columns.text_pair
    if columns.choices is not None:
        return template_for(config.preset, passage=pair is not None, options=True)
    if (columns.text.lower(), (pair or "").lower()) == ("passage", "question"):
        return template_for(config.preset, passage=True, options=False)
    return None


@dataclass(frozen=True)
class _Rows:
    """One split's texts and raw labels. In multiple choice the labels are indices already."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    n_options: int = 0
    """Most options of a row."""
    groups: list[str] | None = None
    """What each row belongs to."""


def _answered(
    frames: dict[str, pd.DataFrame], columns: Columns
) -> tuple[dict[str, pd.DataFrame], list[Notice]]:
    """The splits that have answers. Competitions leave those of a test split out, or write -1."""
    answered, notices = {}, []
    label = columns.label
    training = frames.get("train")
    of_training = [] if training is None or label not in training else training[label].tolist()
    for split, frame in frames.items():
        lacking = [c for c in columns.roles.values() if c not in frame.columns]
        asked_only = split in ("validation", "test") and lacking == [label]
        if lacking and not asked_only:
            raise TaskError(
                f"The {split} split has no column {lacking[0]!r}; "
                f"columns are {list_columns(frame.columns)}.",
                "Give every split the same columns.",
            )
        fate = f"It is left out, and a {split} split is taken from the training rows."
        if asked_only:
            message = f"The {split} split has no label column {label!r}. {fate}"
            notices.append(Notice("split-without-labels", message, len(frame)))
        elif split in ("validation", "test") and _hidden(frame[label].tolist(), of_training):
            message = f"The {split} split hides its labels: all are -1. {fate}"
            notices.append(Notice("hidden-labels", message, len(frame)))
        else:
            answered[split] = frame
    return answered, notices


_HIDDEN = {"-1", "-1.0"}
"""A label that stands for none, as a number or in letters."""


def _hidden(labels: Sequence[Any], of_training: Sequence[Any]) -> bool:
    """Whether every label stands for none. Where training has such a label, it is a class."""
    said, trained = ({str(label).strip() for label in values} for values in (labels, of_training))
    return said <= _HIDDEN and not trained & _HIDDEN


def _rows(frame: pd.DataFrame, split: str, columns: Columns, config: RunConfig) -> _Rows:
    labels = [_plain(value) for value in _values(frame, columns.label, split, label=True)]
    texts, pairs, options = read_fields(frame, split, columns, config.preset)
    groups = None
    if group := named_column(frame, config.group, "group"):
        groups = [str(value) for value in _values(frame, group, split)]
    if not options:
        return _Rows(texts, pairs, labels, groups=groups)
    answers = answer_indices(labels, options)
    if None in answers:
        row = answers.index(None)
        raise TaskError(
            f"{_row(row, split)} has {str(labels[row])[:80]!r} in column {columns.label!r}, "
            f"which is none of its {len(options[row])} options.",
            "Give the option's number counted from 0, its letter, or its own words.",
        )
    return _Rows(texts, pairs, answers, max(map(len, options)), groups)


def read_fields(
    frame: pd.DataFrame, split: str, columns: Columns, preset: Preset
) -> tuple[list[str], list[str] | None, list[list[str]]]:
    """The texts of a table as the prompt takes them.

    Args:
        frame: Its label column, if it has one, is not looked at.
        split: For messages; "all" is a table without splits.
        columns: Which column is what.
        preset: The run's preset: as *published*, questions without a passage begin otherwise.

    Returns:
        First texts; second texts, options below the question, or None where one text is read; and
        the options of each row, if there are any.

    Raises:
        TaskError: Naming the row and column of what is no text or no list of options.
    """

    def strings(column: str) -> list[str]:
        return [str(value) for value in _values(frame, column, split)]

    texts = strings(columns.text)
    pairs = strings(columns.text_pair) if columns.text_pair else None
    if columns.choices is None:
        return texts, pairs, []
    options = [
        check_options(options_of(value), f"{_row(i, split, frame)}, column {columns.choices!r},")
        for i, value in enumerate(frame[columns.choices].tolist())
    ]
    if pairs is None and preset == "published" and "subject" in frame.columns:
        subjects = frame["subject"].fillna("").tolist()
        texts = [exam_question(t, str(s)) for t, s in zip(texts, subjects, strict=True)]
    elif pairs is None and preset == "published":
        texts = [exam_question(text, None) for text in texts]
    questions: list[str] | list[None] = pairs or [None] * len(texts)
    return texts, [with_options(o, q) for o, q in zip(options, questions, strict=True)], options


def _values(frame: pd.DataFrame, column: str, split: str, *, label: bool = False) -> list[Any]:
    """A column in which every row has one value, of characters that have an encoding."""
    values = frame[column].tolist()
    empty = [isinstance(value, str) and not value.strip() for value in values]
    missing = frame[column].isna().to_numpy() | np.array(empty)
    if missing.any():
        raise TaskError(
            f"{_row(int(missing.argmax()), split, frame)} has no value in column {column!r} "
            f"({int(missing.sum())} rows lack one).",
            "Fill or remove these rows.",
        )
    for row, value in enumerate(values):
        wrong = _what_is_wrong(value)
        if wrong is not None and label and isinstance(value, (list, tuple, set, np.ndarray)):
            wrong = wrong[0], SEVERAL_LABELS
        if wrong is not None:
            where = _row(row, split, frame)
            raise TaskError(f"{where} has {wrong[0]} in column {column!r}.", wrong[1])
    return values


SEVERAL_LABELS = (
    "A chip says one class for each text: give one label a row, or a column of yes and no for each "
    "class and a run for each column."
)


def _what_is_wrong(value: Any) -> tuple[str, str] | None:
    """Why a value is no text and no label, and what to do about it."""
    if isinstance(value, (list, tuple, set, dict, bytes, np.ndarray)):
        return (
            f"a {type(value).__name__}",
            "Give a column of plain values: one text, one label a row.",
        )
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            return (
                f"{len(value):,} characters, at most {MAX_TEXT:,} can be one text",
                "Cut it into texts, or remove this row.",
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            return "half of a surrogate pair", "Write the file anew as UTF-8, or remove this row."
    return None


def _plain(value: Any) -> Any:
    """A label as a plain Python value. A whole number is an integer."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _row(row: int, split: str, frame: pd.DataFrame | None = None) -> str:
    """A row as the user counts it. A frame may be a part of its file."""
    row += frame.attrs.get(FIRST, 0) if frame is not None else 0
    return f"Row {row + 1}" if split == "all" else f"Row {row + 1} of {split}"


def _exam_names(rows: dict[str, _Rows], declared: list[str] | None) -> list[str]:
    """Names of the options of multiple choice: declared ones, or letters."""
    most = max(found.n_options for found in rows.values())
    return declared if declared is not None and len(declared) >= most else list(LETTERS[:most])


def _examples(found: _Rows, split: str, names: list[str], *, numbered: bool) -> Examples:
    """Class indices from values. Integers are class numbers where the source declares names."""
    index = {name: i for i, name in enumerate(names)}
    if numbered and all(isinstance(label, int) for label in found.labels):
        labels = np.array(found.labels, dtype=object)
        labels[(labels < 0) | (labels >= len(names))] = -1
        labels = labels.astype(np.int64)
    else:
        labels = np.array([index.get(str(label), -1) for label in found.labels], dtype=np.int64)
    if (labels < 0).any():
        row = int((labels < 0).argmax())
        raise TaskError(
            f"{_row(row, split)} has label {str(found.labels[row])[:80]!r}, "
            f"which is none of the {len(names)} classes.",
            "Remove rows without a class, or name another label column.",
        )
    return Examples(found.texts, found.pairs, labels, found.groups)
