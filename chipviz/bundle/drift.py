"""How far scores move where weights are rounded, or computed in another number format or batch."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chipviz.backbones.backbone import pad
from chipviz.bundle.check import Row
from chipviz.bundle.classifier import Classifier, load
from chipviz.bundle.exit_check import check_exits
from chipviz.bundle.extras import Drift, Extras
from chipviz.data.prompt import encode

N_ROWS = 16
"""Rows that every number format and batch size is asked about."""
BATCHES = (1, 8)
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def look_again(folder: Path, check: Sequence[Row], expected: Tensor, extras: Extras) -> list[Drift]:
    """How far scores move, the rounding of the weights first. Checks early exits on the way.

    Args:
        folder: The bundle.
        check: What it was verified on.
        expected: Probabilities of the run's own chip, shape (N, C).
        extras: What it has.

    Raises:
        BundleError: If the exits of the bundle are not those of the run's own chips.
    """
    found = [extras.rounding] if extras.rounding else []
    classifier = load(folder, adaptive=extras.plan is not None)
    if not isinstance(classifier, Classifier):
        return found
    if extras.plan is not None and extras.exit_logits is not None:
        check_exits(classifier, check, extras.exit_logits, extras.plan)
    return [*found, *measure(classifier, check, expected)]


def measure(classifier: Classifier, rows: Sequence[Row], expected: Tensor) -> list[Drift]:
    """What a bundle says in each number format and batch size, beside its run's own chip.

    A format that this machine cannot compute in is left out.

    Args:
        classifier: The loaded bundle. Left in float32.
        rows: What it is asked.
        expected: Probabilities of the run's own chip, shape (N, C).
    """
    rows, expected = rows[:N_ROWS], expected[:N_ROWS]
    found: list[Drift] = []
    # Parameters alone, as loading with `dtype` does: `model.to` would round buffers for good.
    stored = [(one, one.data) for one in classifier.model.parameters()]
    for name, dtype in _FORMATS.items():
        for one, exact in stored:
            one.data = exact.to(dtype)
        for batch in BATCHES:
            try:
                said = _said(classifier, rows, batch)
            except RuntimeError:  # an operation that this device lacks
                continue
            if said.isfinite().all():
                found.append(Drift.between(said, expected, f"computed in {name}", batch))
    for one, exact in stored:
        one.data = exact
    return found


@torch.inference_mode()
def _said(classifier: Classifier, rows: Sequence[Row], batch: int) -> Tensor:
    """Probabilities of rows, so many in a pass, shape (N, C)."""
    tokenizer, device = classifier.tokenizer, classifier.model.device
    pairs = [pair or "" for _, pair in rows] if classifier.metadata.takes_pair else None
    ids = encode(tokenizer, [text for text, _ in rows], pairs)["input_ids"]
    batch = batch if classifier.metadata.padded else 1
    parts = [ids[i : i + batch] for i in range(0, len(ids), batch)]
    padded = [pad(part, tokenizer.pad_token_id, device) for part in parts]
    logits = [classifier.scores(*one).float().cpu() for one in padded]
    return torch.cat(logits).softmax(dim=1)
