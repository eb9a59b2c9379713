"""A bundle at work: read its folder, load what it holds, classify raw texts.

Reads safetensors and JSON alone; nothing in a folder is ever run, and a folder that holds what no
bundle has is refused.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from chipviz.backbones.backbone import pad, segments
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import find_blocks, first_of
from chipviz.backbones.vetting import FOREIGN, SAFE, vet
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec, Preset
from chipviz.data.prompt import segment_break
from chipviz.data.task import check_fields
from chipviz.errors import BackboneError, BundleError
from chipviz.keys import Vector
from chipviz.results.report import BundleKind, TaskInfo

FORMAT = 1
FILES = {".safetensors", ".json", ".md", ".txt", ".model"}
"""What a bundle may hold, beside SHA256SUMS."""
CHIP_FILE = "chip.safetensors"
"""Where kind *chipviz* keeps its chip; the stock kinds keep it in the model."""
_CLASSES: dict[BundleKind, Any] = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "chipviz": transformers.AutoModel,
}


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of one text."""

    label: str
    score: float
    """Probability of `label`."""
    probabilities: dict[str, float]
    """By label, in the order of the classes."""


@dataclass(frozen=True)
class Classifier:
    """A loaded bundle."""

    kind: BundleKind
    model: Any
    """A stock classifier, or for kind *chipviz* the cut backbone alone."""
    tokenizer: Any
    vector: Vector
    """What the chip reads."""
    chip: Chip | None = None
    """Of kind *chipviz* alone."""
    blocks_path: str | None = None
    """Where the blocks are, if the run had to be told."""
    two: bool = False
    """Whether it reads two texts."""

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Classify raw texts: template and length limit are part of the tokenizer.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
        """
        if not texts:
            return []
        check_fields(self.two, texts, pairs)
        ids = self.tokenizer(list(texts), list(pairs) if pairs is not None else None)["input_ids"]
        names = self.model.config.id2label
        found: list[Prediction | None] = [None] * len(ids)
        budget = batch_tokens(self.model.device)
        for rows in batches([len(sequence) for sequence in ids], budget):
            logits = self._logits(*pad([ids[i] for i in rows], self._pad_id, self.model.device))
            for i, row in zip(rows, logits.softmax(dim=-1).tolist(), strict=True):
                best = max(range(len(row)), key=row.__getitem__)
                by_name = {names[c]: p for c, p in enumerate(row)}
                found[i] = Prediction(names[best], row[best], by_name)
        return [p for p in found if p is not None]

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def _logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Class scores of a padded batch (B, T): shape (B, C), float32."""
        if self.chip is not None:
            pooled = pool(self._states(tokens, mask), mask, self.vector.pooling)
            return self.chip.to(pooled.device).logits(pooled)
        logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        # The mean of the token logits is the chip's logit.
        return pool(logits, mask, "mean") if self.kind == "token" else logits

    def _states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The hidden states that the chip pools, shape (B, T, D): *raw* ones before the norm."""
        seen: list[Any] = []
        last = find_blocks(self.model, path=self.blocks_path)[-1]
        handle = last.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            which = segments(self.model.config, tokens, segment_break(self.tokenizer))
            output = self.model(input_ids=tokens, attention_mask=mask, **which)
        finally:
            handle.remove()
        return first_of(seen[0]) if self.vector.site == "raw" else output.last_hidden_state


def load(path: Path) -> Classifier:
    """Load a bundle of any kind.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    about = read_about(path)
    kind: BundleKind = about["kind"]
    try:
        vet(path)
    except BackboneError as error:
        raise BundleError(error.message, error.hint) from None
    try:
        model: Any = _CLASSES[kind].from_pretrained(path, use_safetensors=True, **SAFE)
        # Stock kinds are read as stock code reads them; ours as tokenizer.json says.
        own = kind == "chipviz"
        words: Any = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
        tokenizer = words.from_pretrained(path, **SAFE)
        chip = _read_chip(path, model) if kind == "chipviz" else None
    except FOREIGN as error:
        raise BundleError(
            f"{path.name} cannot be loaded: {' '.join(str(error).split())[:200]}",
            "Run `python -m chipviz verify` on it, and build it again if a file was altered.",
        ) from None
    blocks_path = about.get("backbone", {}).get("blocks")
    two = "{text_pair}" in about["task"]["template"]
    vector = CutSpec.model_validate(about["cut"]).key.vector
    return Classifier(kind, model.eval(), tokenizer, vector, chip, blocks_path, two)


def read_about(path: Path) -> dict[str, Any]:
    """The `chip.json` of a bundle.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    if not (path / "chip.json").is_file():
        raise BundleError(
            f"{path} is no bundle: it has no chip.json.", "Give a folder written by `chipviz cut`."
        )
    for file in path.iterdir():
        if file.name != "SHA256SUMS" and (file.suffix not in FILES or not file.is_file()):
            raise BundleError(
                f"{path.name} holds {file.name}, which no bundle has.",
                "Remove it, or do not trust it.",
            )
    try:
        about = json.loads((path / "chip.json").read_text("utf-8"))
        config = json.loads((path / "config.json").read_text("utf-8"))
        known = about["format"] == FORMAT and about["kind"] in get_args(BundleKind)
        known = known and about["preset"] in get_args(Preset)
        CutSpec.model_validate(about["cut"])
        TaskInfo.model_validate(about["task"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(
            f"{path.name} has an unreadable chip.json or config.json.", "Build the bundle again."
        ) from None
    if not known or "auto_map" in config:
        raise BundleError(
            f"{path.name} has a format this version of chipviz does not read.",
            "Update chipviz, or build the bundle again.",
        )
    return about


def _read_chip(path: Path, model: Any) -> Chip:
    """The chip beside a cut backbone.

    Raises:
        ValueError: If it is none, or none for this backbone and these classes.
    """
    try:
        chip = Chip(**load_file(path / CHIP_FILE))
    except TypeError:
        raise ValueError(f"{CHIP_FILE} holds no chip") from None
    n_classes, width = len(model.config.id2label), model.config.get_text_config().hidden_size
    inner = width if chip.hidden_weight is None else len(chip.hidden_weight)
    shapes = {
        "weight": (n_classes, inner),
        "bias": (n_classes,),
        "hidden_weight": (inner, width),
        "hidden_bias": (inner,),
    }
    tensors = chip.tensors()
    fits = all(tuple(value.shape) == shapes[name] for name, value in tensors.items())
    if not fits or ("hidden_weight" in tensors) != ("hidden_bias" in tensors):
        raise ValueError(f"{CHIP_FILE} does not fit the model beside it")
    return chip
