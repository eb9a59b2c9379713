"""Which chip, and where to cut: the one key of curves, scores, costs, predictions and links."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, model_validator

Recipe = Literal["sound", "published", "stc", "stc-published"]
"""How a chip is trained: *sound* is our way, *published* a paper's, to the letter. *stc* reads the
neurons that matter of every layer up to its own (Sparsify-then-Classify), *stc-published* the same
to the letter of its paper."""
Site = Literal["block", "raw", "gate", "ffn_in", "ffn_out", "all"]
"""Where a feature is taken: *block* is a block's output after the final norm, *raw* before it. In
the feed-forward part *gate* is the activation alone, *ffn_in* what the down projection reads,
*ffn_out* what the part gives. *all* is what *stc* reads where it takes several sites together."""
FfnSite = Literal["gate", "ffn_in", "ffn_out"]
Pooling = Literal["last", "mean", "first", "max", "first+mean"]
"""Which state of a text is taken: the last token's, the mean over all tokens, the first token's, or
the largest value of each dimension. Of a picture the first is the class token's, mean and maximum
are over the patches, and *first+mean* is both, one after the other."""
TEXT_POOLINGS: tuple[Pooling, ...] = ("last", "mean", "first", "max")
IMAGE_POOLINGS: tuple[Pooling, ...] = ("first", "mean", "max", "first+mean")
ChipKind = Literal["linear", "mlp", "sparse"]
"""*sparse* chips are linear with an L1 penalty: most of their weights are zero."""
Split = Literal["train", "validation", "test"]
"""*train* fits chips, *validation* chooses everything, *test* is scored once, for the report."""

EMBEDDING_LAYER = -1
"""Layer number of the control that reads the embedding output. Never a layer."""


@dataclass(frozen=True)
class Vector:
    """One vector per text and layer: where it is taken and how it is pooled."""

    site: Site
    pooling: Pooling

    @property
    def n_states(self) -> int:
        """States of which it is made: its numbers are so many times a state's."""
        return 2 if self.pooling == "first+mean" else 1

    @property
    def name(self) -> str:
        """Word in file names and links: `mean`, `ffn_in-mean`, `raw` for the last raw state."""
        if self == RAW:
            return RAW_NAME
        return self.pooling if self.site == "block" else f"{self.site}-{self.pooling}"

    @classmethod
    def named(cls, name: str) -> "Vector":
        """The vector whose `name` this is.

        Raises:
            ValueError: If it is none.
        """
        if name == RAW_NAME:
            return RAW
        site, dash, pooling = name.rpartition("-")
        for known in get_args(Pooling):
            if pooling == known and not dash:
                return cls("block", known)
            for other in (*get_args(FfnSite), ALL_SITES, RAW_NAME):
                if (site, pooling) == (other, known):
                    return cls(other, known)
        raise ValueError(f"{name[:40]!r} names no vector")


STC: Literal["stc"] = "stc"
STC_PUBLISHED: Literal["stc-published"] = "stc-published"
ALL_SITES: Literal["all"] = "all"
RAW_NAME: Literal["raw"] = "raw"
RAW = Vector(RAW_NAME, "last")
"""What Chip-Tuning's own recipe reads: the last token's state before the final norm."""
SPARSE_PUBLISHED = "sparse-published"
"""Word for sparse chips of Sparsify-then-Classify's own recipe."""


