"""Tables whose rows have a picture: class folders, zips of them, Parquet columns, columns of paths.

What cannot be read is left out and named. One picture is in memory at a time.
"""

import json
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from chipviz.data.hub import SPLIT_NAMES
from chipviz.data.pictures import ENDINGS, MAX_BYTES, Pictures, UnreadableError
from chipviz.errors import Notice, SourceError
from chipviz.progress import Progress, ProgressFn

IMAGE, LABEL, SPLIT = "image", "label", "split"
"""Columns of a table that is made of folders."""
MOST_FILES = 1_000_000
"""Maximum entries of a zip."""
RATIO = 200
"""Maximum bytes of pictures per byte of their zip. Pictures hardly shrink; plain bitmaps do."""
N_EXAMPLES = 5
BATCH_ROWS = 64
"""Rows of a Parquet file in memory at a time."""
_CLUTTER = re.compile(r"(^|/)(\.|__MACOSX(/|$)|Thumbs\.db$|desktop\.ini$)")
"""What systems leave beside files. Nobody means it."""


@dataclass
class Reading:
    """References of pictures, and what is to be said of how they were read."""

    pictures: Pictures
    progress: ProgressFn
    n_read: int = 0
    lost: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Files that are no pictures by their name."""
    done: dict[str, int] = field(default_factory=dict)

    def take(self, name: str, data: Callable[[], bytes]) -> str | None:
        """The reference of a picture. None of one that cannot be read, which is noted."""
        self.n_read += 1
        if self.n_read % 50 == 0:
            self.progress(Progress("loading", f"reading pictures: {self.n_read:,}"))
        try:
            reference, done = self.pictures.add(data())
        except UnreadableError as error:
            self.lost.append(f"{name} {error.why}")
            return None
        except OSError as error:
            self.lost.append(f"{name} cannot be opened ({error.strerror})")
            return None
        for what in done:
            self.done[what] = self.done.get(what, 0) + 1
        return reference

    @property
    def notices(self) -> list[Notice]:
        """All of it."""
        said = [
            ("pictures-unreadable", "Left out, for they cannot be read", "pictures", self.lost),
            ("no-pictures", "Left out, for their names are of no pictures", "files", self.others),
        ]
        found = [
            Notice(code, f"{why}: {len(names):,} {what}.", len(names), tuple(names[:N_EXAMPLES]))
            for code, why, what, names in said
            if names
        ]
        meant = {
            "animated": "Read by their first frame, for they move",
            "transparent": "Read with white behind them, for they are transparent in part",
        }
        return found + [
            Notice(f"pictures-{what}", f"{meant[what]}: {n:,} pictures.", n)
            for what, n in self.done.items()
        ]


# --- class folders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One file below a folder or in a zip."""

    place: PurePosixPath
    size: int
    changed: str
    data: Callable[[], bytes]


def holds_pictures(folder: Path) -> bool:
    """Whether a folder has folders that hold pictures."""
    below = (entry for entry in sorted(folder.iterdir()) if entry.is_dir())
    return any(
        file.suffix.lower() in ENDINGS
        for entry in below
        if not _CLUTTER.search(entry.name)
        for file in entry.rglob("*")
    )


def files_below(folder: Path) -> list[File]:
    """Every file below a folder that is not clutter. Links that lead out of it are not followed."""
    root = folder.resolve()
    found = []
    for path in sorted(folder.rglob("*")):
        place = PurePosixPath(path.relative_to(folder).as_posix())
        if _CLUTTER.search(str(place)) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            continue
        about = path.stat()
        found.append(File(place, about.st_size, str(about.st_mtime_ns), path.read_bytes))
    return found


