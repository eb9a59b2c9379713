"""A bundle at work: read its folder, load what it holds, classify raw texts.

Reads safetensors and JSON alone. Nothing in a folder is ever run, and a folder that holds what no
bundle has is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chipviz.backbones.backbone import pad
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import refuse_unknown_token
from chipviz.bundle.adaptive import Exits, open_exits
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.bundle.opening import as_refusals, open_model, open_tokenizer
from chipviz.bundle.pictures import PictureClassifier, open_pictures
from chipviz.bundle.reader import Reader, read_chip
from chipviz.data.prompt import encode, segment_break
from chipviz.data.task import check_fields
from chipviz.results.answers import Prediction


@dataclass(frozen=True)
class Classifier:
    """A loaded bundle."""

    metadata: Metadata
    model: Any
    """A stock classifier, or for kind *chipviz* the cut backbone alone."""
    tokenizer: Any
    reader: Reader | None = None
    """Of kind *chipviz* alone: the chip beside the model, and how it reads it."""
    exits: Exits | None = None
    """Where texts may leave early, if the bundle was loaded for that."""

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Classify raw texts: template and length limit are part of the tokenizer.

        Raises:
            ConfigError: If second texts are missing, or given where one text is read.
            BackboneError: If the tokenizer has more tokens than the model.
        """
        if not texts:
            return []
        check_fields(self.metadata.takes_pair, texts, pairs)
        ids = encode(self.tokenizer, texts, pairs)["input_ids"]
        largest = max(map(max, ids))  # no prompt is empty
        refuse_unknown_token(largest, self.model, "the bundle")
        names, threshold = self.model.config.id2label, self.metadata.threshold
        decide = threshold and threshold.decide
        found: list[Prediction | None] = [None] * len(ids)
        lengths, budget = [len(sequence) for sequence in ids], batch_tokens(self.model.device)
        for rows in batches(lengths, budget, padded=self.metadata.padded):
            shares, layers = self._said(*self._padded([ids[i] for i in rows]))
            for i, row, layer in zip(rows, shares.tolist(), layers, strict=True):
                found[i] = Prediction.of(names, row, decide, layer)
        return [p for p in found if p is not None]

    def _said(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Sequence[int | None]]:
        """Probabilities (B, C), and the layer at which each text left where it may leave early."""
        if self.exits is None:
            return self.scores(tokens, mask).softmax(dim=-1), [None] * len(tokens)
        said = self.exits.answer(tokens, mask)
        return said.probabilities, [self.exits.plan.layers[i] for i in said.exits.tolist()]

    def _padded(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask on the device, shape (B, T) both."""
        return pad(ids, self.tokenizer.pad_token_id, self.model.device)

    def scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Class scores of padded texts, shape (B, T) both: shape (B, C), float32."""
        if self.reader is not None:
            return self.reader.scores(tokens, mask)
        logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        # The mean of the token logits is the chip's logit.
        return pool(logits, mask, "mean") if self.metadata.kind == "token" else logits


def load(path: Path, *, adaptive: bool = False) -> Classifier | PictureClassifier:
    """Load a bundle of any kind.

    Args:
        path: Its folder.
        adaptive: Let texts leave at its early exits.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold, or has no
            early exits where they are asked for.
    """
    metadata = read_metadata(path)
    if adaptive:
        metadata.refuse_without_exits(path.name)
    model = open_model(path, metadata.kind)
    own = metadata.kind == "chipviz"
    if metadata.task.kind == "image":
        return open_pictures(path, metadata, model)
    tokenizer = open_tokenizer(path, metadata.kind)
    with as_refusals(path):
        sep = segment_break(tokenizer)
        reader = read_chip(path, model, metadata, sep) if own else None
        exits = open_exits(path, model, metadata, sep) if adaptive else None
    return Classifier(metadata, model, tokenizer, reader, exits)
