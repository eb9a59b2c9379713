"""Rows with their predictions as bytes that can be appended: lines of JSON, CSV, or for Parquet.

A Parquet file ends in a table of its contents, so it cannot grow. What grows is a row of Arrow
streams, one a chunk; they become the Parquet file when all rows are there.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from chipviz.errors import TaskError
from chipviz.files import replacing
from chipviz.results.answers import Prediction

Form = Literal["csv", "parquet", "jsonl"]


Said = dict[str, Prediction]
"""What each task says of one row. A task alone has no name."""


def columns_of(said: Said, *, probabilities: bool, flat: bool) -> dict[str, Any]:
    """What is written of a row: label and score of every task.

    Args:
        said: By task.
        probabilities: Whether every class gets its own.
        flat: Whether each of them is a column, as cells are.
    """
    line: dict[str, Any] = {}
    for task, one in said.items():
        prefix = f"{task}_" if task else ""
        line |= {f"{prefix}label": one.label, f"{prefix}score": one.score}
        if one.layer is not None:
            line[f"{prefix}layer"] = one.layer
        if probabilities and flat:
            line |= {f"{prefix}p({name})": share for name, share in one.probabilities.items()}
        elif probabilities:
            line[f"{prefix}probabilities"] = one.probabilities
    return line


def form_of(path: Path) -> Form:
    """How a file is written: by its ending, lines of JSON if that says nothing."""
    endings: dict[str, Form] = {".csv": "csv", ".parquet": "parquet"}
    return endings.get(path.suffix.lower(), "jsonl")


def in_bytes(
    form: Form,
    rows: pd.DataFrame,
    found: list[dict[str, Any]],
    names: Mapping[str, str],
    *,
    header: bool,
) -> bytes:
    """Some rows, each with its prediction.

    Args:
        form: How.
        rows: With all their columns.
        found: New cells of each row.
        names: What these are called.
        header: Whether the names of the columns come first, in CSV.

    Raises:
        TaskError: If the form has no place for a cell.
    """
    if form == "parquet":
        return _as_stream(rows, found, names)
    text = io.StringIO(newline="")
    columns = list(map(str, rows.columns))
    if form == "csv":
        writer = csv.writer(text, lineterminator="\n")
        if header:
            writer.writerow([*columns, *names.values()])
        for cells, said in zip(_cells(rows), found, strict=True):
            writer.writerow([*map(_as_cell, cells), *said.values()])
    else:
        for cells, said in zip(_cells(rows), found, strict=True):
            line = dict(zip(columns, cells, strict=True))
            line |= {names[name]: value for name, value in said.items()}
            text.write(json.dumps(line, ensure_ascii=False, default=_as_json) + "\n")
    return text.getvalue().encode("utf-8", "surrogatepass")


def _as_stream(rows: pd.DataFrame, found: list[dict[str, Any]], names: Mapping[str, str]) -> bytes:
    new = {called: [said[name] for said in found] for name, called in names.items()}
    whole = pd.concat([rows.reset_index(drop=True), pd.DataFrame(new)], axis=1)
    whole.columns = [*map(str, rows.columns), *new]
    with _as_refusal():
        table = pa.Table.from_pandas(whole, preserve_index=False).replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def types_of(data: bytes, before: pa.Schema | None) -> pa.Schema:
    """The types of the columns of an Arrow stream and of those before it, together.

    Raises:
        TaskError: If a column has several. Asked of every chunk, so that nobody waits for the last.
    """
    with _as_refusal():
        now = pa.ipc.open_stream(data).schema
        return pa.unify_schemas([before or now, now], promote_options="permissive")


def to_parquet(part: Path, out: Path) -> None:
    """Make the Parquet file of a row of Arrow streams, one after the other.

    Args:
        part: The streams.
        out: The file.

    Raises:
        TaskError: If a column changes its type on the way.
    """
    with _as_refusal(), replacing(out) as whole:
        schema = pa.unify_schemas(
            [table.schema for table in _streams(part)], promote_options="permissive"
        )
        with pq.ParquetWriter(whole, schema) as writer:
            for table in _streams(part):
                writer.write_table(table.cast(schema))
    part.unlink()


def _streams(part: Path) -> Iterator[pa.Table]:
    n_bytes = part.stat().st_size
    with part.open("rb") as file:
        while file.tell() < n_bytes:
            yield pa.ipc.open_stream(file).read_all()


@contextmanager
def _as_refusal() -> Iterator[None]:
    """Say in a sentence what has no place in a column of one type."""
    try:
        yield
    except pa.ArrowException as error:
        said = " ".join(str(error).split())[:160]
        raise TaskError(
            f"A column has cells of several types, which Parquet has no place for: {said}",
            "Write lines of JSON (--out NAME.jsonl).",
        ) from None


def _cells(rows: pd.DataFrame) -> Iterator[list[Any]]:
    """Cells of each row, None where there is none."""
    columns = [rows.iloc[:, i].tolist() for i in range(rows.shape[1])]
    for row in zip(*columns, strict=True):
        yield [None if (isinstance(c, float) and np.isnan(c)) or c is pd.NaT else c for c in row]


def _as_cell(value: Any) -> Any:
    """A cell of a CSV file."""
    return value if value is None or isinstance(value, str | int | float) else _as_text(value)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_as_json)


def _as_json(value: Any) -> Any:
    """What JSON has no place for: numbers and lists of libraries, and dates."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        raise TaskError("A column holds bytes, which no text file holds.", "Leave that column out.")
    return str(value)
