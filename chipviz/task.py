"""Task: texts, labels, label names and splits.

Knows tables; nothing of tokenizers or models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from chipviz.config import RunConfig, Split
from chipviz.errors import TaskError
from chipviz.tables import Table

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "article", "title", "body")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "topic", "intent", "sentiment")
"""Names that are taken for texts and labels when the user names none."""

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2
"""What a source without these splits gives up of its training rows."""


@dataclass(frozen=True)
class Examples:
    """The rows of one split."""

    texts: list[str]
    pairs: list[str] | None
    """Second texts, where the task has two fields."""
    labels: NDArray[np.int64]
    """Class indices, shape (N,)."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Examples":
        """The given rows, in the given order."""
        pairs = self.pairs
        return Examples(
            [self.texts[i] for i in rows],
            None if pairs is None else [pairs[i] for i in rows],
            self.labels[np.asarray(rows, dtype=np.int64)],
        )


@dataclass(frozen=True)
class Task:
    """A classification task: what to read, what to answer, and what may be looked at when."""

    name: str
    label_names: tuple[str, ...]
    splits: dict[Split, Examples]
    """`train` fits chips, `validation` chooses, `test` is scored once. Rows stand in a seeded order
    whose every prefix is stratified: the first rows are a fair small sample."""

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.label_names)

    @property
    def fingerprint(self) -> str:
        """Changes when any text, label, name or their order does."""
        digest = hashlib.sha256(repr(self.label_names).encode())
        for split, rows in self.splits.items():
            digest.update(f"{split}{len(rows)}".encode())
            for text in [*rows.texts, *(rows.pairs or [])]:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
            digest.update(rows.labels.tobytes())
        return digest.hexdigest()


def make_task(table: Table, config: RunConfig) -> Task:
    """Turn a table into a task: find columns, name classes, make missing splits, limit sizes.

    Raises:
        TaskError: If columns, labels or classes do not make a classification task.
    """
    frames = {split: _columns(frame, split, config) for split, frame in table.frames.items()}
    label_column = next(iter(frames.values())).label_column
    declared = table.label_names.get(label_column)
    names = _label_names(frames, declared)
    examples = {
        split: _examples(frame, split, names, numbered=declared is not None)
        for split, frame in frames.items()
    }
    splits = _make_splits(examples, np.random.default_rng(config.seed))
    limits = (config.max_train, config.max_validation, config.max_test)
    taken: dict[Split, Examples] = {
        split: rows.take(range(min(len(rows), limit or len(rows))))
        for (split, rows), limit in zip(splits.items(), limits, strict=True)
    }
    for split, rows in taken.items():
        if not len(rows):
            raise TaskError(
                f"No text is left for the {split} split of {table.name}.",
                "Give more different texts: three splits are needed to fit, choose and report.",
            )
    if len(present := set(taken["train"].labels.tolist())) < 2:
        raise TaskError(
            f"The training texts of {table.name} have one class only, {names[present.pop()]!r}; "
            "a classifier needs two.",
            "Give data with at least two labels, or another --label column.",
        )
    return Task(table.name, tuple(names), taken)


@dataclass(frozen=True)
class _Frame:
    """One split's texts and raw labels."""

    texts: list[str]
    pairs: list[str] | None
    labels: Any
    label_column: str


def _columns(frame: pd.DataFrame, split: str, config: RunConfig) -> _Frame:
    label = _named(frame, config.label, "label") or _guess_label(frame)
    text = _named(frame, config.text, "text") or _guess_text(frame, label)
    pair = _named(frame, config.text_pair, "text-pair")
    labels = frame[label]
    for column in [label, text, *([pair] if pair else [])]:
        _check_values(frame[column], f"in column {column!r}", split)
    texts = frame[text].astype(str).tolist()
    pairs = frame[pair].astype(str).tolist() if pair else None
    return _Frame(texts, pairs, labels, label)


def _check_values(values: Any, where: str, split: str) -> None:
    """Every row has a value, and it is one value, of characters that have an encoding."""
    missing = values.isna().to_numpy()
    if missing.any():
        raise TaskError(
            f"{_row(int(missing.argmax()), split)} has no value {where} "
            f"({int(missing.sum())} rows lack one).",
            "Fill or remove these rows.",
        )
    if not pd.api.types.is_object_dtype(values):
        return
    for row, value in enumerate(values):
        if isinstance(value, (list, tuple, set, dict, np.ndarray)):
            raise TaskError(
                f"{_row(row, split)} has a {type(value).__name__} {where}, expected one value.",
                "Give a column of plain values: one text, one label a row.",
            )
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise TaskError(
                f"{_row(row, split)} has half of a surrogate pair {where}.",
                "Write the file anew as UTF-8, or remove this row.",
            ) from None