@dataclass(frozen=True)
class ChipKey:
    """Which curve: how its chips are trained, what they read and what they are."""

    recipe: Recipe
    site: Site
    pooling: Pooling
    kind: ChipKind

    @classmethod
    def sound(cls, pooling: Pooling, kind: ChipKind = "linear") -> Self:
        """A chip of this project's own recipe."""
        return cls("sound", "block", pooling, kind)

    @classmethod
    def published(cls, kind: ChipKind) -> Self:
        """A chip of the paper's recipe."""
        return cls.named(RAW_NAME, kind)

    @classmethod
    def sparse(cls, vector: Vector, recipe: Literal["sound", "published"] = "sound") -> Self:
        """A sparse chip of one layer's vector."""
        return cls(recipe, vector.site, vector.pooling, "sparse")

    @property
    def joins(self) -> bool:
        """Whether it reads neurons of every layer up to its own."""
        return self.recipe in (STC, STC_PUBLISHED)

    @property
    def by_paper(self) -> bool:
        """Whether it is trained to the letter of a paper."""
        return self.recipe in ("published", STC_PUBLISHED)

    @property
    def vector(self) -> Vector:
        """What it reads."""
        return Vector(self.site, self.pooling)

    @property
    def lucky(self) -> bool:
        """Whether its accuracy on validation is that of the best of many tries there."""
        return self.by_paper and self.kind == "sparse"

    @property
    def word(self) -> str:
        """Word in links and on the command line for what it is: its kind, or `stc`.

        Sparse chips are trained in two ways on the same vector, so the paper's say so.
        """
        if self.joins:
            return self.recipe
        return SPARSE_PUBLISHED if self.lucky else self.kind

    @property
    def name(self) -> str:
        """Word in file names: `linear.last`, `mlp.raw`, `stc.ffn_in-mean`."""
        return f"{self.word}.{self.vector.name}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """The key whose `name` this is.

        Raises:
            ValueError: If it is none.
        """
        kind, _, vector = name.partition(".")
        return cls.named(vector, kind)

    @classmethod
    def named(cls, vector: str, kind: str) -> Self:
        """The key of a vector's name and a `word`.

        Raises:
            ValueError: If there is no such vector or kind.
        """
        read = Vector.named(vector)
        if kind == STC and read.site != RAW_NAME:
            return cls(STC, read.site, read.pooling, "sparse")
        if kind == STC_PUBLISHED and read.site not in ("block", ALL_SITES):
            return cls(STC_PUBLISHED, read.site, read.pooling, "sparse")
        if kind == SPARSE_PUBLISHED:
            return cls.sparse(read, "published")
        recipe: Recipe = "published" if read.site == RAW_NAME else "sound"
        for known in get_args(ChipKind):
            if kind == known and not (known == "sparse" and recipe == "published"):
                return cls(recipe, read.site, read.pooling, known)
        raise ValueError(f"{kind[:40]!r} is no kind of chip")


def in_order(keys: Iterable[ChipKey]) -> list[ChipKey]:
    """Chips as they are drawn and named: by site and pooling, raw states last, linear first."""
    sites, words = get_args(Site), [*get_args(ChipKind), SPARSE_PUBLISHED, STC, STC_PUBLISHED]
    poolings = get_args(Pooling)
    return sorted(
        set(keys),
        key=lambda key: (
            key.site == RAW_NAME,
            sites.index(key.site),
            poolings.index(key.pooling),
            words.index(key.word),
        ),
    )


@dataclass(frozen=True)
class Cut:
    """Where to cut: the last layer kept, and the chip that reads it."""

    layer: int
    """0 .. L-1; -1 is the embedding control, which no model is cut at."""
    chip: ChipKey


class Record(BaseModel):
    """Stored fields: none may change, and none that is unknown may be there."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ChipRecord(Record):
    """Stored fields that name a chip. The base of every record about one."""

    recipe: Recipe = "sound"
    site: Site = "block"
    pooling: Pooling
    chip: ChipKind

    @model_validator(mode="before")
    @classmethod
    def _published(cls, values: Any) -> Any:
        """Runs of earlier versions call the published recipe a pooling, *raw*."""
        if isinstance(values, dict) and values.get("pooling") == RAW_NAME:
            return {**values, **fields_of(ChipKey.published(values.get("chip", "linear")))}
        return values

    @property
    def key(self) -> ChipKey:
        """The chip that these fields name."""
        return ChipKey(self.recipe, self.site, self.pooling, self.chip)


def fields_of(key: ChipKey) -> dict[str, Any]:
    """The fields of a `ChipRecord`."""
    return {"recipe": key.recipe, "site": key.site, "pooling": key.pooling, "chip": key.kind}
