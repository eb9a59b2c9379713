"""What a run is asked to do: checked once at the door, then trusted; to and from JSON."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from chipviz.errors import ConfigError
from chipviz.keys import RAW, ChipKey, ChipKind, ChipRecord, Cut, Pooling, Recipe, Vector, fields_of

Preset = Recipe
"""*sound* trains chips of this project's recipe; *published* trains the paper's beside them."""
Rule = Literal["validate", "within", "non-inferior", "elbow", "budget", "fixed", "oracle", "manual"]
ClassWeight = Literal["none", "balanced"]

DEFAULT_TOLERANCE = 0.01
"""Accuracy that rule *within* gives up for depth, in [0, 1]."""
DEFAULT_MARGIN = 0.02
"""Accuracy that rule *non-inferior* must rule out to lose, in [0, 1]."""
PUBLISHED_MAX_TRAIN = 20_000
"""Rows the published recipe trains on, at most. Source: the public code of arXiv:2410.06541."""

EXAMPLE: dict[str, object] = {
    "backbone": "smollm2-135m",
    "data": "bbc-news",
    "template": "News: {text}\nTopic of this article:",
    "max_length": 64,
    "max_train": 800,
    "max_validation": 200,
    "max_test": 400,
}
"""The embedded example: runs from the package registry alone, in about two minutes."""


class RunConfig(BaseModel):
    """One run: a backbone, a data set, a prompt, and what to train on every layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = Field(min_length=1, max_length=4096)
    """Embedded name, Hub id (also `id@revision`), folder of a saved model or LoRA adapter, or GGUF
    file."""
    data: str = Field(min_length=1, max_length=4096)
    """Embedded name, file, folder of `train/validation/test` files, or Hub id, with a subset and a
    revision where wanted: `owner/name:subset@revision`."""
    template: str | None = None
    """Prompt around `{text}` (and `{text_pair}`); None is the bare text, or the built-in prompt of
    questions about a passage and of multiple choice."""
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    choices: str | None = None
    """Column names; None lets the task guess and say what it guessed. `choices` holds the options
    of multiple choice, whose first text is the passage, or the question where there is none."""
    poolings: tuple[Pooling, ...] = ()
    """None named: those that suit the backbone, see `resolved`."""
    chips: tuple[ChipKind, ...] = ("linear",)
    max_train: Annotated[int, Field(ge=2)] | None = None
    max_validation: Annotated[int, Field(ge=2)] | None = None
    max_test: Annotated[int, Field(ge=2)] | None = None
    """Texts taken per split, stratified and seeded; None takes all."""
    max_length: Annotated[int, Field(ge=1)] = 256
    """Tokens a prompt may have, template included."""
    preset: Preset = "sound"
    class_weight: ClassWeight = "none"
    """*balanced* gives every class the same say in training, however many texts it has."""
    repeats: Annotated[int, Field(ge=1, le=50)] = 1
    """Fits of each chip: beyond the first each sees a bootstrap sample of the training texts (and
    another seed), and their spread is drawn as a band."""
    device_map: Literal["auto"] | None = None
    """*auto* spreads a model too large for one device over all devices, memory and disk."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the forward pass computes in; None takes the fast one of the device."""
    blocks: str | None = Field(default=None, max_length=200)
    """Where the backbone's blocks are, such as `transformer.h`; None finds them."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @field_validator("poolings", "chips")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("chips")
    @classmethod
    def _some(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not values:
            raise ValueError("name at least one")
        return values

    @field_validator("poolings", mode="before")
    @classmethod
    def _choosable(cls, values: Any) -> Any:
        if isinstance(values, (list, tuple)) and not set(values) <= {
            "last",
            "mean",
            "first",
            "max",
        }:
            raise ValueError("take last, mean, first or max; raw states belong to preset published")
        return values

    def resolved(self, *, causal: bool) -> Self:
        """With the poolings that suit a backbone, where the user named none.

        The last token of a causal model has read the whole text; where tokens read both ways, the
        first is the one that training prepared for it.
        """
        if self.poolings:
            return self
        return self.model_copy(update={"poolings": ("last" if causal else "first", "mean")})

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """Every vector to keep per text and layer: the poolings, and what the preset adds."""
        sound = (Vector("block", pooling) for pooling in self.poolings)
        return (RAW, *sound) if self.preset == "published" else tuple(sound)

    @property
    def chip_keys(self) -> tuple[ChipKey, ...]:
        """Every curve that a run with these settings has."""
        sound = (ChipKey.sound(pooling, kind) for pooling in self.poolings for kind in self.chips)
        published = (ChipKey.published(kind) for kind in get_args(ChipKind))
        return (*published, *sound) if self.preset == "published" else tuple(sound)

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
            got = first["input"]
            got = ", ".join(map(str, got)) if isinstance(got, (list, tuple)) else str(got)
            field = ".".join(str(part) for part in first["loc"]) or "config"
            raise ConfigError(
                f"{field}: {first['msg'].removeprefix('Value error, ')} (got {got[:80]!r}).",
                f"Change {field} and start again; see `python -m chipviz train --help`.",
            ) from None


class CutSpec(ChipRecord):
    """Which cut of a finished run to build as a bundle."""

    cut_layer: Annotated[int, Field(ge=0)]
    chip: ChipKind = "linear"
    rule: Rule = "manual"

    @classmethod
    def at(cls, cut: Cut, rule: Rule = "manual") -> Self:
        """The build of a cut that a rule chose."""
        return cls(cut_layer=cut.layer, **fields_of(cut.chip), rule=rule)

    @property
    def cut(self) -> Cut:
        """Where to cut, and what reads there."""
        return Cut(self.cut_layer, self.key)


def home_dir(override: str | Path | None = None) -> Path:
    """The folder that holds runs, features, backbones and data (`CHIPVIZ_HOME`)."""
    return Path(override or os.environ.get("CHIPVIZ_HOME") or "~/.chipviz").expanduser().absolute()
