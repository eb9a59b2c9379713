"""What a run is asked to do: checked once at the door, then trusted, and kept as JSON."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from chipviz.errors import ConfigError
from chipviz.keys import (
    ALL_SITES,
    IMAGE_POOLINGS,
    RAW,
    STC,
    STC_PUBLISHED,
    TEXT_POOLINGS,
    ChipKey,
    ChipKind,
    ChipRecord,
    Cut,
    Pooling,
    Vector,
    fields_of,
)

Preset = Literal["sound", "published"]
"""*sound* trains chips of this project's recipe. *published* trains the paper's beside them."""
Rule = Literal["validate", "within", "non-inferior", "elbow", "budget", "fixed", "oracle", "manual"]
RECOMMENDED: Rule = "within"
"""Rule whose cut is shown first, listed and asked where nobody names another."""
StcSite = Literal["block", "gate", "ffn_in", "ffn_out"]
Importance = Literal["squares", "sizes"]
LayerWeights = Literal["none", "validation"]
ClassWeight = Literal["none", "balanced"]
StoredDtype = Literal["float32", "bfloat16", "float16"]
Contradictions = Literal["keep", "drop", "refuse"]

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


_FIT: dict[str, Any] = {"reads": False}
"""Mark of a setting that changes how chips are fitted, not what a run reads."""

DEFAULT_FOLDS = 5
FEW_VALIDATION = 1_000
"""Validation texts from which on their own split says enough."""


@contextmanager
def as_refusal() -> Iterator[None]:
    """Say what does not fit of a user's values.

    Raises:
        ConfigError: Naming the first field that does not fit, what it got and what it takes.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        got = first["input"]
        got = ", ".join(map(str, got)) if isinstance(got, (list, tuple)) else str(got)
        field = str(first["loc"][0]) if first["loc"] else "config"
        raise ConfigError(
            f"{field}: {first['msg'].removeprefix('Value error, ')} (got {got[:80]!r}).",
            f"Change {field} and start again.",
            field,
        ) from None


