"""Rows of a large table, some at a time: what is asked about never has to fit into memory."""

import csv
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from chipviz.data.delimited import delimiter_of, looks_like_rows
from chipviz.errors import SourceError
from chipviz.files import parse_json

LARGE = 32 << 20
"""Bytes from which on a file is read some rows at a time."""
HEAD = 1 << 20
"""Characters that decide how a delimited file is written."""
FIRST = "first"
"""Attribute of a chunk: rows that stand before it in the file."""
KINDS = (".csv", ".tsv", ".jsonl", ".parquet")


def is_large(path: Path) -> bool:
    """Whether a table is read some rows at a time."""
    return path.suffix.lower() in KINDS and path.is_file() and path.stat().st_size > LARGE


def stream_rows(path: Path, size: int) -> Iterator[pd.DataFrame]:
    """Chunks of a table of at most `size` rows, in order.

    Cells are as `read_table` gives them. A cell in quotes that holds whole lines which could be
    rows is refused, since the whole file would have to be looked at to know.

    Raises:
        SourceError: Naming the line that cannot be read.
    """
    kind = path.suffix.lower()
    try:
        chunks = {".parquet": _parquet, ".jsonl": _json_lines}.get(kind, _delimited)(path, size)
        first = 0
        for chunk in chunks:
            chunk.attrs[FIRST] = first
            first += len(chunk)
            yield chunk
    except (pa.ArrowException, ValueError, RecursionError) as error:
        raise SourceError(
            f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}",
            "Check that it is a whole, well-formed file in UTF-8.",
        ) from None


def _parquet(path: Path, size: int) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=size):
            # Whole numbers stay whole where a cell is empty.
            yield batch.to_pandas(ignore_metadata=True, integer_object_nulls=True)


def _json_lines(path: Path, size: int) -> Iterator[pd.DataFrame]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
        while rows := [_object(line, n) for n, line in islice(numbered, size)]:
            names = dict.fromkeys(name for row in rows for name in row)
            cells = {name: [row.get(name) for row in rows] for name in names}
            yield pd.DataFrame({n: pd.Series(c, dtype=object) for n, c in cells.items()})


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        found = parse_json(line)
    except (ValueError, RecursionError):
        raise ValueError(f"line {number} is not well-formed JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"line {number} is no JSON object")
    return found


def _delimited(path: Path, size: int) -> Iterator[pd.DataFrame]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        head = lines.read(HEAD).rpartition("\n")[0]
        mark = "\t" if path.suffix.lower() == ".tsv" else delimiter_of(head)
        lines.seek(0)
        seen = _Lines(lines)
        reader = csv.reader(seen, delimiter=mark, strict=True)
        try:
            names = [
                (cell or "").strip() or f"column {i}" for i, cell in enumerate(next(reader), 1)
            ]
            seen.begin()
            while rows := list(islice(_rows(reader, seen, len(names), mark), size)):
                yield pd.DataFrame(rows, columns=names, dtype=object)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


class _Lines:
    """Lines of a file that remember those of the row at hand."""

    def __init__(self, lines: io.TextIOBase | Any) -> None:
        self._lines, self.row = lines, list[str]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if "\0" in line:
            raise ValueError("it holds a NUL character")
        self.row.append(line)
        return line

    def begin(self) -> None:
        """A new row begins."""
        self.row.clear()


def _rows(reader: Any, seen: _Lines, width: int, mark: str) -> Iterator[list[str | None]]:
    for cells in reader:
        own = list(seen.row)
        seen.begin()
        if not cells:
            continue
        if len(cells) != width:
            raise ValueError(
                f"line {reader.line_num} has {len(cells)} cells, expected {width} as in the header"
            )
        if len(own) > 1 and looks_like_rows(own, width, mark):
            first = reader.line_num - len(own) + 1
            raise ValueError(
                f"lines {first} to {reader.line_num} are one cell in quotes, or rows in which "
                "quotation marks are text"
            )
        yield [cell or None for cell in cells]
