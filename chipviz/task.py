"""Task: texts, labels, label names and splits; and the prompt, baked into the tokenizer.

Knows tables and tokenizers; nothing of models.
"""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from chipviz.config import RunConfig, Split
from chipviz.errors import ConfigError, SourceError, TaskError
from chipviz.sources import Table

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "article", "title", "body")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "topic", "intent", "sentiment")
"""Names that are taken for texts and labels when the user names none."""

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2
"""What a source without these splits gives up of its training rows."""

FITTING_SHARE = 0.95
"""Share of the over-long training texts that stay within the token limit after the cut."""


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


# --- the prompt ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A tokenizer that turns raw texts into whole prompts: template, limit and all.

    Saved with a bundle it does the same inside plain `transformers`, which never truncates unless
    told to; hence the limit stands in the tokenizer's normalizer, as characters.
    """

    tokenizer: Any
    template: str
    max_length: int
    max_chars: int
    """Where a longer text is cut before it is tokenised, in characters."""

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of whole prompts, one list a text."""
        if not texts:
            return []
        longest = self.tokenizer.model_max_length
        return self.tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            truncation="only_first",
            max_length=longest if longest < 10**9 else None,
        )["input_ids"]

    def save(self, folder: Path) -> None:
        """Write the tokenizer, template and limit included, as plain `transformers` reads it."""
        self.tokenizer.chat_template = None  # it would be wrapped around the baked template
        self.tokenizer.save_pretrained(folder)
        # A family's own class builds its steps anew and would drop template and limit; this one
        # takes tokenizer.json as it stands.
        path = folder / "tokenizer_config.json"
        said = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        said.pop("auto_map", None)
        path.write_text(json.dumps(said, indent=2, ensure_ascii=False), "utf-8")

    @property
    def fingerprint(self) -> str:
        """Changes when any text could come out as other tokens."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder; padding on the right, which every rule here assumes.

    Raises:
        SourceError: If the folder holds none, or none that the `tokenizers` library can run.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"No tokenizer can be loaded from {folder.name}: {' '.join(str(error).split())[:160]}",
            "The folder needs tokenizer.json and tokenizer_config.json.",
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise SourceError(
            f"{folder.name} has only a slow tokenizer.", "Save its fast form (tokenizer.json)."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def bake(tokenizer: Any, template: str | None, max_length: int, sample: Examples) -> Prompt:
    """Put the template and the length limit into a copy of the tokenizer.

    Args:
        tokenizer: As loaded; not changed.
        template: Prompt around `{text}` and, for two fields, `{text_pair}`; None for bare texts.
        max_length: Tokens a prompt may have.
        sample: Training rows, to find out how many characters fit the limit.

    Raises:
        ConfigError: If the template lacks a field, or the limit cannot hold it.
    """
    two = sample.pairs is not None
    template = template or ("{text}\n{text_pair}" if two else "{text}")
    parts = _parse(template, two)
    rows = sample.take(range(min(len(sample), 2000)))
    baked, pieces = _with_template(tokenizer, parts, rows)
    n_fixed = sum(len(ids) for ids in pieces)
    room = max_length - n_fixed
    if rows.pairs is not None:
        lengths = [len(i) for i in tokenizer(rows.pairs, add_special_tokens=False)["input_ids"]]
        room -= int(np.quantile(lengths, FITTING_SHARE))
    if room < 1:
        raise ConfigError(
            f"The template takes {n_fixed} tokens, which leaves no room for text "
            f"within --max-length {max_length}.",
            f"Give --max-length {max(n_fixed + 16, max_length - room + 16)} or more, "
            "or a shorter template.",
        )
    max_chars = _chars_for(tokenizer, rows.texts, room)
    normalizer = baked.backend_tokenizer.normalizer
    cut = normalizers.Replace(Regex(rf"\A[\s\S]{{{max_chars}}}\K[\s\S]+"), "")
    steps = [cut, *([normalizer] if normalizer is not None else [])]
    baked.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return Prompt(baked, template, max_length, max_chars)


def load_prompt(folder: Path, template: str, max_length: int, max_chars: int) -> Prompt:
    """Read a baked tokenizer that `Prompt.save` wrote."""
    return Prompt(load_tokenizer(folder), template, max_length, max_chars)


def n_truncated(prompt: Prompt, task: Task) -> int:
    """How many texts of a task the length limit shortens."""
    return sum(len(t) > prompt.max_chars for rows in task.splits.values() for t in rows.texts)


def _parse(template: str, two: bool) -> list[str]:
    """Split a template into literal pieces and fields, in order."""
    parts = [part for part in re.split(r"(\{text\}|\{text_pair\})", template) if part]
    wanted = ["{text}", "{text_pair}"] if two else ["{text}"]
    for field in ("{text}", "{text_pair}"):
        if parts.count(field) != wanted.count(field):
            raise ConfigError(
                f"The template holds {field} {parts.count(field)} times, "
                f"expected {wanted.count(field)}: {template[:80]!r}.",
                "Write a template such as 'News: {text}\\nTopic of this article:'"
                + ("; {text_pair} needs --text-pair." if field == "{text_pair}" else "."),
            )
    return parts


def _with_template(tokenizer: Any, parts: list[str], rows: Examples) -> tuple[Any, list[list[int]]]:
    """A copy of the tokenizer whose post-processor writes the whole prompt, and its fixed pieces.

    A space before `{text}` belongs to the text's first token in most vocabularies. Three ways to
    hand it over are tried, and the one that agrees most with the plainly tokenised prompt is kept.
    """
    at = parts.index("{text}")
    ways: list[tuple[list[str], bool]] = [(parts, False)]
    if at and parts[at - 1].endswith(" ") and not parts[at - 1].endswith("  "):
        without = [*parts[: at - 1], parts[at - 1][:-1], *parts[at:]]
        ways = [(without, True), (without, False), (parts, False)]
    if len(ways) == 1 or rows.pairs is not None:
        return _assemble(tokenizer, *ways[-1])
    few = [text.strip()[:200] for text in rows.texts[:8]]
    template = "".join(parts)
    plain = tokenizer([template.replace("{text}", text) for text in few])["input_ids"]

    def agreement(way: tuple[list[str], bool]) -> int:
        baked, _ = _assemble(tokenizer, *way)
        return sum(a == b for a, b in zip(baked(few)["input_ids"], plain, strict=True))

    return _assemble(tokenizer, *max(ways, key=agreement))


def _assemble(tokenizer: Any, parts: list[str], glue: bool) -> tuple[Any, list[list[int]]]:
    baked = copy.deepcopy(tokenizer)
    backend = baked.backend_tokenizer
    before, after = _specials_around(tokenizer)
    literal = [p for p in parts if p not in ("{text}", "{text_pair}")]
    pieces = {f"piece{i}": _ids_of(tokenizer, p) for i, p in enumerate(literal)}
    pieces |= {"before": before, "after": after}
    names = iter(f"piece{i}" for i in range(len(literal)))
    fields = {"{text}": "$A:0", "{text_pair}": "$B:0"}
    middle = [fields.get(p) or f"{next(names)}:0" for p in parts]
    layout = [
        item
        for item in ["before:0", *middle, "after:0"]
        if item.startswith("$") or pieces[item[:-2]]
    ]
    special = [
        {"id": name, "ids": ids, "tokens": [f"{name}.{i}" for i in range(len(ids))]}
        for name, ids in pieces.items()
        if ids
    ]
    two = "{text_pair}" in parts
    backend.post_processor = TemplateProcessing(
        single=[item for item in layout if item != "$B:0"],
        pair=layout if two else [*layout, "$B:0"],
        special_tokens=special,
    )
    if glue:
        was = backend.normalizer
        steps = [*([was] if was is not None else []), normalizers.Prepend(" ")]
        backend.normalizer = normalizers.Sequence(steps)
    # A text is data: "<|im_end|>" inside it must not become the control token.
    baked.split_special_tokens = True
    baked.init_kwargs["split_special_tokens"] = True
    return baked, list(pieces.values())


def _specials_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the family puts before and after a text (BOS, CLS, SEP), as ids."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _ids_of(tokenizer: Any, piece: str) -> list[int]:
    """Token ids of a literal piece as they stand after other text, not at the start of one."""
    anchor = tokenizer("a\n", add_special_tokens=False)["input_ids"]
    both = tokenizer("a\n" + piece, add_special_tokens=False)["input_ids"]
    if both[: len(anchor)] == anchor:
        return both[len(anchor) :]
    return tokenizer(piece, add_special_tokens=False)["input_ids"]


def _chars_for(tokenizer: Any, texts: Sequence[str], room: int) -> int:
    """How many characters of a text `room` tokens hold, for all but a few texts."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    long = [offsets for offsets in encoded["offset_mapping"] if len(offsets) > room]
    if long:
        fits = [offsets[room - 1][1] for offsets in long]
    else:
        counts = [max(1, len(offsets)) for offsets in encoded["offset_mapping"]]
        fits = [room * len(t) / n for t, n in zip(texts, counts, strict=True) if t]
    return max(1, int(np.quantile(fits, 1 - FITTING_SHARE))) if fits else room
