"""What a run is about to read, before anything runs: prompts, labels, lengths, repeated texts.

Needs a tokenizer and no weights. The record is plain data, and loading this module loads no torch:
pages draw it, the command line prints it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chipviz.config import RunConfig
from chipviz.data.task import PictureLook, TaskKind, notice_in_words, say_columns
from chipviz.errors import BackboneError, Notice, TaskError
from chipviz.keys import Pooling, Split
from chipviz.progress import Progress, ProgressFn, silent

if TYPE_CHECKING:
    from chipviz.backbones.model_folder import ModelFolder
    from chipviz.data.prompt import Prompt
    from chipviz.data.task import Task

N_EXAMPLES = 3
N_PICTURES = 12
N_MEASURED = 1_000
"""Texts of each split whose tokens are counted."""
N_BINS = 20
SHOWN_CHARS = 200
"""Maximum characters shown of what the length limit removes from a text."""


@dataclass(frozen=True)
class SplitPreview:
    """The rows of one split."""

    n: int
    made: bool
    """Whether it was taken from the training rows, since the source has none."""
    label_counts: dict[str, int]
    """Every class, in order."""
    n_truncated: int
    """Rows that the length limit shortens."""


@dataclass(frozen=True)
class LeftOut:
    """The end of a text that the length limit removes."""

    begins: str
    """Its first characters."""
    n_chars: int
    """Characters of the whole end."""


@dataclass(frozen=True)
class PromptPreview:
    """One training text as the model will read it."""

    prompt: str
    tokens: tuple[str, ...]
    probed: dict[Pooling, tuple[int, int]]
    """The tokens a chip reads: from the first number up to, not including, the second."""
    label: str
    left_out: tuple[LeftOut, ...] = ()
    """What the length limit removes of its texts."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of whole prompts, template included and over-long texts cut."""

    edges: tuple[int, ...]
    """Edges of the bins. Bin i counts lengths from edges[i] up to, not including, edges[i + 1]."""
    counts: tuple[int, ...]
    n_measured: int
    """Prompts counted: the first of every split, which are a fair sample."""
    median: int
    longest: int
    n_over: int
    """Prompts that are longer than the limit in tokens, which is kept in characters."""


@dataclass(frozen=True)
class BackbonePreview:
    """A backbone from its configuration alone. See `chipviz.backbones.memory`."""

    name: str
    n_layers: int
    hidden_size: int
    n_parameters: int
    """Parameters of the published model, LM head included."""
    file_bytes: int
    """Bytes of the weight files."""
    memory_bytes: int
    """Bytes that a run needs on the device at once, about."""
    free_bytes: int
    """Bytes of memory that are free there."""
    feature_bytes: int
    """Bytes of features on disk."""
    dtype: str
    device: str
    licence: str | None
    refused: str | None = None
    """Why a run would be refused, if it would."""
    hint: str = ""
    fields: tuple[str, ...] = ()
    """Settings of `RunConfig` that the hint is about."""


@dataclass(frozen=True)
class Preview:
    """A task and its prompt, as a run with the same settings will take them."""

    name: str
    revision: str | None
    """The commit, of a data set from the Hub."""
    columns: dict[str, str]
    """Role (text, text_pair, choices, label) -> column."""
    guessed: tuple[str, ...]
    """Roles whose column nobody named."""
    template: str
    max_length: int
    max_chars: int
    splits: dict[Split, SplitPreview]
    shared: dict[str, int]
    """How many different texts two splits share, by "train, test" and the like."""
    examples: tuple[PromptPreview, ...]
    lengths: Lengths | None
    backbone: BackbonePreview
    warnings: tuple[Notice, ...]
    """What must be known although nothing stops a run."""
    kind: TaskKind = "text"
    pictures: tuple[PictureLook, ...] = ()
    """Training pictures, one of each class first. Pictures have no `examples` and no `lengths`."""

    @property
    def rows(self) -> str:
        """What its rows are called."""
        return "texts" if self.kind == "text" else "pictures"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ColumnsPreview:
    """The columns of a table, and what each would be taken for."""

    columns: list[str]
    """All names, in order."""
    roles: dict[str, str]
    """The guess: role (text, text_pair, choices, label) -> column. Empty where there is none."""
    missing: str = ""
    """Why there is no guess."""
    pictures: tuple[str, ...] = ()
    """Columns that hold pictures."""


