"""A bundle at work: read its folder, load what it holds, classify raw texts.

Reads safetensors and JSON alone. Nothing in a folder is ever run, and a folder that holds what no
bundle has is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from chipviz.backbones.backbone import pad, segments
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import find_blocks, first_of
from chipviz.backbones.vetting import FOREIGN, SAFE, vet
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.chips.chip import Chip
from chipviz.data.prompt import encode, segment_break
from chipviz.data.task import check_fields
from chipviz.errors import BackboneError, BundleError
from chipviz.results.answers import Prediction

CHIP_FILE = "chip.safetensors"
"""Where kind *chipviz* keeps its chip. The stock kinds keep it in the model."""
_CLASSES: dict[str, Any] = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "chipviz": transformers.AutoModel,
}


@dataclass(frozen=True)
class Classifier:
    """A loaded bundle."""

    metadata: Metadata
    model: Any
    """A stock classifier, or for kind *chipviz* the cut backbone alone."""
    tokenizer: Any
    chip: Chip | None = None
    """Kind *chipviz* alone has one beside the model."""

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Classify raw texts: template and length limit are part of the tokenizer.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
        """
        if not texts:
            return []
        check_fields(self.metadata.takes_pair, texts, pairs)
        ids = encode(self.tokenizer, texts, pairs)["input_ids"]
        names = self.model.config.id2label
        found: list[Prediction | None] = [None] * len(ids)
        lengths, budget = [len(sequence) for sequence in ids], batch_tokens(self.model.device)
        for rows in batches(lengths, budget, padded=self.metadata.padded):
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
            pooled = pool(self._states(tokens, mask), mask, self.metadata.cut.key.pooling)
            return self.chip.to(pooled.device).logits(pooled)
        logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        # The mean of the token logits is the chip's logit.
        return pool(logits, mask, "mean") if self.metadata.kind == "token" else logits

    def _states(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The hidden states that the chip pools, shape (B, T, D): *raw* ones before the norm."""
        seen: list[Any] = []
        last = find_blocks(self.model, path=self.metadata.blocks)[-1]
        handle = last.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            which = segments(self.model.config, tokens, segment_break(self.tokenizer))
            output = self.model(input_ids=tokens, attention_mask=mask, **which)
        finally:
            handle.remove()
        return (
            first_of(seen[0]) if self.metadata.cut.key.site == "raw" else output.last_hidden_state
        )


def load(path: Path) -> Classifier:
    """Load a bundle of any kind.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    metadata = read_metadata(path)
    try:
        vet(path)
    except BackboneError as error:
        raise BundleError(error.message, error.hint) from None
    try:
        model: Any = _CLASSES[metadata.kind].from_pretrained(path, use_safetensors=True, **SAFE)
        # Stock kinds are read as stock code reads them; ours as tokenizer.json says.
        own = metadata.kind == "chipviz"
        words: Any = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
        tokenizer = words.from_pretrained(path, **SAFE)
        chip = _read_chip(path, model) if own else None
    except FOREIGN as error:
        raise BundleError(
            f"{path.name} cannot be loaded: {' '.join(str(error).split())[:200]}",
            "Run `python -m chipviz verify` on it, and build it again if a file was altered.",
        ) from None
    return Classifier(metadata, model.eval(), tokenizer, chip)


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