def _row(row: int, split: str) -> str:
    """A row as the user counts it."""
    return f"Row {row + 1}" if split == "all" else f"Row {row + 1} of {split}"


def _named(frame: pd.DataFrame, wanted: str | None, option: str) -> str | None:
    """The column the user named, checked."""
    if wanted is not None and wanted not in frame.columns:
        raise TaskError(
            f"There is no column {wanted!r}; columns are {_list(frame.columns)}.",
            f"Name one of them with --{option}.",
        )
    return wanted


def _guess_label(frame: pd.DataFrame) -> str:
    lowered = {str(column).lower(): str(column) for column in frame.columns}
    for name in LABEL_COLUMNS:
        if name in lowered:
            return lowered[name]
    raise TaskError(
        f"No label column was found; columns are {_list(frame.columns)}.",
        "Name the column that holds the labels with --label.",
    )


def _guess_text(frame: pd.DataFrame, label: str) -> str:
    lowered = {str(column).lower(): str(column) for column in frame.columns}
    for name in TEXT_COLUMNS:
        if name in lowered and lowered[name] != label:
            return lowered[name]
    lengths = {
        str(column): frame[column].head(100).str.len().mean()
        for column in frame.columns
        if str(column) != label and pd.api.types.is_string_dtype(frame[column])
    }
    if not lengths:
        raise TaskError(
            f"No text column was found; columns are {_list(frame.columns)}.",
            "Name the column that holds the texts with --text.",
        )
    return max(lengths, key=lambda column: lengths[column])


def _list(columns: Sequence[Any] | pd.Index) -> str:
    shown = ", ".join(repr(str(c)[:40]) for c in columns[:12])
    return shown + (", ..." if len(columns) > 12 else "")


def _label_names(frames: dict[str, _Frame], declared: list[str] | None) -> list[str]:
    if declared is not None:
        return declared
    values = {value for frame in frames.values() for value in frame.labels.unique().tolist()}
    if all(isinstance(v, (int, np.integer, bool)) for v in values):
        return [str(v) for v in sorted(values)]
    return sorted({str(v) for v in values})


def _examples(frame: _Frame, split: str, names: list[str], *, numbered: bool) -> Examples:
    """Class indices from values; integers are class numbers where the source declares names."""
    index = {name: i for i, name in enumerate(names)}
    if numbered and pd.api.types.is_integer_dtype(frame.labels):
        labels = frame.labels.to_numpy(dtype=np.int64)
    else:
        labels = np.array([index.get(str(v), -1) for v in frame.labels], dtype=np.int64)
    outside = (labels < 0) | (labels >= len(names))
    if outside.any():
        row = int(outside.argmax())
        raise TaskError(
            f"{_row(row, split)} has label {str(frame.labels.iloc[row])[:80]!r}, "
            f"which is none of the {len(names)} classes.",
            "Remove rows without a class, or name another label column.",
        )
    return Examples(frame.texts, frame.pairs, labels)


def _make_splits(found: dict[str, Examples], rng: np.random.Generator) -> dict[Split, Examples]:
    """Order every split, and carve the missing ones from the training rows.

    Where splits are made here, repeated texts are dropped first, so that none straddles two.
    """
    train = found["all"] if "all" in found else found["train"]
    missing = [s for s in ("validation", "test") if s not in found]
    if missing:
        train = train.take(_first_of_each_text(train))
    train = train.take(stratified_order(train.labels, rng))
    made: dict[str, Examples] = {}
    start = 0
    for split, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if split in missing:
            stop = start + max(1, round(share * len(train)))
            made[split] = train.take(range(start, min(stop, len(train))))
            start = stop
        else:
            rows = found[split]
            made[split] = rows.take(stratified_order(rows.labels, rng))
    rest = train.take(range(min(start, len(train)), len(train)))
    return {"train": rest, "validation": made["validation"], "test": made["test"]}


def _first_of_each_text(rows: Examples) -> list[int]:
    seen: dict[tuple[str, str], int] = {}
    for i, text in enumerate(rows.texts):
        pair = rows.pairs[i] if rows.pairs else ""
        seen.setdefault((" ".join(text.lower().split()), " ".join(pair.lower().split())), i)
    return list(seen.values())


def stratified_order(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of which every prefix holds the classes nearly in their shares.

    Of two classes, each is within one row of its share; of more, each may add one to the others.
    Each class's rows are spread evenly over [0, 1) with a random phase; sorting mixes them.
    """
    order = rng.permutation(len(labels))
    at = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        at[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(at, kind="stable").astype(np.int64)
