"""What a model folder may hold, looked at before any library opens it.

Reads JSON and the headers of weight files. Runs nothing and loads no weight. Folders come from
strangers: `transformers` may be asked by a config alone to fetch and run attention kernels, and a
list of weight files may name a pickled one.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from chipviz.errors import BackboneError
from chipviz.files import MAX_SETTINGS, parse_json, read_small_json

SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""How every file is loaded in chipviz: nothing in a model folder may run, nothing is fetched."""
FOREIGN = (
    *(OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError),
    *(ImportError, ArithmeticError, AssertionError, struct.error, SafetensorError),
    StrictDataclassError,
)
"""What libraries raise for files and settings that are not as they expect."""

MAX_HEADER = 16 << 20
"""Bytes of a list or header of weights: published ones have a few MiB."""
MAX_WORDS = 128 << 20
"""Bytes of any other file beside the weights. The largest tokenizers have 60 MiB."""
MAX_LAYERS = 1_000
MAX_COUNT = 10_000
"""Maximum of any other number of parts in a configuration, if no weight is wider."""
MAX_MISSING = 1_000_000
"""Parameters that a configuration may describe beyond twice what the weights hold."""
INDEX = "model.safetensors.index.json"
ATTENTION = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
"""Attention that comes with torch or an installed package. Any other name means a kernel that is
fetched from the Hub and run."""


@dataclass(frozen=True)
class Weights:
    """What the headers of a folder's weight files say."""

    files: tuple[Path, ...]
    n_stored: int
    """Numbers in all of them."""

    def refuse_larger(self, name: str, n_described: int) -> None:
        """Refuse a model that is far larger than these weights, before memory is taken for it.

        Args:
            name: What the user calls it.
            n_described: Parameters of the model that its configuration describes. What the weights
                lack would be filled with random numbers.

        Raises:
            BackboneError: If that is more than twice what there is.
        """
        if n_described > 2 * self.n_stored + MAX_MISSING:
            raise BackboneError(
                f"The config of {name} describes {n_described:,} parameters, and its weights are "
                f"{self.n_stored:,}.",
                "Its files do not belong together; download or save the model again.",
            )


def vet(folder: Path) -> Weights:
    """Check a model folder's configuration and weight files.

    Raises:
        BackboneError: If the configuration is malformed or asks to run code, or the weights are not
            well-formed safetensors.
    """
    _refuse_large_files(folder)
    config = read_json(folder / "config.json")
    for key, value in _settings(config):
        _refuse_setting(folder.name, key, value)
    files = _weight_files(folder)
    shapes = [shape for file in files for shape in vet_weights(file)]
    widest = max((width for shape in shapes for width in shape), default=0)
    for key, value in _settings(config):
        _refuse_count(folder.name, key, value, max(MAX_COUNT, widest))
    return Weights(tuple(files), sum(map(math.prod, shapes)))


def _refuse_large_files(folder: Path) -> None:
    """Refuse files that no model has, by their size alone."""
    for file in folder.iterdir():
        most = MAX_HEADER if file.name == INDEX else MAX_WORDS
        if file.suffix in (".json", ".txt", ".model", ".md") and file.stat().st_size > most:
            raise BackboneError(
                f"{folder.name}/{file.name} has {file.stat().st_size:,} bytes; at most {most:,} "
                "are read.",
                "Download or save the model again.",
            )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object of a model folder.

    Raises:
        BackboneError: If there is no such file, or it holds anything else.
    """
    where = f"{path.parent.name}/{path.name}"
    if not path.is_file():  # never open a pipe or a device
        raise BackboneError(f"{where} is missing or no file.", "Give a complete model folder.")
    try:
        found = read_small_json(path, MAX_HEADER if path.name == INDEX else MAX_SETTINGS)
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BackboneError(f"{where} holds no JSON object.", "Download or save the model again.")
    return found


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, those of nested configurations too."""
    stack: list[Any] = [config]
    while stack:
        here = stack.pop()
        if isinstance(here, dict):
            yield from here.items()
            stack += here.values()
        elif isinstance(here, list):
            stack += here


