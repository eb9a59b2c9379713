"""What chips say of texts and pictures, as plain data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Prediction:
    """The answer for one text."""

    label: str
    score: float
    """Probability of that label, in [0, 1]."""
    probabilities: dict[str, float]
    """Probability per label name."""
    layer: int | None = None
    """The layer at which the text left, where it may leave early."""

    @classmethod
    def of(
        cls,
        names: Mapping[int, str],
        row: Sequence[float],
        decide: Callable[[Sequence[float]], int] | None = None,
        layer: int | None = None,
    ) -> Self:
        """From the probabilities of all classes, in order.

        Args:
            names: Of the classes.
            row: Their probabilities.
            decide: Gives the class. None takes the likeliest.
            layer: See the field.
        """
        best = decide(row) if decide else max(range(len(row)), key=row.__getitem__)
        return cls(names[best], row[best], {names[c]: p for c, p in enumerate(row)}, layer)


@dataclass(frozen=True)
class Token:
    """One token as it stands in the prompt."""

    text: str
    start: int
    end: int
    """Span in characters of the text that the token is in. 0 and 0 in the template."""
    in_text: bool
    in_pair: bool
    """Whether it belongs to the first text, or to the second. The template's belong to neither."""


@dataclass(frozen=True)
class TokenReading:
    """What the chip of every layer says at every token of one text."""

    tokens: list[Token]
    layer: int
    """Layer whose probabilities are given in full."""
    label_index: list[list[int]]
    """Class per layer and token, shape (L, T)."""
    confidence: list[list[float]]
    """Probability of that class, shape (L, T)."""
    at_cut: list[list[float]]
    """Probabilities per token at `layer`, shape (T, C)."""
    by_layer: list[list[float]]
    """Probabilities for the whole text per layer, shape (L, C)."""
    settled_layer: int
    """Shallowest layer from which on every layer gives the last layer's answer."""
    label_names: list[str]


@dataclass(frozen=True)
class PatchReading:
    """What the chip of every layer says at every patch of one picture."""

    grid: tuple[int, int]
    """Rows and columns of patches. Their product is P."""
    layer: int
    """Layer of the cut."""
    label_index: list[list[int]]
    """Class per layer and patch, row after row, shape (L, P)."""
    confidence: list[list[float]]
    """Probability of that class, shape (L, P)."""
    by_layer: list[list[float]]
    """Probabilities for the whole picture per layer, shape (L, C)."""
    settled_layer: int
    """Shallowest layer from which on every layer gives the last layer's answer."""
    label_names: list[str]
    seen: str
    """What the model sees of the picture, scaled and cropped: a PNG file, base64."""
    width: int
    height: int
    """Pixels of the picture as it was given."""
