"""What a run is asked to do: checked once at the door, then trusted; to and from JSON."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from chipviz.errors import ConfigError

Pooling = Literal["last", "mean"]
"""Which hidden states of a text make its features: the last token's, or the mean over all."""
ChipKind = Literal["linear"]
Split = Literal["train", "validation", "test"]
Preset = Literal["sound"]
Rule = Literal["validate", "within", "fixed", "manual"]

DEFAULT_TOLERANCE = 0.01
"""Accuracy that rule *within* gives up for depth, in [0, 1]."""

EXAMPLE: dict[str, object] = {
    "backbone": "smollm2-135m",
    "data": "bbc-news",
    "template": "News: {text}\nTopic of this article:",
    "max_length": 64,
    "max_train": 800,
    "max_validation": 200,
    "max_test": 400,
}
"""The embedded example: runs from the package registry alone, in about a minute."""


class RunConfig(BaseModel):
    """One run: a backbone, a data set, a prompt, and what to train on every layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = Field(min_length=1, max_length=4096)
    """Embedded name, Hub id, or folder of a saved model."""
    data: str = Field(min_length=1, max_length=4096)
    """Embedded name, Hub id, file, or folder of `train/validation/test.parquet`."""
    template: str | None = None
    """Prompt around `{text}` (and `{text_pair}`); None is the bare text."""
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    """Column names; None lets the task guess and say what it guessed."""
    poolings: tuple[Pooling, ...] = ("last", "mean")
    chips: tuple[ChipKind, ...] = ("linear",)
    max_train: Annotated[int, Field(ge=2)] | None = None
    max_validation: Annotated[int, Field(ge=2)] | None = None
    max_test: Annotated[int, Field(ge=2)] | None = None
    """Texts taken per split, stratified and seeded; None takes all."""
    max_length: Annotated[int, Field(ge=1)] = 256
    """Tokens a prompt may have, template included."""
    preset: Preset = "sound"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @field_validator("poolings", "chips")
    @classmethod
    def _some_and_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not values:
            raise ValueError("name at least one")
        return tuple(dict.fromkeys(values))

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Build a config from a user's values.

        Raises:
            ConfigError: Naming the first field that does not fit, what it got and what it takes.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "config"
            raise ConfigError(
                f"{field}: {first['msg']} (got {str(first['input'])[:80]!r}).",
                f"Change {field} and start again; see `python -m chipviz train --help`.",
            ) from None


class CutSpec(BaseModel):
    """Which cut of a finished run to build as a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cut_layer: Annotated[int, Field(ge=0)]
    pooling: Pooling
    chip: ChipKind = "linear"
    rule: Rule = "manual"


def home_dir(override: str | Path | None = None) -> Path:
    """The folder that holds runs, features, backbones and data (`CHIPVIZ_HOME`)."""
    return Path(override or os.environ.get("CHIPVIZ_HOME") or "~/.chipviz").expanduser().absolute()
