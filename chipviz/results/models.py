"""Backbones made here: what was asked for, what came of it, and where it lies. Without torch."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chipviz.config import Preset, RunConfig
from chipviz.errors import ConfigError, JobError
from chipviz.files import MAX_SETTINGS, bytes_below, read_small, write_atomic
from chipviz.sources import BACKBONE_WHEELS

Method = Literal[
    "lora",
    "top",
    "bottom",
    "middle",
    "alternate",
    "influence",
    "angular",
    "greedy",
    "laco",
    "laco-released",
    "blockpruner",
    "slicegpt",
    "llm-pruner",
]
"""*lora* tunes on a task. Of the others the last three take out attention and feed-forward units,
dimensions of the residual stream, or heads and channels: stock code cannot load what they leave.
The rest takes out whole blocks."""
SURGICAL: tuple[Method, ...] = ("blockpruner", "slicegpt", "llm-pruner")
PRUNING: tuple[Method, ...] = get_args(Method)[1:]
Heal = Literal["replaceme", "lora", "pretrain"]
"""What follows the pruning: a linear map in place of the blocks, LoRA on a task or on text, or
pretraining that goes on."""
LINEAGE = "lineage.json"
"""What a made model has beside a model folder's files."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Asked(BaseModel):
    """What a user asks for: one setting a line, described once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Build it from a user's values.

        Raises:
            ConfigError: Naming what does not fit.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0]) if first["loc"] else ""
            message = first["msg"].removeprefix("Value error, ")
            if field == "method":
                message = f"methods are {', '.join(get_args(Method))}"
            raise ConfigError(
                f"{f'{field}: ' if field else ''}{message[0].upper()}{message[1:]}.",
                f"Change {field or 'the options'} and start again.",
                *([field] if field else []),
            ) from None


class Fit(_Asked):
    """How gradient descent is done, where a job does any."""

    preset: Preset = Field(default="sound", title="Recipe")
    """sound puts an adapter on every matrix and stops on validation; published is the paper's:
    queries and values, one epoch."""
    epochs: int = Field(default=3, ge=1, le=100, title="Epochs at most")
    """Maximum epochs of tuning."""
    tokens: int = Field(default=1_000_000, ge=1, title="Tokens of text")
    """Tokens that healing on text reads. Papers read 2e10; a million repairs, and no more."""
    lr: float | Literal["paper", "code"] | None = Field(default=None, title="Learning rate")
    """Learning rate. If not given, what suits the kind of fit. paper is 1e-5 with a weight decay of
    0.01, code what the paper's public code really used, 5e-5 without."""
    optimizer: Literal["adamw", "lion"] = Field(default="adamw", title="Optimizer")
    """Optimizer of pretraining."""
    batch: int = Field(default=16, ge=1, le=4096, title="Texts of a step")
    """Texts, or rows of text, of a step."""


class ModelSpec(_Asked):
    """One made model: a backbone, what is done to it, and the name that it gets."""

    name: str = Field(title="Name")
    """Name of the new backbone."""
    backbone: str = Field(min_length=1, max_length=4096, title="Backbone")
    """Embedded name, made model, Hub id, folder or GGUF file."""
    method: Method = Field(title="Method")
    """lora, or what takes blocks out."""
    layers: int | None = Field(default=None, title="Blocks to take out")
    """Number of blocks to take out."""
    ratio: float | None = Field(default=None, title="Ratio of parameters")
    """Share of the published parameters to take out, in (0, 1)."""
    calibrate: str | None = Field(default=None, max_length=4096, title="Calibration text")
    """Data whose text column calibrates, heals and measures: file, folder, embedded name or Hub id.
    bbc-news if not given."""
    length: int = Field(default=256, ge=8, le=8192, title="Tokens of a row of text")
    """Tokens of a row of that text. Perplexities of different lengths are not compared."""
    heal: Heal | None = Field(default=None, title="Healing")
    """What follows the pruning."""
    task: RunConfig | None = Field(default=None, title="Task")
    """What lora learns. None for a healing on text."""
    fit: Fit = Fit()
    """How it is fitted."""
    seed: int = Field(default=0, ge=0, lt=2**31, title="Seed")
    """Seed of orders and of first weights."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        prunes = self.method != "lora"
        if not _NAME.fullmatch(self.name):
            raise ValueError("a name has 1 to 64 letters, digits, dots, dashes and underscores")
        if self.name in BACKBONE_WHEELS:
            raise ValueError(f"{self.name} is an embedded backbone; give another name")
        if prunes and (self.layers is None) == (self.ratio is None):
            raise ValueError("give either a number of layers or a ratio of parameters to take out")
        if not prunes and (self.layers, self.ratio, self.heal) != (None, None, None):
            raise ValueError("tuning takes nothing out and heals nothing")
        if self.heal == "replaceme" and self.method in SURGICAL:
            raise ValueError(
                f"ReplaceMe stands for whole blocks, and {self.method} takes out parts"
            )
        if self.layers is not None and self.layers < 1:
            raise ValueError("take at least one layer out; nothing would change")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError("a ratio lies between 0 and 1, both excluded")
        if self.method == "lora" and self.task is None:
            raise ValueError("tuning needs data of a task")
        if self.task is not None and "lora" not in (self.method, self.heal):
            raise ValueError("only LoRA learns a task")
        return self

    @property
    def in_words(self) -> str:
        """What is done, in a few words."""
        done = "LoRA" if self.method == "lora" else self.method
        much = f" {self.layers} layers" if self.layers else f" {100 * (self.ratio or 0):.0f} %"
        taken = much if self.method != "lora" else ""
        return f"{done}{taken}{f', healed by {self.heal}' if self.heal else ''}"


@dataclass(frozen=True)
class Mark:
    """One number of a fit, for a live chart."""

    step: int
    n_tokens: int
    """Tokens that the loss was on, so far."""
    name: Literal["loss", "validation"]
    value: float
    """Mean loss of a token, in nats."""


class Ancestor(BaseModel):
    """The model that a line of made models began with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n_layers: int
    n_parameters: int