def look_at_columns(data: str, label: str | None, *, home: Path) -> ColumnsPreview:
    """Read a table and guess its columns.

    Args:
        data: As `RunConfig.data`.
        label: The label column, where the user named it.
        home: The folder that holds `data/`.

    Raises:
        ChipvizError: If the table cannot be had or read.
    """
    from chipviz.data.from_table import guess_columns
    from chipviz.data.tables import read_table

    table = read_table(data, home)
    frame = table.frames["all" if "all" in table.frames else "train"]
    names, pictures = list(frame.columns), table.pictures
    try:
        found = guess_columns(table, RunConfig(backbone="any", data=data, label=label))
    except TaskError as error:
        return ColumnsPreview(names, {}, error.message, pictures)
    return ColumnsPreview(names, found.roles, pictures=pictures)


def look_at_source(backbone: str, dtype: str | None, *, home: Path) -> BackbonePreview:
    """Find a backbone and look at it before anything else of a run is known.

    Args:
        backbone: As `RunConfig.backbone`.
        dtype: As `RunConfig.dtype`.
        home: The folder that holds `backbones/`.

    Raises:
        ChipvizError: If the backbone cannot be had, or is none.
    """
    from chipviz.backbones.find import find_model

    config = RunConfig.checked(backbone=backbone, data="any", dtype=dtype)
    return look_at_backbone(config, find_model(backbone, home), home=home)


def inspect(config: RunConfig, *, home: Path, progress: ProgressFn = silent) -> Preview:
    """Look at what a run with these settings would read.

    Raises:
        ChipvizError: As the run would, for its data, its template or its tokenizer.
    """
    from chipviz.backbones.find import find_model
    from chipviz.backbones.vision import refuse_wordless
    from chipviz.data.from_table import load_task
    from chipviz.data.prompt import bake, load_tokenizer

    task = load_task(config, home, progress)
    folder = find_model(config.backbone, home, progress)
    n_texts = sum(map(len, task.splits.values()))
    if task.kind == "image":
        return _of_pictures(task, folder, config, home)
    progress(Progress("loading", "counting tokens"))
    refuse_wordless(folder)
    tokenizer = load_tokenizer(folder.path, folder.n_positions)
    # A mask token belongs to a model that reads both ways; the run itself asks the model.
    config = config.resolved(causal=tokenizer.mask_token is None)
    prompt = bake(tokenizer, task.template, config.max_length, task.splits["train"])
    facts = look_at_backbone(config, folder, home=home, n_texts=n_texts)
    return preview(task, prompt, config.poolings, facts)


def _of_pictures(task: "Task", folder: "ModelFolder", config: RunConfig, home: Path) -> Preview:
    """What a run would read, of pictures."""
    from chipviz.backbones.vision import look_at_pictures

    pictures = look_at_pictures(
        task.splits["train"], task.label_names, folder, home, N_PICTURES, config.blocks
    )
    n_texts = sum(map(len, task.splits.values()))
    facts = look_at_backbone(config, folder, home=home, n_texts=n_texts, pictures=True)
    return Preview(
        name=task.name,
        revision=task.revision,
        columns=task.columns.roles if task.columns else {},
        guessed=task.columns.guessed if task.columns else (),
        template="",
        max_length=0,
        max_chars=0,
        splits=_splits(task),
        shared=_shared(task),
        examples=(),
        lengths=None,
        backbone=facts,
        warnings=task.notices,
        kind="image",
        pictures=pictures,
    )


