"""Delimited text: its encoding, the mark that parts cells, and whether quotation marks are text."""

import codecs
import csv
import io
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import pandas as pd

from chipviz.errors import Notice, SourceError

DELIMITERS = ",;\t|"
"""Marks that may part cells, the usual one first."""
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
FASTTEXT = "__label__"
"""What a label begins with in files of fastText."""
N_LOOKED_AT = 100
"""Maximum rows that decide how a file is written."""
N_EXAMPLES = 5
"""Maximum rows named in a message."""
Quoting = Literal[0, 3]
"""`csv.QUOTE_MINIMAL`: quotes enclose cells; `csv.QUOTE_NONE`: they are text like all else."""


@dataclass(frozen=True)
class _Reading:
    """One way to read a file."""

    rows: list[list[str | None]]
    """Cells of the header and of every row. An empty cell is None."""
    spans: list[tuple[int, int]]
    """First and last line of each of them, from 1."""


def read_text(path: Path) -> str:
    """The characters of a text file: UTF-8, or UTF-16 that begins with its mark.

    No other encoding is guessed: in most of them all bytes are letters, and wrong ones go unseen.

    Raises:
        SourceError: Naming the first line in another encoding.
        ValueError: Naming the first line with a NUL character.
    """
    raw = path.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"{path.name} is not {'UTF-16' if wide else 'UTF-8'}: line {line} holds the byte "
            f"0x{raw[error.start]:02x}.",
            "Save it as UTF-8 where it was made, or convert it, such as "
            f"`iconv -f {_likely_encoding(raw)} -t utf-8 OLD > NEW`, and look at the letters.",
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL character")
    return text


def _likely_encoding(raw: bytes) -> str:
    """What `iconv` is to be told. Windows programs use bytes that are control codes in Latin-1."""
    windows = re.search(rb"[\x80-\x9f]", raw)
    with suppress(UnicodeDecodeError):
        raw.decode("cp1252")
        return "cp1252" if windows else "latin1"
    return "ENCODING"


def read_delimited(path: Path, *, tabs: bool) -> tuple[pd.DataFrame, list[Notice]]:
    """Read a table with everything as written: "NA", "null" and "007" are texts and labels.

    Args:
        path: The file.
        tabs: Whether tabs part its cells. Otherwise the mark is found.

    Raises:
        SourceError: If it cannot be told whether quotation marks are text.
        ValueError: Naming the first line that does not fit the header.
    """
    csv.field_size_limit(2**31 - 1)  # long cells are refused by row and column where they are used
    text = read_text(path)
    delimiter = "\t" if tabs else delimiter_of(text)
    blanks = blanks_after(text, delimiter)
    reading, notices = _as_meant(text, delimiter, blanks, path.name, tabs=tabs)
    if not reading.rows:
        return pd.DataFrame(), []
    if blanks:
        n = len(reading.rows) - 1
        message = f"Blanks after each {_NAMES[delimiter]} of {path.name} are not part of the cells."
        notices.append(Notice("blank-after-delimiter", message, n))
    header = [(name or "").strip() or f"column {i}" for i, name in enumerate(reading.rows[0], 1)]
    return pd.DataFrame(reading.rows[1:], columns=header, dtype=object), notices


def read_fasttext(path: Path) -> tuple[pd.DataFrame, list[Notice]]:
    """Read lines of fastText, such as `__label__sport The match ended`.

    Raises:
        ValueError: Naming the first line without a label, or with several.
    """
    rows = []
    # Not splitlines: a text may hold U+2028 and kin.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        words = line.split()
        labels = [word for word in words if word.startswith(FASTTEXT)]
        if not words:
            continue
        if len(labels) != 1 or words[0] != labels[0]:
            has = f"{len(labels)} labels" if len(labels) != 1 else "its label not at the beginning"
            raise ValueError(f"line {number} has {has}, expected one: {FASTTEXT}NAME and a text")
        text = line.split(None, 1)[1].rstrip("\r") if len(words) > 1 else None
        rows.append((text, labels[0][len(FASTTEXT) :]))
    return pd.DataFrame(rows, columns=["text", "label"], dtype=object), []


def delimiter_of(text: str) -> str:
    """The comma, unless only another mark gives the first rows equally many cells."""
    for mark in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        with suppress(csv.Error):
            widths = {len(cells) for cells in islice(reader, N_LOOKED_AT) if cells}
            if len(widths) == 1 and widths != {1}:
                return mark
    return ","


