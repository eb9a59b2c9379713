"""Rows from JSON: a list of objects, one object per line, or the one list in an object."""

from pathlib import Path
from typing import Any

import pandas as pd

from chipviz.data.delimited import read_text
from chipviz.errors import Notice, SourceError
from chipviz.files import NamedTwiceError, parse_json


def read_json(path: Path) -> tuple[pd.DataFrame, list[Notice]]:
    """Read rows.

    Raises:
        SourceError: If the file is one object that holds no list of rows.
        ValueError: Naming the line that is malformed or no object.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        return _frame(_objects(_parsed(text, 1))), []
    whole = _whole_object(text)
    if whole is not None:
        rows, notices = _rows_inside(whole, path.name)
        return _frame(_objects(rows)), notices
    # Not splitlines: a text may hold U+2028 and kin, which JSON does not escape.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
    return _frame([_object(_parsed(line, n), f"line {n}") for n, line in lines]), []


def _whole_object(text: str) -> dict[str, Any] | None:
    """The one object that a file is, over several lines or with its rows inside; else None."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _is_object(lines[0]):
        return None
    try:
        found = parse_json(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    holds_rows = bool(_list_fields(found)) or _is_by_column(found)
    return found if len(lines) > 1 or holds_rows else None  # one line of plain values is a row


def _is_by_column(found: dict[str, Any]) -> bool:
    """Whether its fields are columns: numbers of rows, each with a value."""
    return len(found) > 1 and all(isinstance(v, dict) and len(v) > 1 for v in found.values())


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except (ValueError, RecursionError):
        return False


def _list_fields(found: dict[str, Any]) -> list[str]:
    """Fields that hold rows: lists of objects."""
    return [
        name
        for name, value in found.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    ]


def _rows_inside(found: dict[str, Any], name: str) -> tuple[list[Any], list[Notice]]:
    fields = _list_fields(found)
    if len(fields) == 1:
        rows = found[fields[0]]
        message = f"{name} is one JSON object. Its field {fields[0][:80]!r} holds the rows."
        return rows, [Notice("rows-in-field", message, len(rows))]
    shown = ", ".join(repr(field[:40]) for field in list(found)[:12])
    inside = "several lists of rows" if fields else "no list of rows"
    raise SourceError(
        f"{name} is one JSON object with the fields {shown} and {inside}.",
        "Its fields are columns: write it with `to_json(orient='records')`."
        if _is_by_column(found)
        else "Give a list of objects, or one object per line.",
    )


def _objects(rows: Any) -> list[dict[str, Any]]:
    return [_object(row, f"item {n}") for n, row in enumerate(rows, start=1)]


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    return row


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = dict.fromkeys(column for row in rows for column in row)
    return pd.DataFrame({c: pd.Series([row.get(c) for row in rows], dtype=object) for c in columns})


def _parsed(text: str, line: int) -> Any:
    try:
        return parse_json(text)
    except NamedTwiceError as error:
        raise ValueError(f"line {line} names {error.name[:80]!r} twice in one object") from None
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"line {line} is not well-formed JSON") from None
