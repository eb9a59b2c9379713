"""Which column of a table is what: as the user says, or guessed from names and values.

A guess is made on the training rows alone and holds for every split.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from chipviz.config import RunConfig
from chipviz.data.task import Columns
from chipviz.errors import TaskError

TEXTS = ("text", "sentence", "content", "review", "document", "article", "title", "body")
LABELS = (
    *("label", "labels", "class", "category", "target", "topic", "intent", "sentiment"),
    *("answer", "answerkey", "gold_label"),
)
PAIRS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis")),
    *(("question1", "question2"), ("text1", "text2"), ("passage", "question")),
    *(("context", "question"), ("question", "sentence"), ("query", "passage")),
)
PASSAGES = ("passage", "article", "context", "document")
QUESTIONS = ("question", "question_stem", "query", "ctx")
CHOICES = ("choices", "options", "endings")
"""Names, in lower case, that are taken for each role when the user names none."""

_ANNOTATOR = re.compile(r"(label|class|annotator|annotation|rater|coder|judge|worker)s?[ _-]?\d+.*")
"""Names, in lower case, of columns of which each holds one person's labels."""


def find_columns(frame: pd.DataFrame, config: RunConfig, pictures: Sequence[str] = ()) -> Columns:
    """Find the column of every role.

    Args:
        frame: The training rows.
        config: What the user named. Naming a text turns guessing of its partner off.
        pictures: Columns that hold pictures. The first is read where the user names no text.

    Raises:
        TaskError: If a named column is not there, or no label or text column can be guessed.
    """
    frame = frame.drop(columns=[config.group], errors="ignore") if config.group else frame
    text, pair, label, choices = (
        named_column(frame, getattr(config, role), role)
        for role in ("text", "text_pair", "label", "choices")
    )
    found_label = label or _guess_label(frame)
    if pictures and (text is None or text in pictures):
        if pair is not None or choices is not None:
            raise TaskError(
                "A picture is read alone: it has no second text and no options.",
                "Leave these columns out.",
                "text_pair" if pair is not None else "choices",
            )
        guessed = (*(["text"] if text is None else []), *(["label"] if label is None else []))
        return Columns(found_label, text or pictures[0], guessed=guessed)
    lowered = {c.lower(): c for c in frame.columns if c != found_label}
    free = text is None and pair is None
    found_choices = choices or (_guess_choices(frame, lowered) if free else None)
    found_text, found_pair = text, pair
    if found_choices and free:
        found_text = _first(lowered, PASSAGES)
        found_pair = _first(lowered, QUESTIONS)
        if found_text is None:  # without a passage the question comes first
            found_text, found_pair = found_pair, None
    elif free:
        found_text, found_pair = next(
            ((lowered[a], lowered[b]) for a, b in PAIRS if {a, b} <= lowered.keys()), (None, None)
        )
    found_text = found_text or _guess_text(frame, {found_label, found_pair, found_choices})
    found = Columns(found_label, found_text, found_pair, found_choices)
    said = {"text": text, "text_pair": pair, "label": label, "choices": choices}
    guessed = tuple(role for role in found.roles if said[role] is None)
    return Columns(found_label, found_text, found_pair, found_choices, guessed)


def list_columns(columns: Sequence[Any] | pd.Index) -> str:
    """Names for a message: the first twelve, none of them long."""
    shown = ", ".join(repr(str(c)[:40]) for c in columns[:12])
    return shown + (", ..." if len(columns) > 12 else "")


def options_of(value: Any) -> list[str] | None:
    """The options in one cell, or None where it holds no list of them.

    Taken are lists of plain values, `{"text": [...], "label": [...]}` as ARC writes them, and both
    as JSON in a string, the way a CSV file has to.
    """
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, (list, tuple, np.ndarray)):
        return None
    options = list(value)
    if not options or any(
        option is None or isinstance(option, (list, tuple, dict, np.ndarray, bytes))
        for option in options
    ):
        return None
    return [str(option) for option in options]


def named_column(frame: pd.DataFrame, wanted: str | None, role: str) -> str | None:
    """The column that the user named for a role, checked.

    Raises:
        TaskError: If there is no such column.
    """
    if wanted is not None and wanted not in frame.columns:
        raise TaskError(
            f"There is no column {wanted!r}; columns are {list_columns(frame.columns)}.",
            "Name one of them.",
            role,
        )
    return wanted


def _first(lowered: dict[str, str], names: Sequence[str]) -> str | None:
    return next((lowered[name] for name in names if name in lowered), None)


def _guess_label(frame: pd.DataFrame) -> str:
    found = _first({c.lower(): c for c in frame.columns}, LABELS)
    several = [c for c in frame.columns if _ANNOTATOR.fullmatch(c.lower())]
    if found is None and len(several) > 1:
        raise TaskError(
            f"Columns {list_columns(several)} look like the labels of several annotators.",
            "Make one column of them, such as what most of them say, or name one of them.",
            "label",
        )
    if found is None:
        raise TaskError(
            f"No label column was found; columns are {list_columns(frame.columns)}.",
            "Name the column that holds the labels; a file without a row of names needs one, such "
            "as text,label.",
            "label",
        )
    return found


def _guess_choices(frame: pd.DataFrame, lowered: dict[str, str]) -> str | None:
    """A column of lists beside a question."""
    column = _first(lowered, CHOICES)
    if column is None or _first(lowered, QUESTIONS) is None:
        return None
    return column if options_of(frame[column].iloc[0]) else None


def _guess_text(frame: pd.DataFrame, taken: set[str | None]) -> str:
    """The usual name, else the column of the longest strings."""
    left = {c.lower(): c for c in frame.columns if c not in taken}
    usual = _first(left, TEXTS)
    if usual:
        return usual
    lengths: dict[str, float] = {}
    for column in left.values():
        strings = [v for v in frame[column].head(100).tolist() if isinstance(v, str)]
        if strings:
            lengths[column] = sum(map(len, strings)) / len(strings)
    if not lengths:
        raise TaskError(
            f"No text column was found; columns are {list_columns(frame.columns)}.",
            "Name the column that holds the texts.",
            "text",
        )
    return max(lengths, key=lambda column: lengths[column])