def files_in(archive: zipfile.ZipFile, n_bytes: int) -> list[File]:
    """Every file of a zip that is not clutter.

    Args:
        archive: The open zip.
        n_bytes: Of its file.

    Raises:
        SourceError: Naming an entry that no zip of pictures has.
    """
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if len(entries) > MOST_FILES:
        raise SourceError(f"The zip has {len(entries):,} entries.", f"At most {MOST_FILES:,}.")
    claimed = sum(entry.file_size for entry in entries)
    if claimed > RATIO * n_bytes:
        raise SourceError(
            f"The zip has {n_bytes:,} bytes and unpacks to {claimed:,}.",
            "No pictures shrink so much; give the folder itself if they do.",
        )
    seen: set[str] = set()
    for entry in entries:
        if (why := _what_is_wrong(entry)) or entry.filename in seen:
            raise SourceError(
                f"The entry {entry.filename[:80]!r} of the zip {why or 'is there twice'}.",
                "Zip the folder of class folders anew.",
            )
        seen.add(entry.filename)
    return [
        File(PurePosixPath(e.filename), e.file_size, str(e.CRC), _reader(archive, e))
        for e in entries
        if not _CLUTTER.search(e.filename)
    ]


def _what_is_wrong(entry: zipfile.ZipInfo) -> str | None:
    name = entry.filename
    if name.startswith(("/", "\\")) or "\\" in name or ":" in name or ".." in name.split("/"):
        return "leads out of its folder"
    if entry.flag_bits & 1:
        return "is encrypted"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    return None


