"""Multiple choice: passage, question and options become two texts, the answer becomes an index.

Also the prompts that well-known tasks are asked in.

Source of the published prompts: the public code of arXiv:2410.06541. Ours differ where that one
traps: no space after "Answer:" (it would be a token of its own, and the one that is probed), and no
subject before a question (training rows of MMLU have none, or name another thing there).
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from chipviz.config import Preset
from chipviz.errors import TaskError

BOOLQ = "{text}\n\nQuestion: {text_pair}\nAnswer:"
READING = "Article: {text}\n\nQuestion: {text_pair}\nAnswer:"
"""The prompt of RACE and C3: the second text is the question with its options."""
EXAM = "The following are multiple choice questions (with answers)"
"""How MMLU begins."""
LETTERS = ascii_uppercase
OPTIONS = r"(?>[\s\S]*?\nA\. )[\s\S]*?\nB\. "
"""A question with its options, as `with_options` writes it, for Oniguruma: linear on any text."""


def template_for(preset: Preset, *, passage: bool, options: bool) -> str:
    """The prompt of a question.

    Args:
        preset: *published* is the paper's exact string.
        passage: Whether there is a text that the question is about.
        options: Whether there are options. Otherwise the answer is yes or no.
    """
    published = preset == "published"
    if passage:
        return (READING if options else BOOLQ) + " " * published
    # As published the first line holds the row's subject, so it is part of the text.
    return ("" if published else f"{EXAM}.\n\n") + "{text}\n{text_pair}\nAnswer:"


def exam_question(question: str, subject: str | None) -> str:
    """A question as published for MMLU, where a row may lack its subject."""
    return f"{EXAM}{f' about {subject}' if subject else ''}.\n\n{question}"


def with_options(options: Sequence[str], question: str | None = None) -> str:
    """The second text: the options, one a line, below the question where it belongs there."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([question] if question is not None else []), *lines])


def holds_options(pair: str) -> bool:
    """Whether a second text is a question with its options, which must stay whole."""
    return re.match(OPTIONS, pair) is not None


def is_options(pair: str) -> bool:
    """Whether a second text is options alone: the question is the first text then."""
    return re.match(r"A\. [\s\S]*?\nB\. ", pair) is not None


def answer_indices(answers: Sequence[Any], options: Sequence[Sequence[str]]) -> list[int | None]:
    """Which option each answer means: by number from 0, by letter, or by its own words.

    One way is taken for a whole column, the first that fits every row. An answer "2" is an index
    where all answers are, even if an option reads "2" too. Where none fits every row, the way that
    fits most rows is taken, and the others come back as None.
    """
    best: list[int | None] = []
    for meant in (_by_number, _by_letter, _by_words):
        found = [meant(a, row) for a, row in zip(answers, options, strict=True)]
        if None not in found:
            return found
        if not best or found.count(None) < best.count(None):
            best = found
    return best


def check_options(options: list[str] | None, where: str) -> list[str]:
    """Options that can be written as lettered lines.

    Raises:
        TaskError: If there are fewer than two or more than there are letters.
    """
    if options is None or not 2 <= len(options) <= len(LETTERS):
        got = "no list of options" if options is None else f"{len(options)} options"
        raise TaskError(
            f"{where} has {got}, expected 2 to {len(LETTERS)}.",
            'Give a list a row, such as ["yes", "no"], or name another column.',
            "choices",
        )
    return options


def _by_number(answer: Any, options: Sequence[str]) -> int | None:
    text = str(answer).strip()
    if isinstance(answer, float) and answer.is_integer():
        text = str(int(answer))
    index = int(text) if re.fullmatch(r"[0-9]{1,2}", text) else -1
    return index if 0 <= index < len(options) else None


def _by_letter(answer: Any, options: Sequence[str]) -> int | None:
    text = str(answer).strip().upper()
    index = LETTERS.find(text) if len(text) == 1 else -1
    return index if 0 <= index < len(options) else None


def _by_words(answer: Any, options: Sequence[str]) -> int | None:
    return list(options).index(str(answer)) if str(answer) in options else None
