"""The chip alone: kilobytes that name the backbone they read, and how they read it again.

What the template and the length limit made of the tokenizer stands in `head.json`: the steps that
differ from the backbone's own tokenizer, and a checksum of the whole.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from tokenizers import Tokenizer

from chipviz.bundle.metadata import Metadata
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec, Preset
from chipviz.errors import BundleError
from chipviz.files import read_small_json
from chipviz.results.report import TaskInfo

FILE, WEIGHTS = "head.json", "head.safetensors"
FORMAT = 1
_STEPS = ("normalizer", "post_processor")
"""Steps of a tokenizer that the prompt changes."""
_SETTINGS = ("pad_token", "split_special_tokens", "model_input_names", "truncation_side")


@dataclass(frozen=True)
class HeadInfo:
    """The `head.json` of a chip alone, read and checked."""

    cut: CutSpec
    task: TaskInfo
    preset: Preset
    backbone: dict[str, Any]
    prompt: dict[str, Any]


def write_head(chip: Chip, tokenizer: Any, metadata: Metadata, folder: Path) -> None:
    """Write a chip alone.

    Args:
        chip: One chip, that reads one vector of one layer.
        tokenizer: Of its bundle.
        metadata: Of its bundle.
        folder: Where to.
    """
    folder.mkdir(exist_ok=True)
    tensors = {name: value.contiguous() for name, value in chip.tensors().items()}
    save_file(tensors, folder / WEIGHTS)
    steps = json.loads(tokenizer.backend_tokenizer.to_str())
    backbone = metadata.everything["backbone"]
    said = {
        "format": FORMAT,
        "cut": metadata.cut.model_dump(),
        "labels": metadata.task.label_names,
        "preset": metadata.preset,
        "task": metadata.task.model_dump(),
        "backbone": {
            name: backbone.get(name)
            for name in ("name", "revision", "fingerprint", "n_layers", "blocks")
        },
        "prompt": {
            "steps": {name: steps[name] for name in _STEPS},
            "settings": {name: getattr(tokenizer, name, None) for name in _SETTINGS},
            "sha256": _digest(steps),
        },
    }
    (folder / FILE).write_text(json.dumps(said, indent=2, ensure_ascii=False), "utf-8")


def read_head(path: Path) -> HeadInfo:
    """The `head.json` of a folder.

    Raises:
        BundleError: If the folder holds no chip alone.
    """
    try:
        found = read_small_json(path / FILE)
        if found["format"] != FORMAT or found["preset"] not in get_args(Preset):
            raise ValueError("unknown format")
        cut, task = CutSpec.model_validate(found["cut"]), TaskInfo.model_validate(found["task"])
        prompt, backbone = found["prompt"], found["backbone"]
        if not isinstance(backbone["fingerprint"], str) or not isinstance(prompt["sha256"], str):
            raise TypeError("checksums are text")
        return HeadInfo(cut, task, found["preset"], backbone, prompt)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(
            f"{path} holds no chip alone.", "Give a folder of `chipviz export --to head`."
        ) from None


def with_prompt(tokenizer: Any, prompt: dict[str, Any]) -> Any:
    """The tokenizer with the steps of a prompt.

    Raises:
        BundleError: If it does not become the one that the chip was fitted with.
    """
    steps = json.loads(tokenizer.backend_tokenizer.to_str())
    steps |= {name: prompt["steps"][name] for name in _STEPS}
    if _digest(steps) != prompt["sha256"]:
        raise BundleError(
            "The tokenizer beside this backbone is another one than the chip was fitted with.",
            "Give the backbone as it was then.",
        )
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(steps))
    for name in _SETTINGS:
        value = prompt["settings"].get(name)
        if value is not None:
            setattr(tokenizer, name, value)
    return tokenizer


def _digest(steps: dict[str, Any]) -> str:
    """A checksum of a tokenizer, but for what its last call left in it."""
    lasting = {name: v for name, v in steps.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()