def _reader(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Callable[[], bytes]:
    def data() -> bytes:
        try:
            with archive.open(entry) as file:
                return file.read(MAX_BYTES + 1)  # whatever the entry claims
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            said = " ".join(str(error).split())[:80]
            raise UnreadableError(f"cannot be unpacked ({said})") from None

    return data


def read_files(files: Sequence[File], reading: Reading) -> pd.DataFrame:
    """A row for each picture: its reference, its class, and its split if folders name splits.

    Raises:
        SourceError: If a picture stands in no class folder, or none is there.
    """
    own = [file for file in files if file.place.suffix.lower() in ENDINGS]
    reading.others += [str(f.place) for f in files if f.place.suffix.lower() not in ENDINGS]
    placed = _without_wrapper([file.place.parts for file in own])
    splits = bool(placed) and all(
        len(parts) > 2 and parts[0].lower() in SPLIT_NAMES for parts in placed
    )
    rows: list[tuple[str, str, str]] = []
    for file, parts in zip(own, placed, strict=True):
        below = parts[1:] if splits else parts
        if len(below) < 2:
            raise SourceError(
                f"The picture {str(file.place)[:80]!r} stands in no class folder.",
                "Make one folder for each class, and if you like train, validation and test above.",
            )
        reference = reading.take(str(file.place), file.data)
        if reference is not None:
            rows.append((reference, below[0], SPLIT_NAMES[parts[0].lower()] if splits else ""))
    if not rows:
        why = f"; {reading.lost[0]}" if reading.lost else ""
        raise SourceError(
            f"No picture can be read{why}.",
            f"Give {', '.join(ENDINGS[:3])} files in class folders.",
        )
    frame = pd.DataFrame(rows, columns=[IMAGE, LABEL, SPLIT], dtype=object)
    return frame if splits else frame.drop(columns=SPLIT)


def _without_wrapper(places: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Places without a folder around all of them, as zips often have one."""
    while places and len({p[0] for p in places}) == 1 and all(len(p) > 2 for p in places):
        places = [place[1:] for place in places]
    return places


# --- columns --------------------------------------------------------------------------------------


def picture_columns(path: Path) -> list[str]:
    """Columns of a Parquet file that hold pictures, as `datasets` writes them or as bytes."""
    schema = pq.read_schema(path)
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or _is_large_binary(f.type)]
    structs = [
        f.name
        for f in schema
        if pa.types.is_struct(f.type)
        and {"bytes"} <= {f.type.field(i).name for i in range(f.type.num_fields)}
    ]
    if not binary and not structs:
        return []
    declared = _declared_images(schema)
    found = [name for name in (*binary, *structs) if name in declared]
    return found or [name for name in (*structs, *binary) if _begins_as_picture(path, name)]


def _is_large_binary(kind: pa.DataType) -> bool:
    return pa.types.is_large_binary(kind)


def _declared_images(schema: pa.Schema) -> set[str]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name for name, one in features.items() if one.get("_type") == "Image"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")


def _begins_as_picture(path: Path, column: str) -> bool:
    """Whether the first cell of a column that is not empty holds the bytes of a picture."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
            for cell in batch.column(0):
                data = _bytes_of(cell.as_py())
                if data:
                    return data.startswith(_MAGIC)
    return False


def _bytes_of(cell: Any) -> bytes | None:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None


def read_parquet_pictures(path: Path, columns: Sequence[str], reading: Reading) -> pd.DataFrame:
    """The rows of a Parquet file, references in place of pictures.

    Raises:
        SourceError: If no picture can be read.
    """
    frames: list[pd.DataFrame] = []
    at = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            rest = [name for name in batch.schema.names if name not in columns]
            frame = batch.select(rest).to_pandas()
            keep = [True] * len(batch)
            for column in columns:
                cells = (cell.as_py() for cell in batch.column(batch.schema.names.index(column)))
                taken = [
                    reading.take(f"row {at + i + 1}", _given(cell)) for i, cell in enumerate(cells)
                ]
                frame[column] = pd.Series(taken, dtype=object, index=range(len(batch)))
                keep = [a and b is not None for a, b in zip(keep, taken, strict=True)]
            frames.append(frame[keep])
            at += len(batch)
    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return _some(whole, reading)


def _given(cell: Any) -> Callable[[], bytes]:
    def data() -> bytes:
        found = _bytes_of(cell)
        if found is None:
            raise UnreadableError("has no bytes")
        return found

    return data


def path_column(frame: pd.DataFrame, folder: Path) -> str | None:
    """The column of a table that names pictures beside its file, if there is one."""
    for column in frame.columns:
        some = frame[column].dropna().head(20).tolist()
        if not some or not all(isinstance(value, str) for value in some):
            continue
        if all(value.lower().endswith(ENDINGS) and "://" not in value for value in some) and any(
            _inside(folder, value) is not None for value in some
        ):
            return str(column)
    return None


def with_pictures(frame: pd.DataFrame, column: str, folder: Path, reading: Reading) -> pd.DataFrame:
    """A table with references in place of the paths of a column.

    Raises:
        SourceError: If no picture can be read.
    """

    def data(value: Any) -> Callable[[], bytes]:
        def found() -> bytes:
            path = _inside(folder, value) if isinstance(value, str) else None
            if path is None:
                raise UnreadableError("names no file below the table's folder")
            return path.read_bytes()

        return found

    values = frame[column].tolist()
    taken = [reading.take(f"row {i + 1} ({str(v)[:60]})", data(v)) for i, v in enumerate(values)]
    found = frame.assign(**{column: pd.Series(taken, dtype=object, index=frame.index)})
    there = [i for i, one in enumerate(taken) if one is not None]
    return _some(found.iloc[there].reset_index(drop=True), reading)


def _inside(folder: Path, value: str) -> Path | None:
    """The file of a relative path, if it lies below the folder."""
    try:
        path = (folder / value).resolve()
        inside = not Path(value).is_absolute() and path.is_relative_to(folder.resolve())
        return path if inside and path.is_file() else None
    except (OSError, ValueError):
        return None


def _some(frame: pd.DataFrame, reading: Reading) -> pd.DataFrame:
    if frame.empty:
        why = f"; {reading.lost[0]}" if reading.lost else ""
        raise SourceError(f"No picture can be read{why}.", "Give PNG or JPEG files.")
    return frame


def by_split(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The frames of a table whose folders name splits.

    Raises:
        SourceError: If none is named train.
    """
    if SPLIT not in frame.columns:
        return {"all": frame}
    frames = {
        str(name): rows.drop(columns=SPLIT).reset_index(drop=True)
        for name, rows in frame.groupby(SPLIT, sort=False)
    }
    if "train" not in frames:
        raise SourceError(
            f"There are folders {' and '.join(frames)}, and none is named train.",
            "Put the training pictures into train.",
        )
    return frames


def names_of(files: Iterable[File]) -> Iterator[bytes]:
    """What changes when a file below a folder does."""
    for file in files:
        yield f"{file.place}\0{file.size}\0{file.changed}\n".encode("utf-8", "surrogateescape")
