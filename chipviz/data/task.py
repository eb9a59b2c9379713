"""Task: texts, labels, label names and splits.

Knows neither tables nor tokenizers nor models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chipviz.errors import ConfigError, Notice
from chipviz.keys import Split

TaskKind = Literal["text", "image"]
MAX_TEXT = 10_000_000
"""Maximum characters per text. A longer one is a file that was put into a cell."""


@dataclass(frozen=True)
class Examples:
    """The rows of one split."""

    texts: list[str]
    """Texts, or references of pictures."""
    pairs: list[str] | None
    """Second texts, where the task has two fields."""
    labels: NDArray[np.int64]
    """Class indices, shape (N,)."""

    groups: list[str] | None = None
    """What each row belongs to, where rows of one group must not be parted."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Examples":
        """The given rows, in the given order."""
        pairs, groups = self.pairs, self.groups
        return Examples(
            [self.texts[i] for i in rows],
            None if pairs is None else [pairs[i] for i in rows],
            self.labels[np.asarray(rows, dtype=np.int64)],
            None if groups is None else [groups[i] for i in rows],
        )

    def joined(self, other: "Examples") -> "Examples":
        """These rows, and then those of another split of the same task."""
        both = (self.pairs, other.pairs), (self.groups, other.groups)
        pairs, groups = ([*a, *b] if a and b else None for a, b in both)
        labels = np.concatenate([self.labels, other.labels])
        return Examples(self.texts + other.texts, pairs, labels, groups)


@dataclass(frozen=True)
class PictureLook:
    """One training picture, and what a model will see of it."""

    reference: str
    """Its name in the home folder's store."""
    label: str
    width: int
    height: int
    seen: tuple[float, float, float, float]
    """Left, top, right and bottom of what the processor's crop leaves, in shares of the picture."""


@dataclass(frozen=True)
class Columns:
    """The column of each role."""

    label: str
    text: str
    """The first text. In multiple choice the passage, or the question if there is no passage."""
    text_pair: str | None = None
    """The second text. In multiple choice the question, if there is a passage."""
    choices: str | None = None
    """The options of multiple choice: a list in every row."""
    guessed: tuple[str, ...] = ()
    """Roles that nobody named."""

    @property
    def roles(self) -> dict[str, str]:
        """Role -> column, of the roles there are."""
        roles = {
            "text": self.text,
            "text_pair": self.text_pair,
            "choices": self.choices,
            "label": self.label,
        }
        return {role: column for role, column in roles.items() if column is not None}


@dataclass(frozen=True)
class Task:
    """A classification task: what to read, what to answer, and what may be looked at when."""

    name: str
    label_names: tuple[str, ...]
    splits: dict[Split, Examples]
    """`train` fits chips, `validation` chooses, `test` is scored once. Rows stand in a seeded order
    whose every prefix is stratified: the first rows are a fair small sample."""
    template: str | None = None
    """The prompt the user gave, or the one such questions are asked in. None is the bare text."""
    columns: Columns | None = None
    """What was read. None for a task that comes from no table."""
    made: tuple[Split, ...] = ()
    """Splits the source does not have, taken from its training rows."""
    revision: str | None = None
    """Which state of the data set on the Hub this is."""
    notices: tuple[Notice, ...] = ()
    """What must be said of how its rows were read and chosen."""
    kind: TaskKind = "text"
    """What is read."""
    fold: NDArray[np.int64] | None = None
    """Fold of each training and then of each validation text, (N,). Without folds, the validation
    texts judge the chips of the training texts."""

    @property
    def folds(self) -> int:
        """Folds there are, 1 where there are none."""
        return 1 if self.fold is None else int(self.fold.max()) + 1

    def judged(self, split: Split) -> Examples:
        """The texts that scores of a split are about: with folds, validation means all labelled."""
        if split == "validation" and self.fold is not None:
            return self.splits["train"].joined(self.splits["validation"])
        return self.splits[split]

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.label_names)

    @property
    def test_fingerprint(self) -> str:
        """Changes when the test texts, their order or their labels do."""
        rows = self.splits["test"]
        names = [self.label_names[label] for label in rows.labels]
        return hashlib.sha256(repr((rows.texts, rows.pairs, names)).encode()).hexdigest()

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


def refuse_kind(reads: TaskKind, given: TaskKind) -> None:
    """Refuse texts where pictures are read, and the other way round.

    Raises:
        ConfigError: If they differ.
    """
    if reads != given:
        one, other = ("Texts", "a picture") if reads == "text" else ("Pictures", "a text")
        raise ConfigError(
            f"{one} are read here, and {other} was given.",
            "Give --image a picture where pictures are read, and --text a text elsewhere.",
        )


def check_fields(takes_pair: bool, texts: Sequence[str], pairs: Sequence[str] | None) -> None:
    """Refuse a second text that has no place in the prompt, or the lack of one.

    Raises:
        ConfigError: Saying what is read.
    """
    if takes_pair and pairs is None:
        raise ConfigError(
            "Two texts are read here, and the second is missing.",
            "Give both texts, or a table with both columns.",
        )
    if not takes_pair and pairs is not None:
        raise ConfigError("One text is read here; a second has no place.", "Leave it out.")
    if pairs is not None and len(pairs) != len(texts):
        raise ConfigError(
            f"There are {len(texts)} texts and {len(pairs)} second texts.",
            "Give each text its second text.",
        )


def text_keys(rows: Examples) -> list[tuple[str, str]]:
    """What counts as the same text: both of them, whatever their case and white space."""
    pairs = rows.pairs or [""] * len(rows)
    return [
        (" ".join(text.lower().split()), " ".join(pair.lower().split()))
        for text, pair in zip(rows.texts, pairs, strict=True)
    ]


def say_columns(roles: dict[str, str], guessed: Sequence[str]) -> str:
    """The columns in words: "text = `headline`, label = `topic`, guessed"."""
    if set(roles) <= set(guessed):
        return ", ".join(f"{role} = `{column}`" for role, column in roles.items()) + ", guessed"
    return ", ".join(
        f"{role} = `{column}`" + " (guessed)" * (role in guessed) for role, column in roles.items()
    )


def notice_in_words(notice: Notice) -> str:
    """One line of a terminal; examples are quoted where they come from data."""
    examples = f" For example {'; '.join(notice.examples)}." if notice.examples else ""
    return f"Warning: {notice.message}{examples}"
