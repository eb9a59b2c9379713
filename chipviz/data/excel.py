"""Excel workbooks: the rows of their one sheet."""

import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
from openpyxl import load_workbook
from openpyxl.utils.exceptions import InvalidFileException

from chipviz.errors import Notice

MAX_UNPACKED = 1 << 30
"""Maximum bytes of a workbook once it is unpacked. A small file may hold any number of blanks."""
PLAIN = (str, int, float, bool, type(None))


def read_excel(path: Path) -> tuple[pd.DataFrame, list[Notice]]:
    """The first sheet that holds rows, its first row as the names of the columns.

    Cells with a formula hold what it came to when the workbook was saved. Dates become text.

    Raises:
        ValueError: If the file is no workbook, or holds no row below its names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_UNPACKED:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED:,} bytes")
        book = load_workbook(path, read_only=True, data_only=True, keep_links=False)
    except (zipfile.BadZipFile, InvalidFileException, KeyError) as error:
        raise ValueError(f"it is no workbook: {error}") from None
    try:
        sheets = {sheet.title: _rows(sheet) for sheet in book.worksheets}
    finally:
        book.close()
    filled = {title: rows for title, rows in sheets.items() if len(rows) > 1}
    if not filled:
        raise ValueError("no sheet of it holds a row below its names")
    title, (names, *rows) = next(iter(filled.items()))
    width = max(i for row in [names, *rows] for i, cell in enumerate(row, 1) if cell is not None)
    columns = [str(name) if name is not None else f"column {i}" for i, name in enumerate(names, 1)]
    columns += [f"column {i}" for i in range(len(columns) + 1, width + 1)]
    table = [[_plain(cell) for cell in [*row, *[None] * width][:width]] for row in rows]
    frame = pd.DataFrame(table, columns=columns[:width], dtype=object)
    return frame, _others(title, [other for other in filled if other != title])


def _rows(sheet: Any) -> list[tuple[Any, ...]]:
    """Rows that hold anything. A sheet may end in thousands of blank ones."""
    rows = sheet.iter_rows(values_only=True)
    return [row for row in rows if any(cell is not None for cell in row)]


def _plain(cell: Any) -> Any:
    return cell if isinstance(cell, PLAIN) else str(cell)


def _others(title: str, others: list[str]) -> list[Notice]:
    if not others:
        return []
    message = f"The workbook has {len(others) + 1} sheets with rows: {title!r} is read."
    return [Notice("other-sheets", message, len(others), tuple(others[:5]))]