class RunConfig(BaseModel):
    """One run: a backbone, a data set, a prompt, and what to train on every layer.

    Each setting is described here once. The docstring below it is its help on the command line and
    on the page, its title is its label there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    backbone: str = Field(min_length=1, max_length=4096, title="Backbone")
    """Embedded name, Hub id (also id@revision), folder of a saved model or of a LoRA adapter, or
    GGUF file."""
    data: str = Field(min_length=1, max_length=4096, title="Data")
    """Embedded name, file, folder of files named train, validation and test, folder or zip of class
    folders with pictures, or Hub id, with a subset and a revision where wanted:
    owner/name:subset@revision."""
    template: str | None = Field(default=None, title="Template")
    """Prompt around {text}, and {text_pair} where there are two texts. What follows the text
    decides what the last token knows. Without one the text is read alone, and a question with
    options is asked as such."""
    text: str | None = Field(default=None, title="Text column")
    """Column of the texts. Guessed if not named."""
    text_pair: str | None = Field(default=None, title="Second text column")
    """Column of the second texts, where a task has two. Guessed if not named."""
    label: str | None = Field(default=None, title="Label column")
    """Column of the labels. Guessed if not named."""
    choices: str | None = Field(default=None, title="Choices column")
    """Column of the options of multiple choice. Guessed if not named."""
    split: str | None = Field(default=None, title="Split column")
    """Column that says of each row whether it is of train, validation or test, in a table without
    splits of its own."""
    group: str | None = Field(default=None, title="Group column")
    """Column that says what a row belongs to, such as its document or its author. No group stands
    in two splits that are made here, nor in two folds."""
    poolings: tuple[Pooling, ...] = Field(default=(), title="Poolings")
    """States that chips read. Of a text: last (its last token), mean (over all tokens), first (its
    first token), max (largest value of each dimension). Of a picture: first (the class token), mean
    and max (over its patches), first+mean (both). None named: mean, and the last token of a decoder
    or the first of an encoder; of pictures also both."""
    chips: tuple[ChipKind, ...] = Field(default=("linear",), title="Chips", json_schema_extra=_FIT)
    """Kinds of chip: linear fits in seconds and becomes part of a stock model, mlp may find what is
    not linear."""
    stc: bool = Field(default=False, title="Sparsify-then-Classify")
    """Whether the neurons that matter of every layer are joined as well: sparse chips on every
    site, and one classifier for every depth that reads the neurons of all layers up to it."""
    sites: tuple[StcSite, ...] = Field(default=("block", "ffn_in"), title="Sites of neurons")
    """Where Sparsify-then-Classify takes neurons: block (output of a layer), gate (activation of
    the feed-forward part), ffn_in (what its down projection reads), ffn_out (what it gives)."""
    importance: Importance = Field(
        default="squares", title="Importance of a neuron", json_schema_extra=_FIT
    )
    """What a neuron of Sparsify-then-Classify counts, summed over the classes: squares of its
    weights, as published, or their sizes, as SIREN does."""
    layer_weights: LayerWeights = Field(
        default="none", title="Weights of layers", json_schema_extra=_FIT
    )
    """Say of a layer's neurons in the joined classifier: none gives all layers the same, validation
    more to those whose own sparse chip does better on validation, as SIREN does."""
    contradictions: Contradictions = Field(default="keep", title="Texts with several labels")
    """Fate of training texts that stand there with several labels: keep all their rows, drop them
    all, or refuse the data."""
    max_train: int | None = Field(default=None, ge=2, title="Training texts at most")
    """Maximum training texts, drawn by class. All if not given."""
    max_validation: int | None = Field(default=None, ge=2, title="Validation texts at most")
    """Maximum validation texts, drawn by class. All if not given."""
    max_test: int | None = Field(default=None, ge=2, title="Test texts at most")
    """Maximum test texts, drawn by class. All if not given."""
    max_length: int = Field(default=256, ge=1, title="Length limit, tokens")
    """Maximum tokens of a prompt, template included."""
    preset: Preset = Field(default="sound", title="Recipe")
    """How chips are trained: sound is this project's way, published adds the paper's own training
    of linear and MLP chips on raw states of the last token (of a vision encoder: the class token,
    else the mean), and, with Sparsify-then-Classify and two
    classes, that paper's own probes and grid. These take long, and rules pass over them: each is
    the best of hundreds of tries on validation."""
    class_weight: ClassWeight = Field(default="none", title="Class weight", json_schema_extra=_FIT)
    """Weight of a class in training: none weighs every text the same, balanced every class,
    however many texts it has."""
    refit: bool = Field(default=True, title="Refit on all labelled texts", json_schema_extra=_FIT)
    """Whether linear chips are fitted once more after the choice, each at its chosen strength, on
    training and validation texts together. These are scored on test and shipped. The validation
    curve stays that of the training texts alone."""
    folds: int | None = Field(default=None, ge=1, le=20, title="Folds", json_schema_extra=_FIT)
    """Parts of the labelled texts for cross-validation: a chip fitted on the others says what it
    knows of each, and these answers carry curve, strength and choice. 1 uses the validation split
    alone. If not given, 5 where chips are linear, and validation has fewer than 1,000 texts that
    were taken from the training rows."""
    repeats: int = Field(default=1, ge=1, le=50, title="Fits of each chip", json_schema_extra=_FIT)
    """Fits of each chip. From 2 on, each further fit sees another sample of the training texts, and
    a band shows how far the fits differ."""
    device_map: Literal["auto"] | None = Field(default=None, title="Spread over devices")
    """auto spreads a model too large for one device over all devices, memory and disk."""
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, title="Compute in")
    """Number format of the forward pass. If not given, the one that is fast here. bfloat16 takes
    half the memory of float32."""
    blocks: str | None = Field(default=None, max_length=200, title="Path of the blocks")
    """Place of the backbone's layers, such as transformer.h, for a model in which they are not
    found. Of a model that is asked about pictures the layers of its vision tower, such as
    vision_tower.encoder.layers, read pictures by themselves."""
    seed: int = Field(default=0, ge=0, lt=2**31, title="Seed")
    """Seed of the splits, of the order of texts and of the chips' first weights."""
    _published: Vector = PrivateAttr(default=RAW)
    """What Chip-Tuning's own recipe reads. A vision encoder has no last token that has seen all."""

    @classmethod
    def reads(cls) -> set[str]:
        """Names of the settings that change what a run reads, or the memory it takes."""
        marks = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name for name, mark in marks.items() if mark is not _FIT}

    @field_validator("poolings", "chips", "sites")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @field_validator("chips", "sites")
    @classmethod
    def _some(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not values:
            raise ValueError("name at least one")
        return values

    @field_validator("poolings", mode="before")
    @classmethod
    def _choosable(cls, values: Any) -> Any:
        if isinstance(values, (list, tuple)) and not set(values) <= set(get_args(Pooling)):
            raise ValueError(
                "take last, mean, first, max or first+mean; raw states belong to preset published"
            )
        return values

    def resolved(self, *, causal: bool, class_token: bool | None = None) -> Self:
        """With the poolings that suit a backbone, where the user named none.

        The last token of a causal model has read the whole text. Where tokens read both ways, the
        first is the one that training prepared for it.

        Args:
            causal: Whether a token reads only what stands before it.
            class_token: Whether a vision encoder has a class token. None of a model of texts.

        Raises:
            ConfigError: If the user named a pooling that it does not have.
        """
        known: tuple[Pooling, ...] = TEXT_POOLINGS
        usual: tuple[Pooling, ...] = ("last" if causal else "first", "mean")
        if class_token is not None:
            known = IMAGE_POOLINGS if class_token else ("mean", "max")
            usual = ("first", "mean", "first+mean") if class_token else ("mean",)
        if foreign := [pooling for pooling in self.poolings if pooling not in known]:
            what = {None: "A text", True: "A picture"}.get(class_token, "Without a class token it")
            raise ConfigError(
                f"{what} has no pooling {foreign[0]}.", f"Take {', '.join(known)}.", "poolings"
            )
        resolved = self if self.poolings else self.model_copy(update={"poolings": usual})
        if class_token is None:
            return resolved
        resolved = resolved.model_copy()
        resolved._published = Vector("raw", usual[0])
        return resolved

    def refuse_classes(self, n_classes: int) -> None:
        """Refuse what so many classes do not go with.

        Raises:
            ConfigError: If a recipe is for two classes, and there are more.
        """
        if self.stc and self.preset == "published" and n_classes > 2:
            raise ConfigError(
                f"Sparsify-then-Classify as published is for two classes, and these are "
                f"{n_classes:,}.",
                "Take preset sound, which joins neurons for any number of them.",
                "preset",
                "stc",
            )

    def n_folds(self, *, n_validation: int, made: bool) -> int:
        """Folds of a run: as the user says, or as many as the validation texts call for.

        Args:
            n_validation: Texts of the validation split.
            made: Whether they were taken from the training rows.

        Raises:
            ConfigError: If folds are asked for together with what has none.
        """
        against = {
            "chips": self.chips != ("linear",),
            "preset": self.preset != "sound",
            "repeats": self.repeats > 1,
            "refit": not self.refit,
            "stc": self.stc,
        }
        if self.folds is None:
            few = made and n_validation < FEW_VALIDATION
            return DEFAULT_FOLDS if few and not any(against.values()) else 1
        if self.folds > 1 and any(against.values()):
            field = next(name for name, there in against.items() if there)
            raise ConfigError(
                "Folds are for linear chips of the sound recipe, fitted once and refitted.",
                f"Leave {field} at its default, or folds at 1.",
                field,
                "folds",
            )
        return self.folds

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """Every vector to keep per text and layer: the poolings, and what preset and STC add."""
        raw = [self._published] if self.preset == "published" else []
        sound = [Vector("block", pooling) for pooling in self.poolings]
        every = [*raw, *sound, *self.sparse_vectors, *self.published_vectors]
        return tuple(dict.fromkeys(every))

    @property
    def sparse_vectors(self) -> tuple[Vector, ...]:
        """What Sparsify-then-Classify reads."""
        if not self.stc:
            return ()
        single: list[Pooling] = [p for p in self.poolings if p != "first+mean"]
        return tuple(Vector(site, pooling) for pooling in single for site in self.sites)

    @property
    def published_vectors(self) -> tuple[Vector, ...]:
        """What Sparsify-then-Classify reads as published: no norm comes before its probes."""
        if self.preset != "published":
            return ()
        return tuple(
            Vector("raw" if v.site == "block" else v.site, v.pooling) for v in self.sparse_vectors
        )

    @property
    def chip_keys(self) -> tuple[ChipKey, ...]:
        """Every curve that a run with these settings has, each after those that it rests on."""
        sound = [ChipKey.sound(pooling, kind) for pooling in self.poolings for kind in self.chips]
        sparse = [ChipKey.sparse(v) for v in self.sparse_vectors]
        joined = [ChipKey(STC, v.site, v.pooling, "sparse") for v in self.sparse_vectors]
        if self.stc and len(self.sites) > 1:
            poolings: list[Pooling] = list(dict.fromkeys(v.pooling for v in self.sparse_vectors))
            joined += [ChipKey(STC, ALL_SITES, pooling, "sparse") for pooling in poolings]
        kinds: tuple[ChipKind, ...] = ("linear", "mlp")
        read = self._published.name
        published = [ChipKey.named(read, k) for k in kinds if self.preset == "published"]
        published += [ChipKey.sparse(v, "published") for v in self.published_vectors]
        joined += [
            ChipKey(STC_PUBLISHED, v.site, v.pooling, "sparse") for v in self.published_vectors
        ]
        return tuple(dict.fromkeys([*published, *sound, *sparse, *joined]))

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Build a config from a user's values.

        Raises:
            ConfigError: Naming the first field that does not fit, what it got and what it takes.
        """
        with as_refusal():
            return cls.model_validate(values)


class CutSpec(ChipRecord):
    """Which cut of a finished run to build as a bundle."""

    cut_layer: Annotated[int, Field(ge=0)]
    chip: ChipKind = "linear"
    rule: Rule = "manual"
    dtype: StoredDtype | None = None
    """Number format of the backbone's weights in the bundle. None keeps the published one. The chip
    stays float32."""
    exit_margin: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Accuracy that early exits may not lose. None builds no exits."""
    threshold: Annotated[str | None, Field(max_length=60)] = None
    """What a binary task's threshold is to reach, such as fpr=5%. None takes the likelier class."""
    positive: Annotated[str | None, Field(max_length=1000)] = None
    """Class that the threshold looks for. None is the second."""

    @classmethod
    def at(cls, cut: Cut, rule: Rule = "manual") -> Self:
        """The build of a cut that a rule chose."""
        return cls(cut_layer=cut.layer, **fields_of(cut.chip), rule=rule)

    def asking(self, **extras: Any) -> Self:
        """The same with what a bundle may have beside its chip.

        Raises:
            ConfigError: Naming the first that does not fit.
        """
        with as_refusal():
            return type(self).model_validate({**self.model_dump(), **extras})

    @property
    def cut(self) -> Cut:
        """Where to cut, and what reads there."""
        return Cut(self.cut_layer, self.key)


def home_dir(override: str | Path | None = None) -> Path:
    """The folder that holds runs, features, backbones and data (`CHIPVIZ_HOME`)."""
    return Path(override or os.environ.get("CHIPVIZ_HOME") or "~/.chipviz").expanduser().absolute()
