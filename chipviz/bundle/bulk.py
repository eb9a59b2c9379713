"""Predictions of a whole table, written beside its columns as they come. Goes on after a stop."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from chipviz.bundle.fields import fields_of
from chipviz.bundle.rows_out import (
    Form,
    Said,
    columns_of,
    form_of,
    in_bytes,
    to_parquet,
    types_of,
)
from chipviz.data.streaming import FIRST, stream_rows
from chipviz.errors import TaskError
from chipviz.files import read_small_json, write_atomic
from chipviz.progress import Meter, ProgressFn, silent

CHUNK = 1_000
"""Rows that are classified and written at a time."""
Answer = Callable[[pd.DataFrame], list[Said]]


@dataclass(frozen=True)
class Wanted:
    """What is written of each row."""

    out: Path
    """JSON lines, or CSV or Parquet by its ending."""
    probabilities: bool
    """Whether every class gets its own."""
    source: str
    """What is asked about, and of what: another one is no continuation."""

    @property
    def form(self) -> Form:
        """How it is written."""
        return form_of(self.out)

    @property
    def is_table(self) -> bool:
        """Whether all rows have the same columns."""
        return self.form != "jsonl"

    @property
    def asked(self) -> list[Any]:
        """What another call must have been asked to be gone on with."""
        return [self.source, self.probabilities]

    @property
    def part(self) -> Path:
        """The file while it grows."""
        return self.out.with_name(f".{self.out.name}.part")

    @property
    def note(self) -> Path:
        """How far it has grown."""
        return self.out.with_name(f".{self.out.name}.part.json")


@dataclass(frozen=True)
class Written:
    """How far a table is classified."""

    n_rows: int
    n_before: int
    """Rows that an earlier call had written."""
    finished: bool


def source_mark(file: Path, bundle: Path) -> str:
    """What changes when the table or the bundle does."""
    facts = [file.resolve(), *(one.stat() for one in (file, bundle))]
    sums = bundle / "SHA256SUMS"
    if sums.is_file():
        facts.append(hashlib.sha256(sums.read_bytes()).hexdigest())
    shown = [f"{f.st_size} {f.st_mtime_ns}" if isinstance(f, os.stat_result) else f for f in facts]
    return hashlib.sha256(" ".join(map(str, shown)).encode()).hexdigest()


def predict_table(
    chunks: Iterable[pd.DataFrame],
    answer: Answer,
    wanted: Wanted,
    progress: ProgressFn,
    n_rows: int = 0,
    most: int | None = None,
) -> Written:
    """Classify all rows of a table and write them with all their columns, in order.

    Args:
        chunks: The table.
        answer: Predictions of a chunk.
        wanted: What is written.
        progress: Told the rows.
        n_rows: Rows of the table, if it is known.
        most: Break off after so many rows, for the next call to go on. None ends it.

    Raises:
        ChipvizError: If a row cannot be read. What was written before is kept for the next call.
    """
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    n_before, n_bytes, columns, names = _earlier(wanted)
    meter = Meter("extracting", n_rows, progress)
    meter.skip(n_before)
    n_done, types = 0, None
    with wanted.part.open("r+b" if n_before else "wb") as file:
        file.truncate(n_bytes)
        file.seek(n_bytes)
        for chunk in chunks:
            whole = len(chunk)
            if n_done + whole <= n_before:
                n_done += whole
                continue
            rows = chunk.iloc[max(0, n_before - n_done) :]
            rows.attrs[FIRST] = n_done + whole - len(rows)
            found = [
                columns_of(said, probabilities=wanted.probabilities, flat=wanted.is_table)
                for said in answer(rows)
            ]
            if names is None:
                columns = list(map(str, rows.columns))
                names = _names(columns, found[0])
            rows = _with_columns(rows, columns, wanted, names)
            data = in_bytes(wanted.form, rows, found, names, header=file.tell() == 0)
            if wanted.form == "parquet":
                types = types_of(data, types)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            n_done += whole
            said = {"rows": n_done, "bytes": file.tell(), "columns": columns, "names": names}
            write_atomic(wanted.note, json.dumps(said | {"asked": wanted.asked}))
            meter.advance(len(rows), f"{n_done:,} rows classified")
            if most is not None and n_done - n_before >= most:
                return Written(n_done, min(n_before, n_done), finished=False)
    if wanted.form == "parquet" and names is not None:
        to_parquet(wanted.part, wanted.out)
    else:
        wanted.part.replace(wanted.out)
    wanted.note.unlink(missing_ok=True)
    return Written(n_done, min(n_before, n_done), finished=True)


def beside(file: Path, mark: str) -> Path:
    """Where the answers to a table are written, in its own form.

    Args:
        file: The table.
        mark: All that the answers depend on.
    """
    kind = ".csv" if file.suffix == ".tsv" else file.suffix
    short = hashlib.sha256(mark.encode()).hexdigest()[:12]
    return file.with_name(f"{file.stem[:40]}-predicted-{short}{kind}")


def predict_beside(file: Path, model: Any, wanted: Wanted, most: int) -> Written:
    """Classify the next rows of a table by a bundle. What is finished is left as it is.

    Args:
        file: The table.
        model: The loaded bundle, of one task.
        wanted: What is written.
        most: Rows of a part.

    Raises:
        ChipvizError: If a row cannot be read.
    """

    def answer(rows: pd.DataFrame) -> list[Said]:
        fields = fields_of(rows, model.metadata.task, model.metadata.preset)
        return [{"": said} for said in model.predict(*fields)]

    if wanted.out.exists():
        return Written(0, 0, finished=True)
    return predict_table(stream_rows(file, most), answer, wanted, silent, most=most)


def _earlier(wanted: Wanted) -> tuple[int, int, list[str], dict[str, str] | None]:
    """Rows, bytes and columns that an earlier call wrote, if it was asked the same."""
    try:
        said = read_small_json(wanted.note)
        fits = said["asked"] == wanted.asked and said["bytes"] <= wanted.part.stat().st_size
        if fits:
            return said["rows"], said["bytes"], said["columns"], said["names"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, 0, [], None


def _with_columns(
    rows: pd.DataFrame, columns: list[str], wanted: Wanted, names: dict[str, str]
) -> pd.DataFrame:
    """Rows as the first ones set the columns. Lines of JSON may name others.

    Raises:
        TaskError: If a column has no place, or has the name of one of ours.
    """
    new = [name for name in map(str, rows.columns) if name not in columns]
    taken = [name for name in new if name in names.values()]
    if (wanted.is_table and new) or taken:
        name = (taken or new)[0]
        raise TaskError(
            f"Row {rows.attrs[FIRST] + 1} or one soon after it has a column {name[:60]!r} that the "
            "first rows lack.",
            "Give every row the same columns"
            + ("." if taken else ", or write JSON lines (--out NAME.jsonl)."),
        )
    return rows.reindex(columns=columns) if wanted.is_table else rows


def _names(columns: list[str], said: dict[str, Any]) -> dict[str, str]:
    """What the new columns are called: never as one that is there."""
    names: dict[str, str] = {}
    for name in said:
        free = name
        while free in columns:
            free = f"predicted_{free}"
        names[name] = free
    return names
