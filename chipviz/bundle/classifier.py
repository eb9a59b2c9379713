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
from torch import Tensor

from chipviz.backbones.backbone import pad
from chipviz.backbones.batching import batch_tokens, batches
from chipviz.backbones.pooling import pool
from chipviz.backbones.structure import refuse_unknown_token
from chipviz.backbones.vetting import FOREIGN, SAFE, Weights, vet
from chipviz.bundle.metadata import Metadata, read_metadata
from chipviz.bundle.reader import Reader, read_chip
from chipviz.data.prompt import encode, segment_break
from chipviz.data.task import check_fields
from chipviz.errors import BackboneError, BundleError, panics_as_errors
from chipviz.results.answers import Prediction
from chipviz.results.report import BundleKind

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
    reader: Reader | None = None
    """Of kind *chipviz* alone: the chip beside the model, and how it reads it."""

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
        names = self.model.config.id2label
        found: list[Prediction | None] = [None] * len(ids)
        lengths, budget = [len(sequence) for sequence in ids], batch_tokens(self.model.device)
        for rows in batches(lengths, budget, padded=self.metadata.padded):
            logits = self._logits([ids[i] for i in rows])
            for i, row in zip(rows, logits.softmax(dim=-1).tolist(), strict=True):
                best = max(range(len(row)), key=row.__getitem__)
                by_name = {names[c]: p for c, p in enumerate(row)}
                found[i] = Prediction(names[best], row[best], by_name)
        return [p for p in found if p is not None]

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def _logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Class scores of a batch: shape (B, C), float32."""
        if self.reader is not None:
            return self.reader.logits(ids, self._pad_id)
        tokens, mask = pad(ids, self._pad_id, self.model.device)
        logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        # The mean of the token logits is the chip's logit.
        return pool(logits, mask, "mean") if self.metadata.kind == "token" else logits


def load(path: Path) -> Classifier:
    """Load a bundle of any kind.

    Raises:
        BundleError: If the folder is no bundle, or holds what a bundle may not hold.
    """
    metadata = read_metadata(path)
    refuse_unfit(path, metadata.kind)
    try:
        model, loading = _CLASSES[metadata.kind].from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **SAFE
        )
        # Stock kinds are read as stock code reads them; ours as tokenizer.json says.
        own = metadata.kind == "chipviz"
        words: Any = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
        with panics_as_errors():
            tokenizer = words.from_pretrained(path, **SAFE)
    except FOREIGN as error:
        raise _unloadable(path, error) from None
    _refuse_other_weights(path, loading)
    if tokenizer.pad_token_id is None:
        raise BundleError(
            f"The tokenizer of {path.name} has no pad token.", "Build the bundle again."
        )
    reader, sep = None, segment_break(tokenizer)
    try:
        reader = read_chip(path, model.eval(), metadata, sep) if own else None
    except BackboneError as error:
        raise BundleError(error.message, error.hint) from None
    except FOREIGN as error:
        raise _unloadable(path, error) from None
    return Classifier(metadata, model.eval(), tokenizer, reader)


def refuse_unfit(path: Path, kind: BundleKind) -> None:
    """Refuse a bundle whose files are no safe model, or not of one size, before memory is taken.

    Raises:
        BundleError: Naming what is wrong.
    """
    try:
        _refuse_larger(path, _CLASSES[kind], vet(path))
    except BackboneError as error:
        raise BundleError(error.message, error.hint) from None
    except FOREIGN as error:
        raise _unloadable(path, error) from None


def _refuse_larger(path: Path, kind: Any, weights: Weights) -> None:
    """Refuse a configuration of a larger model than the weights are, before memory is taken."""
    config = transformers.AutoConfig.from_pretrained(path, **SAFE)
    with torch.device("meta"):
        model: torch.nn.Module = kind.from_config(config, trust_remote_code=False)
    weights.refuse_larger(path.name, sum(p.numel() for p in model.parameters()))


def _refuse_other_weights(path: Path, loading: dict[str, Any]) -> None:
    """Refuse weights that are not exactly the model's: what is missing would be random numbers.

    Raises:
        BundleError: Naming one of them.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, loading[f"{kind}_keys"])):
            raise BundleError(
                f"{path.name} has {kind} weights: {len(keys)}, such as {keys[0][:80]}.",
                "Its files do not belong together; build or download the bundle again.",
            )


def _unloadable(path: Path, error: BaseException) -> BundleError:
    return BundleError(
        f"{path.name} cannot be loaded: {' '.join(str(error).split())[:200]}",
        "Run `python -m chipviz verify` on it, and build it again if a file was altered.",
    )