def look_at_backbone(
    config: RunConfig,
    folder: "ModelFolder",
    *,
    home: Path,
    n_texts: int = 0,
    pictures: bool | None = None,
) -> BackbonePreview:
    """What loading the backbone would take. A refusal is a fact like others.

    Args:
        config: The run's settings.
        folder: The backbone.
        home: Where the fast dtype is remembered.
        n_texts: Texts or pictures that will be read.
        pictures: Whether these are pictures. None asks the model.
    """
    from chipviz.backbones.memory import look_ahead

    ahead = look_ahead(folder, config, home=home, n_texts=n_texts, pictures=pictures)
    facts = BackbonePreview(
        name=ahead.name,
        n_layers=ahead.n_layers,
        hidden_size=ahead.hidden_size,
        n_parameters=ahead.n_parameters,
        file_bytes=ahead.file_bytes,
        memory_bytes=ahead.memory_bytes,
        free_bytes=ahead.free_bytes,
        feature_bytes=ahead.feature_bytes,
        dtype=ahead.dtype,
        device=ahead.device,
        licence=ahead.licence,
    )
    try:
        if config.device_map is None:
            ahead.refuse()
    except BackboneError as error:
        return replace(facts, refused=error.message, hint=error.hint, fields=error.fields)
    return facts


def preview(
    task: "Task", prompt: "Prompt", poolings: Sequence[Pooling], backbone: BackbonePreview
) -> Preview:
    """Describe a task and its prompt.

    Args:
        task: As it will be run, limits and all.
        prompt: Baked for it.
        poolings: Whose tokens to mark.
        backbone: What is known of the backbone.
    """
    from chipviz.data.prompt import cut_notices, n_cut

    cut: dict[Split, int] = {s: n_cut(prompt, rows) for s, rows in task.splits.items()}
    n_texts = sum(map(len, task.splits.values()))
    return Preview(
        name=task.name,
        revision=task.revision,
        columns=task.columns.roles if task.columns else {},
        guessed=task.columns.guessed if task.columns else (),
        template=prompt.template,
        max_length=prompt.max_length,
        max_chars=prompt.max_chars,
        splits=_splits(task, cut),
        shared=_shared(task),
        examples=_examples(task, prompt, poolings),
        lengths=_lengths(task, prompt),
        backbone=backbone,
        warnings=(*task.notices, *cut_notices(prompt.max_length, sum(cut.values()), n_texts)),
    )


def _splits(task: "Task", cut: Mapping[Split, int] | None = None) -> dict[Split, SplitPreview]:
    return {
        split: SplitPreview(
            len(rows),
            split in task.made,
            _counts(rows.labels.tolist(), task.label_names),
            cut[split] if cut else 0,
        )
        for split, rows in task.splits.items()
    }


def _shared(task: "Task") -> dict[str, int]:
    from chipviz.data.task import text_keys

    keys = {split: set(text_keys(rows)) for split, rows in task.splits.items()}
    return {f"{a}, {b}": len(keys[a] & keys[b]) for a, b in combinations(keys, 2)}


