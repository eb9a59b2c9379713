"""Plain text of any table: to calibrate, to train a language model on, and to measure it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from chipviz.data.tables import read_table
from chipviz.errors import ConfigError
from chipviz.progress import ProgressFn, silent

DEFAULT = "bbc-news"
HELD_OUT = 0.1
"""Share of the texts that is held out where a table has no split for that."""


@dataclass(frozen=True)
class Corpus:
    """Texts of a table, in an order that the seed alone decides."""

    name: str
    texts: list[str]
    """Texts to calibrate and train on."""
    held_out: list[str]
    """Texts that are only measured on. No text stands on both sides."""


def read_corpus(source: str | None, home: Path, seed: int, progress: ProgressFn = silent) -> Corpus:
    """Read the texts of a table: of the column with the longest ones.

    The test split is held out, else the validation split, else a tenth of the rows.

    Args:
        source: As `read_table` takes it. None is the embedded data set.
        home: The folder that holds `data/`.
        seed: Of the order.
        progress: Told what arrives.

    Raises:
        SourceError: If the table cannot be read.
        ConfigError: If it has no column of texts, or too few of them.
    """
    source = source or DEFAULT
    table = read_table(source, home, progress)
    first = "train" if "train" in table.frames else next(iter(table.frames))
    column = _longest(table.frames[first])
    if column is None:
        raise ConfigError(
            f"{table.name} has no column of texts.", "Give data with a text column.", "calibrate"
        )
    rng = np.random.default_rng(seed)
    texts = _texts(table.frames[first], column, rng)
    other = next((name for name in ("test", "validation") if name in table.frames), None)
    if other is not None and other != first:
        held_out = _texts(table.frames[other], column, rng)
    else:
        n_held = max(1, round(HELD_OUT * len(texts)))
        texts, held_out = texts[n_held:], texts[:n_held]
    known = set(held_out)
    texts = [text for text in texts if text not in known]
    if not texts or not held_out:
        raise ConfigError(
            f"{table.name} has too few texts to calibrate on some and measure on others.",
            "Give more texts.",
            "calibrate",
        )
    return Corpus(table.name, texts, held_out)


def _longest(frame: pd.DataFrame) -> str | None:
    """The column whose texts are the longest, of those that hold texts alone."""
    lengths: dict[str, float] = {}
    for column in frame.columns:
        values = frame[column].dropna().head(200)
        if len(values) and all(isinstance(value, str) for value in values):
            lengths[str(column)] = float(values.str.len().mean())
    return max(lengths, key=lambda name: lengths[name], default=None)


def _texts(frame: pd.DataFrame, column: str, rng: np.random.Generator) -> list[str]:
    texts = [text for text in frame[column] if isinstance(text, str) and text.strip()]
    texts = list(dict.fromkeys(texts))
    return [texts[i] for i in rng.permutation(len(texts))]