def _refuse_setting(name: str, key: str, value: Any) -> None:
    if "attn_implementation" in key or "experts_implementation" in key:
        asked = value.values() if isinstance(value, dict) else [value]
        if any(not isinstance(a, (str, type(None))) or a not in ATTENTION for a in asked):
            raise BackboneError(
                f"The config of {name} asks for foreign code: {key} is {str(value)[:60]!r}.",
                f"Remove {key} from config.json if you trust the rest.",
            )
    if key == "quantization_config" and value:
        method = value.get("quant_method") if isinstance(value, dict) else None
        raise BackboneError(
            f"{name} is quantised ({str(method)[:20]}), and such weights cannot be cut.",
            "Give the model in bfloat16 or float16, or as a GGUF file.",
        )
    if key == "num_hidden_layers" and not (isinstance(value, int) and 0 < value <= MAX_LAYERS):
        raise BackboneError(
            f"The config of {name} says {str(value)[:20]} layers; 1 to {MAX_LAYERS} are possible.",
            "Download or save the model again.",
        )


_COUNT = re.compile(r"(num|n)_(\w+_)?(layers?|blocks|heads?|experts|groups|labels)")


def _refuse_count(name: str, key: str, value: Any, most: int) -> None:
    """Refuse more layers, heads, experts or classes than any weight is wide.

    A model is made of as many parts in memory before any weight is looked for.
    """
    if _COUNT.fullmatch(key) and isinstance(value, (int, float)) and value > most:
        raise BackboneError(
            f"The config of {name} says {key} {str(value)[:20]}, and no weight of it is wider than "
            f"{most:,}.",
            "Its files do not belong together; download or save the model again.",
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make the model.

    Raises:
        BackboneError: If there are none, or the list of them names anything else.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        pickled = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".bin", ".pt", ".pth")]
        held = f", only {pickled[0]}, which could run code" if pickled else ""
        raise BackboneError(
            f"{folder.name} holds no model.safetensors{held}.",
            "Save the model again with save_pretrained, which writes safetensors.",
        )
    listed = read_json(folder / INDEX).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) and _all_text(listed) else set()
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BackboneError(
                f"{folder.name} lists {name[:80]!r} among its weights, which is no safetensors "
                "file beside it.",
                "Download or save the model again.",
            )
        if not (folder / name).is_file():
            raise BackboneError(
                f"{folder.name} lacks its weight file {name[:80]}.",
                "Download the rest of it, or save the model again.",
            )
    if not names:
        raise BackboneError(f"{folder.name} lists no weights.", "Save the model again.")
    return [folder / name for name in sorted(names)]


def _all_text(listed: dict[str, Any]) -> bool:
    return all(isinstance(name, str) for name in listed.values())


def vet_weights(file: Path) -> list[tuple[int, ...]]:
    """Check that a safetensors file is whole and means one thing only. Reads no weight.

    The library checks offsets, sizes, dtypes, holes and overlaps. It takes a name that is given
    twice, keeping the last, and reads a header of 100 MB.

    Returns:
        The shape of each tensor.

    Raises:
        BackboneError: If it is not.
    """
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > min(MAX_HEADER, file.stat().st_size - 8):
                raise ValueError("its header is larger than the file or than any model's")
            parse_json(handle.read(size))
        with safe_open(file, framework="numpy") as weights:
            names = weights.keys()
            return [tuple(weights.get_slice(name).get_shape()) for name in names]
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise BackboneError(
            f"{file.parent.name}/{file.name} is no well-formed safetensors file: "
            f"{' '.join(str(error).split())[:120]}.",
            "The file was altered or cut on its way; download or save the model again.",
        ) from None


def licence_of(folder: Path) -> str | None:
    """What the model card beside the weights says of its licence, if there is one."""
    import yaml
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    try:
        if not card.is_file() or card.stat().st_size > MAX_SETTINGS:
            return None
        found = ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = cast(Any, found).license
    named = getattr(found, "license_name", None)
    said = named if licence == "other" and named else licence
    return said[:80] if isinstance(said, str) else None