def blanks_after(text: str, delimiter: str) -> bool:
    """Whether a blank follows every delimiter, as people write by hand: `text, label`."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    with suppress(csv.Error):
        rows = [cells for cells in islice(reader, N_LOOKED_AT) if cells]
        later = [cell for cells in rows for cell in cells[1:]]
        return bool(later) and all(cell.startswith(" ") for cell in later)
    return False


def _as_meant(
    text: str, delimiter: str, blanks: bool, name: str, *, tabs: bool
) -> tuple[_Reading, list[Notice]]:
    """Cells in quotes, or quotes as text.

    A text may begin with a quotation mark, and a later one end with one. Read as a quoted cell,
    all rows between would be one. So where the lines of a quoted cell look like rows of their own,
    the file must show elsewhere that it quotes cells; else its quotes are text in a TSV file, whose
    format has no quoting, and in a CSV file nobody can know.
    """
    try:
        quoted = _read(text, delimiter, csv.QUOTE_MINIMAL, blanks)
    except ValueError:
        plain = _read_plainly(text, delimiter, blanks)
        if plain is None or (not tabs and _has_quoted_cells(text, delimiter)):
            raise
        return plain, [_quotes_are_text(plain, name)]
    lines = io.StringIO(text, newline="").readlines()
    suspects = [span for span in quoted.spans if _looks_like_rows(lines, span, quoted, delimiter)]
    if not suspects:
        return quoted, []
    where = ", ".join(f"{first} to {last}" for first, last in suspects[:N_EXAMPLES])
    if _quotes_where_needed(quoted, lines, suspects, delimiter):
        n_lines = max(last - first + 1 for first, last in suspects)
        message = (
            f"{name} has {len(suspects)} cells in quotes that hold whole lines, up to {n_lines} "
            "of them, and each line could be a row."
        )
        return quoted, [Notice("cell-spans-lines", message, len(suspects), (f"lines {where}",))]
    plain = _read_plainly(text, delimiter, blanks) if tabs else None
    if plain is not None:
        return plain, [_quotes_are_text(plain, name)]
    raise SourceError(
        f"Lines {where} of {name} are one cell in quotes, or rows in which quotation marks are "
        "text: both readings fit.",
        "Put each text that holds a quotation mark in quotes and double the marks inside it, or "
        "give the rows as JSON lines.",
    )


def _read(text: str, delimiter: str, quoting: Quoting, blanks: bool) -> _Reading:
    """Read all rows in one way.

    Raises:
        ValueError: Naming the first line that does not fit the header, or whose quotes do not
            close.
    """
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=quoting,
        strict=True,
        skipinitialspace=blanks,
    )
    found, last = _Reading([], []), 0
    try:
        for cells in reader:
            first, last = last + 1, reader.line_num
            if not cells:
                continue
            if found.rows and len(cells) != len(found.rows[0]):
                raise ValueError(
                    f"line {last} has {len(cells)} cells, expected {len(found.rows[0])} "
                    "as in the header"
                )
            found.rows.append([cell or None for cell in cells])
            found.spans.append((first, last))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return found


def _read_plainly(text: str, delimiter: str, blanks: bool) -> _Reading | None:
    """The rows if quotes are text; None where the lines do not fit."""
    try:
        return _read(text, delimiter, csv.QUOTE_NONE, blanks)
    except ValueError:
        return None


def _looks_like_rows(
    lines: list[str], span: tuple[int, int], quoted: _Reading, delimiter: str
) -> bool:
    """Whether each line of one quoted cell has as many cells as the header."""
    first, last = span
    return last > first and looks_like_rows(lines[first - 1 : last], len(quoted.rows[0]), delimiter)


def looks_like_rows(lines: list[str], width: int, delimiter: str) -> bool:
    """Whether each line has as many cells as the header, which has `width`."""
    return all(line.count(delimiter) + 1 == width for line in lines)


def _quotes_where_needed(
    quoted: _Reading, lines: list[str], suspects: list[tuple[int, int]], delimiter: str
) -> bool:
    """Whether other cells are quoted because they hold a delimiter, a mark or a line break."""
    doubtful = set(suspects)
    for cells, (first, last) in zip(quoted.rows, quoted.spans, strict=True):
        if (first, last) in doubtful:
            continue
        doubled = '""' in "".join(lines[first - 1 : last])
        if any(
            cell and (delimiter in cell or "\n" in cell or (doubled and '"' in cell))
            for cell in cells
        ):
            return True
    return False


def _has_quoted_cells(text: str, delimiter: str) -> bool:
    """Whether any line has a cell that is whole in quotes."""
    for line in text.split("\n"):
        for cell in line.strip("\r").split(delimiter):
            if len(cell) > 1 and cell.startswith('"') and cell.endswith('"'):
                return True
    return False


def _quotes_are_text(plain: _Reading, name: str) -> Notice:
    marked = [
        first
        for cells, (first, _) in zip(plain.rows, plain.spans, strict=True)
        if any(cell and cell.startswith('"') for cell in cells)
    ]
    message = f"Quotation marks in {name} are read as text: they enclose no cells there."
    return Notice(
        "quotes-are-text", message, len(marked), tuple(f"line {n}" for n in marked[:N_EXAMPLES])
    )
