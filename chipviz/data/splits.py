"""Splits and folds: repeats found, contradictions named, what is missing made, no text in two."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from chipviz.config import Contradictions, RunConfig
from chipviz.data.columns import named_column
from chipviz.data.hub import SPLIT_NAMES
from chipviz.data.pictures import PLAIN, look_of
from chipviz.data.task import Examples, Task, text_keys
from chipviz.errors import Notice, TaskError
from chipviz.keys import Split

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2
"""Shares of the training rows that a source without these splits gives up."""
N_EXAMPLES = 5
"""Maximum examples in a notice."""


@dataclass(frozen=True)
class Made:
    """The three splits of a task, each in an order whose every prefix is stratified."""

    splits: dict[Split, Examples]
    notices: list[Notice]


def make_splits(
    found: dict[str, Examples],
    names: Sequence[str],
    contradictions: Contradictions,
    rng: np.random.Generator,
) -> Made:
    """Order every split, and carve the missing ones from the training rows.

    Where splits are made here, of rows with the same text and label one is kept, and rows whose
    text stands in a split of the source leave. Texts that differ in case and blanks alone stay,
    all in one split.

    Args:
        found: Rows of `train` or `all`, and of the splits that the source has.
        names: Class names, for messages.
        contradictions: What becomes of texts with several labels.
        rng: Draws the order.

    Raises:
        TaskError: If texts have several labels, and these are to be refused.
    """
    train = found["all"] if "all" in found else found["train"]
    train, notices = _without_contradictions(train, names, contradictions)
    missing = [s for s in ("validation", "test") if s not in found]
    kept = {split: rows for split, rows in found.items() if split in ("validation", "test")}
    notices += _shared_groups({"train": train, **kept})
    if not missing:
        notices += _shared({"train": train, **kept})
        ordered = train.take(stratified_order(train.labels, rng))
        there = _in_order(kept, rng)
        return Made(_three(ordered, there), notices)
    train, said = _each_once(train, kept)
    groups = _groups(train)
    order = stratified_order(train.labels[[rows[0] for rows in groups]], rng)
    made, start = {}, 0
    for split, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if split in missing:
            stop = min(start + max(1, round(share * len(groups))), len(groups))
            made[split] = _taken(train, groups, order[start:stop])
            start = stop
    rest = _taken(train, groups, order[start:])
    there = made | _in_order(kept, rng)
    return Made(_three(rest, there), notices + said)


def split_by_column(frames: dict[str, pd.DataFrame], column: str) -> dict[str, pd.DataFrame]:
    """The splits that a column of one table names.

    Raises:
        TaskError: If there is no such column, the source has splits of its own, or a value names
            none.
    """
    if "all" not in frames:
        raise TaskError(
            f"The data has splits of its own ({', '.join(frames)}), so column {column!r} cannot "
            "name them.",
            "Leave the split column out, or give one file with all rows.",
            "split",
        )
    frame = frames["all"]
    named_column(frame, column, "split")
    said = [str(value).strip() for value in frame[column].tolist()]
    named = [SPLIT_NAMES.get(value.lower()) for value in said]
    if None in named:
        row = named.index(None)
        raise TaskError(
            f"Row {row + 1} has {said[row][:40]!r} in column {column!r}, which names no split.",
            "Write train, validation or test in each row.",
            "split",
        )
    if "train" not in named:
        raise TaskError(
            f"No row is of split train in column {column!r}.", "Write train in some.", "split"
        )
    rest, which = frame.drop(columns=column), np.array(named)
    there = [split for split in ("train", "validation", "test") if split in named]
    return {split: rest.loc[which == split].reset_index(drop=True) for split in there}


def stratified_order(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of which every prefix holds the classes nearly in their shares.

    Each of two classes is within one row of its share. Each further class may add one row.
    Each class's rows are spread evenly over [0, 1) with a random phase. Sorting mixes them.
    """
    order = rng.permutation(len(labels))
    at = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        at[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(at, kind="stable").astype(np.int64)


def folds_of(task: Task, config: RunConfig) -> NDArray[np.int64] | None:
    """The fold of each training and then of each validation text of a run, if it has folds.

    Raises:
        ConfigError: If the settings ask for folds together with what has none.
    """
    train, validation = task.splits["train"], task.splits["validation"]
    k = config.n_folds(n_validation=len(validation), made="validation" in task.made)
    return fold_of(train.joined(validation), k, config.seed) if k > 1 else None


def fold_of(rows: Examples, k: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row, 0 .. k-1, shape (N,).

    Classes are spread evenly. Texts that are the same but for case and blanks, or of one group,
    stand in one fold: a chip must not know a text that it is asked about.
    """
    groups = _groups(rows)
    first = rows.labels[[group[0] for group in groups]]
    order = stratified_order(first, np.random.default_rng(seed))
    fold = np.empty(len(rows), dtype=np.int64)
    for place, group in enumerate(order.tolist()):
        fold[groups[group]] = place % k
    return fold


def without_untrained(
    splits: dict[Split, Examples], names: Sequence[str], *, renumber: bool
) -> tuple[dict[Split, Examples], list[str], list[Notice]]:
    """Leave out the rows of classes that have no training text: no chip can ever say them.

    Args:
        splits: The three splits.
        names: Class names.
        renumber: Whether such classes go too. Names that a source declares keep their numbers.

    Returns:
        Splits, names and notices.
    """
    counts = Counter(splits["train"].labels.tolist())
    notices = []
    lone = [names[int(label)] for label, n in sorted(counts.items()) if n == 1]
    if lone:
        message = (
            f"{len(lone)} classes have a single training text each."
            if len(lone) > 1
            else "A class has a single training text."
        )
        notices.append(Notice("class-with-one-text", message, len(lone), tuple(lone[:N_EXAMPLES])))
    gone = Counter(
        names[label]
        for rows in (splits["validation"], splits["test"])
        for label in rows.labels.tolist()
        if label not in counts
    )
    if gone:
        shown = tuple(f"{name[:80]} ({n})" for name, n in gone.most_common(N_EXAMPLES))
        message = (
            f"{len(gone)} classes have no training text and can never be predicted: their "
            f"{gone.total()} validation and test texts are left out."
        )
        notices.append(Notice("class-without-training", message, gone.total(), shown))
        trained = list(counts)
        splits = {
            split: rows.take(np.flatnonzero(np.isin(rows.labels, trained)))
            for split, rows in splits.items()
        }
    if not renumber or len(counts) == len(names):
        return splits, list(names), notices
    old = sorted(counts)
    new = np.full(len(names), -1, dtype=np.int64)
    new[old] = np.arange(len(old))
    splits = {split: replace(rows, labels=new[rows.labels]) for split, rows in splits.items()}
    return splits, [names[int(label)] for label in old], notices


def _without_contradictions(
    train: Examples, names: Sequence[str], contradictions: Contradictions
) -> tuple[Examples, list[Notice]]:
    labels: dict[tuple[str, str], set[int]] = defaultdict(set)
    keys = list(zip(train.texts, train.pairs or [""] * len(train), strict=True))
    for key, label in zip(keys, train.labels.tolist(), strict=True):
        labels[key].add(label)
    both = {key: found for key, found in labels.items() if len(found) > 1}
    if not both:
        return train, []
    examples = tuple(
        f"{key[0][:60]!r} is {' and '.join(names[label] for label in sorted(found))}"
        for key, found in list(both.items())[:N_EXAMPLES]
    )
    n = len(both)
    if contradictions == "refuse":
        raise TaskError(
            f"{n} texts have several labels: {examples[0]}.",
            "Give each text one label, or keep or drop such texts.",
            "contradictions",
        )
    fate = (
        "All their rows are left out." if contradictions == "drop" else "All their rows are kept."
    )
    notice = Notice("contradicting-labels", f"{n} texts have several labels. {fate}", n, examples)
    if contradictions == "keep":
        return train, [notice]
    return train.take([i for i, key in enumerate(keys) if key not in both]), [notice]


def _each_once(train: Examples, kept: dict[str, Examples]) -> tuple[Examples, list[Notice]]:
    """Drop exact repeats, and rows whose text stands in a split that is kept as it is."""
    taken = {key for rows in kept.values() for key in text_keys(rows)}
    pairs = train.pairs or [""] * len(train)
    seen: set[tuple[str, str, int]] = set()
    stay, repeats, shared = [], [], 0
    exact = zip(train.texts, pairs, train.labels.tolist(), strict=True)
    for i, (row, key) in enumerate(zip(exact, text_keys(train), strict=True)):
        if key in taken:
            shared += 1
        elif row in seen:
            repeats.append(row[0])
        else:
            seen.add(row)
            stay.append(i)
    notices = []
    if repeats:
        examples = tuple(repr(text[:60]) for text in dict.fromkeys(repeats))[:N_EXAMPLES]
        message = f"{len(repeats)} rows repeat a text with its label and are left out."
        notices.append(Notice("repeated-texts", message, len(repeats), examples))
    if shared:
        message = f"{shared} training rows stand in another split of the source and are left out."
        notices.append(Notice("shared-texts", message, shared))
    return train.take(stay), notices


def _shared(splits: dict[str, Examples]) -> list[Notice]:
    """Texts that stand in two splits of the source, which are kept as they are."""
    keys = {split: set(text_keys(rows)) for split, rows in splits.items()}
    pairs = (("train", "validation"), ("train", "test"), ("validation", "test"))
    counts = {f"{a} and {b}": len(keys[a] & keys[b]) for a, b in pairs}
    examples = tuple(f"{n} in {where}" for where, n in counts.items() if n)
    if not examples:
        return []
    n = sum(counts.values())
    message = f"{n} texts stand in two splits of the source, which are kept as they are."
    return [Notice("shared-texts", message, n, examples)]


def look_alikes(task: Task) -> list[Notice]:
    """Validation and test pictures that look like a training picture, and are other files.

    They stay: frames of one film are no mistake, but the accuracy on them is no measure of new
    films. Repeated files count as repeated texts do.
    """
    train = set(task.splits["train"].texts)
    looks = {look_of(one) for one in train} - {PLAIN}
    counts = {
        split: sum(look_of(one) in looks and one not in train for one in task.splits[split].texts)
        for split in ("validation", "test")
    }
    n = sum(counts.values())
    if not n:
        return []
    message = f"{n:,} validation or test pictures look like a training picture."
    shown = tuple(f"{k:,} of {split}" for split, k in counts.items() if k)
    return [Notice("pictures-look-alike", message, n, shown)]


def _shared_groups(splits: dict[str, Examples]) -> list[Notice]:
    """Groups that the source itself has in two splits."""
    where: dict[str, set[str]] = defaultdict(set)
    for split, rows in splits.items():
        for group in rows.groups or ():
            where[group].add(split)
    both = [group for group, found in where.items() if len(found) > 1]
    if not both:
        return []
    message = f"{len(both)} groups stand in two splits of the source, which are kept as they are."
    return [Notice("shared-groups", message, len(both), tuple(g[:60] for g in both[:N_EXAMPLES]))]


def _groups(rows: Examples) -> list[list[int]]:
    """Rows that must not be parted: of one group, or the same text but for case and blanks."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, key in enumerate(text_keys(rows)):
        groups[key].append(i)
    if rows.groups is None:
        return list(groups.values())
    # A text of two groups ties both together: each row points to the first of its company.
    leader = list(range(len(rows)))

    def first_of(row: int) -> int:
        while leader[row] != row:
            leader[row] = row = leader[leader[row]]
        return row

    for i, group in enumerate(rows.groups):
        groups[group].append(i)
    for company in groups.values():
        for row in company[1:]:
            a, b = sorted((first_of(company[0]), first_of(row)))
            leader[b] = a
    tied: dict[int, list[int]] = defaultdict(list)
    for row in range(len(rows)):
        tied[first_of(row)].append(row)
    return list(tied.values())


def _taken(rows: Examples, groups: list[list[int]], which: NDArray[np.int64]) -> Examples:
    return rows.take([row for group in which.tolist() for row in groups[group]])


def _three(train: Examples, others: dict[Split, Examples]) -> dict[Split, Examples]:
    return {"train": train, "validation": others["validation"], "test": others["test"]}


def _in_order(kept: dict[str, Examples], rng: np.random.Generator) -> dict[Split, Examples]:
    ordered: dict[Split, Examples] = {}
    for split in ("test", "validation"):
        if split in kept:
            rows = kept[split]
            ordered[split] = rows.take(stratified_order(rows.labels, rng))
    return ordered
