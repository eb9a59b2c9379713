"""Labels in one form over all splits: what is meant by them, and what only looks alike."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chipviz.errors import Notice, TaskError

MAX_CLASSES = 1_000
"""Maximum number of classes. More different labels are numbers or texts."""
MAX_NUMBERS = 20
"""Maximum different labels with fractions. More are a quantity, not classes."""
N_EXAMPLES = 5
"""Maximum examples in a notice."""
JOINTS = "|;,"
"""Marks that may join several labels in one cell."""

_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)(\.0+)?")
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_TRUTH = {"true": "True", "false": "False"}


@dataclass(frozen=True)
class Labels:
    """The labels of a task as names."""

    by_split: dict[str, list[str]]
    names: list[str]
    """All of them: numbers in their order, others by their letters."""
    notices: list[Notice]


def read_labels(values: dict[str, list[Any]], column: str) -> Labels:
    """Name the class of every row; what is one class in several spellings becomes one.

    The kind of the column is decided on all splits together: where all labels are whole numbers,
    1, 1.0 and "1" are one class (but not "01"); where all are truth values, True and "true" are.
    Blanks around a label and the way an accented letter is put together are never meant.

    Args:
        values: Plain values per split.
        column: Its name, for messages.

    Raises:
        TaskError: If they are quantities, texts or several labels in a cell.
    """
    everything = [value for split in values.values() for value in split]
    written = [_written(value) for value in everything]
    name_of = _naming(set(written))
    by_split = {split: [name_of[_written(v)] for v in found] for split, found in values.items()}
    names = _ordered(set(name_of.values()))
    _refuse_what_are_no_classes(names, len(everything), column)
    notices = [
        *_trimmed(everything, column),
        *_merged(written, name_of, column),
        *_alike(Counter(name for split in by_split.values() for name in split), column),
    ]
    return Labels(by_split, names, notices)


def check_declared(names: Sequence[str], column: str) -> None:
    """Refuse class names of a source that no task may have.

    Raises:
        TaskError: If there are too many, or two are the same.
    """
    if len(names) > MAX_CLASSES:
        raise TaskError(
            f"Column {column!r} has {len(names):,} declared classes; expected {MAX_CLASSES:,} at "
            "most.",
            "Name the column that holds the labels.",
            "label",
        )
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise TaskError(
            f"Two declared classes of column {column!r} have the name {twice[0][:80]!r}.",
            "Write the table with another name for one of them.",
            "label",
        )


def _written(value: Any) -> str:
    """A label as it is written, without blanks around it, in composed letters."""
    return unicodedata.normalize("NFC", str(value)).strip()


def _naming(written: set[str]) -> dict[str, str]:
    """Spelling -> name of its class."""
    if all(_WHOLE.fullmatch(label) for label in written):
        return {label: str(int(label.partition(".")[0])) for label in written}
    if all(label.lower() in _TRUTH for label in written):
        return {label: _TRUTH[label.lower()] for label in written}
    if all(_NUMBER.fullmatch(label) for label in written):
        return {label: f"{float(label):.15g}" for label in written}
    return {label: label for label in written}


def _ordered(names: set[str]) -> list[str]:
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (float(name), name))  # beyond 2^53 floats tie
    return sorted(names)


def _refuse_what_are_no_classes(names: Sequence[str], n_rows: int, column: str) -> None:
    too_many = len(names) > MAX_CLASSES or len(names) == n_rows > 2
    numbers = all(_NUMBER.fullmatch(name) for name in names)
    if numbers and len(names) > MAX_NUMBERS and not all(map(_WHOLE.fullmatch, names)):
        raise TaskError(
            f"Column {column!r} holds {len(names):,} different numbers such as {names[0]} and "
            f"{names[-1]}: a quantity, not classes.",
            "Cut it into a few classes first, such as low and high, or name another column.",
            "label",
        )
    if too_many:
        raise TaskError(
            f"Column {column!r} has {len(names):,} different values in {n_rows:,} rows; expected "
            f"classes that repeat, {MAX_CLASSES:,} at most.",
            "Name the column that holds the labels.",
            "label",
        )
    for joint in JOINTS:
        joined = _joined(names, joint)
        if joined:
            raise TaskError(
                f"Column {column!r} holds several labels in a cell, such as {joined[0][:80]!r}; "
                "a text has one class here.",
                "Make one column per label, with yes and no, and train on one of them at a time.",
                "label",
            )


def _joined(names: Sequence[str], joint: str) -> list[str]:
    """Names that join several labels: one of their parts is a label, or most parts recur."""
    joined = [name for name in names if joint in name]
    parts = {name: {part.strip() for part in name.split(joint)} for name in names}
    of_labels = [name for name in joined if parts[name] & set(names)]
    if of_labels and (joint != "," or len(of_labels) > 1):
        return of_labels
    several = Counter(part for found in parts.values() for part in found)
    recur = 2 * sum(n > 1 for n in several.values()) >= len(several)
    return joined if len(joined) > 1 and len(several) < len(names) and recur else []


def _trimmed(values: Sequence[Any], column: str) -> list[Notice]:
    padded = Counter(v for v in values if isinstance(v, str) and v != v.strip())
    if not padded:
        return []
    message = f"Blanks around labels in column {column!r} are not part of them."
    return [Notice("labels-trimmed", message, padded.total(), _shown(padded))]


def _merged(written: Sequence[str], name_of: dict[str, str], column: str) -> list[Notice]:
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for label in written:
        spellings[name_of[label]][label] += 1
    several = {name: found for name, found in spellings.items() if len(found) > 1}
    if not several:
        return []
    n = sum(found.total() - max(found.values()) for found in several.values())
    examples = tuple(
        f"{' and '.join(map(repr, sorted(found)))} are {name}"
        for name, found in list(several.items())[:N_EXAMPLES]
    )
    message = f"Column {column!r} writes {len(several)} classes in several ways, taken as one each."
    return [Notice("labels-merged", message, n, examples)]


def _alike(counts: Counter[str], column: str) -> list[Notice]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups[key].append(name)
    alike = [sorted(names) for names in groups.values() if len(names) > 1]
    if not alike:
        return []
    n = sum(sum(counts[name] for name in names) - max(counts[x] for x in names) for names in alike)
    examples = tuple(
        " and ".join(f"{name!r} ({counts[name]})" for name in names) for names in alike[:N_EXAMPLES]
    )
    message = f"Column {column!r} has classes that look alike; they are kept apart."
    return [Notice("labels-look-alike", message, n, examples)]


def _shown(counts: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{label[:80]!r} ({n})" for label, n in counts.most_common(N_EXAMPLES))