class Lineage(BaseModel):
    """Where a made model comes from, as the reports of its runs say it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: str
    method: str
    root: Ancestor


class ModelRecord(BaseModel):
    """A made model, as it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parent: str
    """What it was made of, as the user named it."""
    root: Ancestor
    method: str
    """What was done, such as `angular+replaceme`."""
    spec: ModelSpec
    removed: list[int]
    """Blocks of the parent that are gone."""
    n_layers: int
    n_parameters: int
    perplexity_before: float | None
    """Perplexity of the parent on the held-out text. None of an encoder."""
    perplexity_pruned: float | None
    """Perplexity before the healing."""
    perplexity_after: float | None
    n_perplexity: int
    """Tokens that perplexities are of."""
    found: dict[str, Any] = {}
    """What the method measured: influence by block, the threshold, losses."""
    created: float
    seconds: float

    @property
    def lineage(self) -> Lineage:
        """Where it comes from."""
        return Lineage(parent=self.parent, method=self.method, root=self.root)

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """What `models --json` prints of it."""
        return {
            "name": self.name,
            "folder": str(folder),
            "parent": self.parent,
            "method": self.method,
            "settings": self.spec.model_dump(mode="json"),
            "seed": self.spec.seed,
            "n_layers": self.n_layers,
            "n_parameters": self.n_parameters,
            "root": self.root.model_dump(),
            "removed": self.removed,
            "bytes": bytes_below(folder),
            "perplexity_before": self.perplexity_before,
            "perplexity_pruned": self.perplexity_pruned,
            "perplexity_after": self.perplexity_after,
            "created": self.created,
        }


def made_folder(home: Path, name: str) -> Path | None:
    """The folder of a made model of this name. None where the name is none, or nothing is there."""
    folder = home / "models" / name
    return folder if _NAME.fullmatch(name) and (folder / LINEAGE).is_file() else None


def place_of(home: Path, name: str) -> Path:
    """Where a made model of this name belongs.

    Raises:
        ConfigError: If something is there.
    """
    folder = home / "models" / name
    if folder.exists():
        raise ConfigError(
            f"There is a model {name} already.",
            f"Give another name, or delete it: `python -m chipviz models --delete {name}`.",
            "name",
        )
    return folder


def read_record(folder: Path) -> ModelRecord | None:
    """How a model folder was made. None where nobody made it here, or the record is damaged."""
    try:
        return ModelRecord.model_validate_json(read_small(folder / LINEAGE, MAX_SETTINGS))
    except (OSError, ValueError):
        return None


def write_record(folder: Path, record: ModelRecord) -> None:
    """Keep how a model was made, beside its weights."""
    write_atomic(folder / LINEAGE, record.model_dump_json(indent=1))


def made_models(home: Path) -> list[tuple[Path, ModelRecord]]:
    """All made models, newest first."""
    folders = sorted((home / "models").glob("*")) if (home / "models").is_dir() else []
    found = [(folder, read_record(folder)) for folder in folders if _NAME.fullmatch(folder.name)]
    known = [(folder, record) for folder, record in found if record is not None]
    return sorted(known, key=lambda pair: pair[1].created, reverse=True)


def delete_model(home: Path, name: str) -> int:
    """Remove a made model.

    Returns:
        Bytes that are free again.

    Raises:
        JobError: If there is none of this name, or it cannot be removed.
    """
    folder = made_folder(home, name)
    if folder is None:
        raise JobError(
            f"There is no model {name[:80]!r}.", "`python -m chipviz models` lists them."
        )
    n_bytes = bytes_below(folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise JobError(f"{folder} cannot be removed: {error}.", "Remove it by hand.") from None
    return n_bytes
