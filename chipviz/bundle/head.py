"""The chip alone: kilobytes that name the backbone they read, and how they read it again.

What the template and the length limit made of the tokenizer stands in `head.json`: the steps that
differ from the backbone's own tokenizer, and a checksum of the whole.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from chipviz.backbones.backbone import Backbone, load_backbone
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.find import find_model
from chipviz.backbones.structure import refuse_unknown_token
from chipviz.backbones.vetting import FOREIGN
from chipviz.bundle.metadata import Metadata
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec, Preset
from chipviz.data.prompt import encode, load_tokenizer, segment_break
from chipviz.data.task import check_fields
from chipviz.errors import BundleError
from chipviz.features.forward import forward_pooled
from chipviz.files import read_small_json
from chipviz.progress import ProgressFn
from chipviz.results.answers import Prediction
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


@dataclass(frozen=True)
class Head:
    """A chip and the whole backbone that it reads."""

    info: HeadInfo
    backbone: Backbone
    tokenizer: Any
    chip: Chip

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Classify raw texts, as the bundle of this chip does.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
            BackboneError: If the tokenizer has more tokens than the model.
        """
        task, vector = self.info.task, self.info.cut.key.vector
        if not texts:
            return []
        check_fields("{text_pair}" in task.template, texts, pairs)
        ids = encode(self.tokenizer, texts, pairs)["input_ids"]
        refuse_unknown_token(max(map(max, ids)), self.backbone.model, self.backbone.name)
        names, found = dict(enumerate(task.label_names)), dict[int, Prediction]()
        budget = batch_tokens(self.backbone.device)
        for rows in batches([len(row) for row in ids], budget, padded=self.backbone.padded):
            part, pad_id = [ids[i] for i in rows], self.tokenizer.pad_token_id
            pooled = forward_pooled(self.backbone, part, pad_id, [vector])[0]
            said = self.chip.to(pooled.device).probabilities(pooled[self.info.cut.cut_layer + 1])
            for i, row in zip(rows, said.tolist(), strict=True):
                found[i] = Prediction.of(names, row)
        return [found[i] for i in range(len(ids))]


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
        if found["format"] != FORMAT:
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


def load_head(path: Path, source: str, *, home: Path, progress: ProgressFn) -> Head:
    """A chip alone, beside the backbone that it was fitted on.

    Args:
        path: Its folder.
        source: The backbone, as `train` takes it.
        home: The folder that holds `backbones/`.
        progress: Told what is fetched.

    Raises:
        BundleError: If the backbone or its tokenizer is another one than the chip's.
        ChipvizError: If the backbone cannot be had or loaded.
    """
    info = read_head(path)
    folder = find_model(source, home, progress)
    if folder.fingerprint != info.backbone["fingerprint"]:
        raise BundleError(
            f"{source} is another model than the one that this chip was fitted on.",
            f"Give {str(info.backbone.get('name'))[:120]}, as it was then.",
        )
    try:
        tokenizer = _with_prompt(load_tokenizer(folder.path, folder.n_positions), info.prompt)
        chip = Chip(**load_file(path / WEIGHTS))
    except (*FOREIGN, Exception) as error:  # noqa: BLE001 - the tokenizers library has no kind of its own
        said = " ".join(str(error).split())[:160]
        raise BundleError(f"{path.name} cannot be read: {said}", "Export it again.") from None
    backbone = load_backbone(
        folder,
        dtype=torch.float32,
        blocks_path=info.backbone.get("blocks"),
        sep=segment_break(tokenizer),
    )
    width = (chip.weight if chip.hidden_weight is None else chip.hidden_weight).shape[-1]
    if width != backbone.hidden_size or len(chip.weight) != len(info.task.label_names):
        raise BundleError(f"{WEIGHTS} does not fit the backbone or the labels.", "Export it again.")
    return Head(info, backbone, tokenizer, chip)


def _with_prompt(tokenizer: Any, prompt: dict[str, Any]) -> Any:
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
