"""What a bundle is verified on: rows of its run, and some that anyone can make."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chipviz.bundle import vision
from chipviz.data.processor import Reader
from chipviz.data.prompt import Prompt, hard_endings
from chipviz.results.report import Example

Row = tuple[str, str | None]
"""A text and its second text, or a picture's path or name."""
SELF_TEST = (
    ("The match ended two to one after extra time.", "Was there extra time?"),
    ("Shares rose as the central bank kept its rate.", "Did the bank change its rate?"),
    ("I would not watch this film again.", "The film was a joy."),
)
"""Texts, with a second text where one is read, whose probabilities stand in every bundle, so that
`verify` needs nothing else."""


def self_test(prompt: Reader) -> list[tuple[str, str | None]]:
    """Texts or pictures that anyone can ask a bundle about."""
    if not isinstance(prompt, Prompt):
        return [(name, None) for name in vision.MADE]
    return [(text, pair if prompt.takes_pair else None) for text, pair in SELF_TEST]


@contextmanager
def rows_to_check(prompt: Reader, rows: Sequence[Example]) -> Iterator[list[Row]]:
    """Validation rows as a fresh process is given them.

    Texts that may end in a token with a meaning stand behind them. Pictures are files for as long.

    Args:
        prompt: The run's own.
        rows: As the run kept them.
    """
    if isinstance(prompt, Prompt):
        hard = [
            (text, text if prompt.takes_pair else None) for text in hard_endings(prompt.tokenizer)
        ]
        yield [*((row.text, row.text_pair) for row in rows), *hard]
        return
    with vision.as_files(prompt, [row.text for row in rows]) as files:
        yield [(str(file), None) for file in files]
