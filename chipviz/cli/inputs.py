"""What a user asks a bundle or a run: texts from options or a file, in the fields that are read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from chipviz.bundle.fields import columns_of, fields_of
from chipviz.config import Preset
from chipviz.data.delimited import read_text
from chipviz.data.from_table import read_fields
from chipviz.data.pictures import ENDINGS
from chipviz.data.tables import read_table
from chipviz.errors import ConfigError, Notice, SourceError
from chipviz.results.report import TaskInfo

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
_WORDS = {"text": "a text", "text_pair": "a second text", "choices": "options"}
_EXAMPLES = {
    "text": '--text "..."',
    "text_pair": '--text-pair "..."',
    "choices": '--choices "one|two"',
}


@dataclass(frozen=True)
class Asked:
    """Rows to classify."""

    rows: pd.DataFrame
    by_role: bool
    """Whether its columns are roles (text, text_pair, choices) or the names of the user's table."""
    notices: tuple[Notice, ...] = ()
    """What must be said of how a file was read."""


def from_options(
    texts: Sequence[str], pairs: Sequence[str] | None, choices: Sequence[str] | None
) -> Asked:
    """Rows from the command line. Bars part the options of a question.

    Raises:
        ConfigError: If there are not as many of one as of the other.
    """
    given = {"text": list(texts)}
    if pairs:
        given["text_pair"] = list(pairs)
    options = [[part.strip() for part in row.split("|")] for row in choices or ()]
    for name, n in (("--text-pair", len(pairs or ())), ("--choices", len(options))):
        if n not in (0, len(texts)):
            raise ConfigError(
                f"--text is given {len(texts)} times and {name} {n} times.",
                f"Give one {name} to each --text.",
            )
    rows = pd.DataFrame(given, dtype=object)
    return Asked(rows.assign(choices=options) if options else rows, by_role=True)


def is_table(file: Path) -> bool:
    """Whether a file is a table, by its name; a JSON list of texts is none."""
    kind = file.suffix.lower()
    return (
        kind in _TABLES and not file.is_dir() and not (kind == ".json" and _is_list_of_texts(file))
    )


def from_file(file: Path, home: Path) -> Asked:
    """Rows from a table, from a JSON list of texts, or from any other file with one text per line.

    Raises:
        ChipvizError: If it cannot be read, or holds nothing.
    """
    kind = file.suffix.lower()
    if is_table(file):
        table = read_table(str(file.absolute()), home, keep=False)
        return Asked(table.frames["all"], by_role=False, notices=table.notices)
    try:
        content = read_text(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}", "Give a UTF-8 file, one text a line, or a table."
        ) from None
    texts = json.loads(content) if kind == ".json" else _lines(content)
    blank = next((n for n, text in enumerate(texts, start=1) if not text.strip()), None)
    if not any(text.strip() for text in texts):
        raise ConfigError(f"{file} holds no text.", "Give a file with one text per line.")
    if blank is not None:
        where = f"Item {blank}" if kind == ".json" else f"Line {blank}"
        raise ConfigError(
            f"{where} of {file} is blank, and each is one text.",
            "Remove it, or fill it: results are given by line.",
        )
    return Asked(pd.DataFrame({"text": texts}, dtype=object), by_role=True)


def in_fields(asked: Asked, task: TaskInfo, preset: Preset) -> tuple[list[str], list[str] | None]:
    """First and second texts, as the prompt of a task takes them.

    Args:
        asked: What was given.
        task: The run's task. Its columns say what each text is.
        preset: The run's preset.

    Raises:
        ChipvizError: If a text is missing or has no place, or a value is none.
    """
    if not asked.by_role:
        return fields_of(asked.rows, task, preset)
    columns = columns_of(task)
    roles = {role: name for role, name in columns.roles.items() if role != "label"}
    if set(asked.rows.columns) != set(roles):
        names = " and ".join(f"`{name[:40]}`" for name in roles.values())
        raise ConfigError(
            f"{_listed(roles)} must be given here; given was {_listed(asked.rows.columns)}.",
            f"Give {' '.join(_EXAMPLES[role] for role in roles)}, or a table with the "
            f"column{'s' * (len(roles) > 1)} {names}.",
        )
    columns = replace(columns, **{role: role for role in roles})
    return read_fields(asked.rows, "all", columns, preset)[:2]


def _listed(roles: Sequence[str] | dict[str, str] | pd.Index) -> str:
    said = " and ".join(words for role, words in _WORDS.items() if role in roles)
    return said[:1].upper() + said[1:] if isinstance(roles, dict) else said


def _lines(content: str) -> list[str]:
    """Texts by line, whatever ends a line; the last end begins no further text."""
    lines = content.replace("\r\n", "\n").split("\n")
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines


def _is_list_of_texts(file: Path) -> bool:
    try:
        found = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError, SourceError):
        return False  # reading it as a table says what is wrong
    return isinstance(found, list) and all(isinstance(item, str) for item in found)


def pictures(given: Sequence[Path], *, single: bool = False) -> list[Path]:
    """Files of pictures: those named, and those in the folders named.

    Args:
        given: Files and folders.
        single: Whether one file is wanted.

    Raises:
        ConfigError: If there is none.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir() or single:
            found.append(path)
            continue
        below = sorted(f for f in path.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())
        if not below:
            raise ConfigError(
                f"The folder {path} holds no pictures.", f"Give {', '.join(ENDINGS[:3])} files."
            )
        found += below
    absent = next((path for path in found if not path.is_file()), None)
    if absent is not None:
        raise ConfigError(f"There is no picture {absent}.", "Give the path of a file.")
    return found
