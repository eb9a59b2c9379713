"""What parsing left: rows of text files and references of pictures, kept under their content."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from chipviz.data.picture_tables import Reading
from chipviz.data.pictures import Pictures
from chipviz.errors import Notice
from chipviz.files import replacing
from chipviz.progress import ProgressFn

PARSER = 2
"""Version of the readers of text files. A file parsed by another version is parsed anew."""


_NOTICES = TypeAdapter[tuple[Notice, ...]](tuple[Notice, ...])


@dataclass(frozen=True)
class Kept:
    """Where parsed rows and pictures are kept."""

    folder: Path
    keep: bool
    """Whether rows may be. Pictures always are: a run names them and reads them again."""
    progress: ProgressFn

    def copy_of(self, key: str) -> Path | None:
        """The file of the rows of something."""
        return self.folder / "parsed" / f"{key}-{PARSER}.parquet" if self.keep else None

    def has(self, frame: pd.DataFrame, columns: Sequence[str]) -> bool:
        """Whether the pictures that parsed rows name are there."""
        pictures = Pictures(self.folder / "pictures")
        return all(pictures.has(one) for column in columns for one in frame[column])

    def reading(self) -> Reading:
        """A reading of pictures."""
        return Reading(Pictures(self.folder / "pictures"), self.progress)


def read_copy(copy: Path | None) -> tuple[pd.DataFrame, tuple[Notice, ...]] | None:
    """The rows of a file that was parsed before, cell by cell as the parser left them."""
    if copy is None or not copy.exists():
        return None
    try:
        table = pq.read_table(copy)
        columns = {
            name: pd.Series(list(map(_decoded, cells.to_pylist())), dtype=object)
            for name, cells in zip(table.column_names, table.columns, strict=True)
        }
        notices = _NOTICES.validate_json((table.schema.metadata or {})[b"notices"])
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None  # cut on its way to the disk: parsed again
    return pd.DataFrame(columns), notices


def write_copy(frame: pd.DataFrame, notices: Sequence[Notice], copy: Path | None) -> None:
    """Keep parsed rows. Where the disk does not take them, the file is parsed the next time."""
    if copy is None:
        return
    with suppress(OSError, RecursionError, TypeError, pa.ArrowException):
        cells = {
            name: pa.array(list(map(_encoded, frame[name].tolist())), pa.large_string())
            for name in frame.columns
        }
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as part:
            said = {"notices": _NOTICES.dump_json(tuple(notices))}
            pq.write_table(pa.table(cells).replace_schema_metadata(said), part)


def _encoded(cell: Any) -> str | None:
    """A cell as text. A string stays as it is behind a mark. Anything else becomes JSON.

    Parquet columns have one type, cells of JSON files have many, and 1, 1.0, true and "1" differ.
    """
    if cell is None or (isinstance(cell, str) and cell.isprintable() and cell[:1] != _MARK):
        return cell
    return _MARK + json.dumps(cell)


def _decoded(text: str | None) -> Any:
    return json.loads(text[1:]) if text is not None and text[:1] == _MARK else text


_MARK = "\x1f"
"""Begins a cell that is JSON. No text that is kept as it stands begins so."""