def in_words(found: Preview) -> list[str]:
    """The preview as lines for a terminal. Texts are quoted, control characters and all."""
    lines = [f"{found.name}: {say_columns(found.columns, found.guessed)}"]
    for split, rows in found.splits.items():
        counts = [f"{name[:40]!r} {n}" for name, n in rows.label_counts.items()]
        lines.append(
            f"{split:>10}: {rows.n} {found.rows}{' (made here)' * rows.made}"
            f"{f', {rows.n_truncated} cut by the limit' if found.kind == 'text' else ''}; "
            f"{', '.join(counts[:20])}{', ...' * (len(counts) > 20)}"
        )
    lines.append(_backbone_in_words(found.backbone))
    shared = "; ".join(f"{two}: {n}" for two, n in found.shared.items())
    lines.append(f"{found.rows.capitalize()} shared: {shared}")
    for picture in found.pictures:
        left, top, right, bottom = picture.seen
        lines.append(
            f"{picture.label[:40]!r}: {picture.width} x {picture.height} pixels, "
            f"{100 * (right - left) * (bottom - top):.0f} % of them inside the crop"
        )
    if found.lengths is not None:
        lines += _lengths_in_words(found.lengths, found.max_length)
    for example in found.examples:
        lines.append(f"{example.label[:40]!r}: {example.prompt!r}")
        for pooling, (start, stop) in example.probed.items():
            one = stop - start == 1
            read = repr(example.tokens[start]) if one else f"all {stop - start} tokens"
            lines.append(f"{pooling:>10} reads {read}")
        for end in example.left_out:
            lines.append(f"{'left out':>10}: {end.begins[:60]!r}, {end.n_chars:,} characters")
    lines += [notice_in_words(notice) for notice in found.warnings]
    return lines


def _lengths_in_words(lengths: Lengths, limit: int) -> list[str]:
    lines = [
        f"Tokens of {lengths.n_measured} prompts: median {lengths.median}, longest "
        f"{lengths.longest}, {lengths.n_over} over {limit}"
    ]
    for start, count in zip(lengths.edges, lengths.counts, strict=False):
        lines.append(f"{start:>10} {'#' * -(-40 * count // max(lengths.counts))} {count}")
    return lines


def _backbone_in_words(facts: BackbonePreview) -> str:
    return (
        f"{facts.name}: {facts.n_layers} layers of width {facts.hidden_size}, "
        f"{facts.n_parameters:,} parameters, licence {facts.licence or 'not said'}; needs about "
        f"{facts.memory_bytes / 1e9:.1f} of {facts.free_bytes / 1e9:.1f} GB free on {facts.device} "
        f"in {facts.dtype}, and {facts.feature_bytes / 1e9:.1f} GB on disk"
    )


def _counts(labels: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    counted = Counter(labels)
    return {name: counted[label] for label, name in enumerate(names)}


def _examples(
    task: "Task", prompt: "Prompt", poolings: Sequence[Pooling]
) -> tuple[PromptPreview, ...]:
    from chipviz.data.prompt import left_out

    train = task.splits["train"]
    rows = train.take(range(min(N_EXAMPLES, len(train))))
    decode = prompt.tokenizer.decode
    read = prompt.encode(rows.texts, rows.pairs)
    pairs = rows.pairs or [""] * len(rows)
    return tuple(
        PromptPreview(
            prompt=decode(ids, clean_up_tokenization_spaces=False),
            tokens=tuple(decode([token], clean_up_tokenization_spaces=False) for token in ids),
            probed={pooling: _probed(pooling, len(ids)) for pooling in poolings},
            label=task.label_names[label],
            left_out=tuple(
                LeftOut(end[:SHOWN_CHARS], len(end)) for end in left_out(prompt, text, pair)
            ),
        )
        for ids, label, text, pair in zip(
            read, rows.labels.tolist(), rows.texts, pairs, strict=True
        )
    )


def _probed(pooling: Pooling, n_tokens: int) -> tuple[int, int]:
    if pooling == "last":
        return n_tokens - 1, n_tokens
    return (0, 1) if pooling == "first" else (0, n_tokens)


def _lengths(task: "Task", prompt: "Prompt") -> Lengths:
    parts = [rows.take(range(min(N_MEASURED, len(rows)))) for rows in task.splits.values()]
    found = np.array([len(ids) for p in parts for ids in prompt.encode(p.texts, p.pairs)])
    step = max(1, -(-(int(found.max()) + 1) // N_BINS))
    edges = np.arange(0, int(found.max()) + 1 + step, step)
    counts, _ = np.histogram(found, edges)
    return Lengths(
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        n_measured=len(found),
        median=int(np.median(found)),
        longest=int(found.max()),
        n_over=int((found > prompt.max_length).sum()),
    )
