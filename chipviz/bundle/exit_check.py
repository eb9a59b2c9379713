"""Early exits of a bundle beside the run's own chips, which read the dense model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from chipviz.backbones.backbone import pad
from chipviz.backbones.batching import batches
from chipviz.backbones.vetting import FOREIGN
from chipviz.bundle.adaptive import log_odds
from chipviz.bundle.check import Row
from chipviz.bundle.classifier import Classifier
from chipviz.bundle.verify import TOLERANCE
from chipviz.data.prompt import encode
from chipviz.errors import BundleError
from chipviz.results.exits import ExitPlan

_NEAR = 0.05
"""Log-odds beside a threshold within which rounding may decide."""
_TOKENS = 2_048
"""Tokens of a pass over several texts."""


def check_exits(
    classifier: Classifier, check: Sequence[Row], logits: Tensor, plan: ExitPlan
) -> None:
    """Compare the early exits of a bundle, several texts a pass, with the run's own chips.

    Args:
        classifier: The bundle, loaded with its exits.
        check: What it is asked.
        logits: From `chipviz.bundle.dense.expected_exits`, shape (E, N, C).
        plan: The exits.

    Raises:
        BundleError: If a text leaves elsewhere, or with another probability.
    """
    tokenizer, exits = classifier.tokenizer, classifier.exits
    assert exits is not None
    odds = torch.stack([log_odds(one) for one in logits])
    may = odds >= plan.threshold
    may[-1] = True
    at = may.int().argmax(dim=0)
    near = (odds - plan.threshold).abs().amin(dim=0) < _NEAR
    texts = [text for text, _ in check]
    pairs = [pair or "" for _, pair in check] if classifier.metadata.takes_pair else None
    ids = encode(tokenizer, texts, pairs)["input_ids"]
    for rows in batches([len(one) for one in ids], _TOKENS, padded=classifier.metadata.padded):
        padded = pad([ids[i] for i in rows], tokenizer.pad_token_id, classifier.model.device)
        try:
            said = exits.answer(*padded)
        except FOREIGN as error:
            raise _refusal(" ".join(str(error).split())[:120]) from None
        wanted = logits[at[rows], rows].softmax(dim=1)
        off = (said.probabilities.cpu() - wanted).abs().amax(dim=1)
        wrong = ((said.exits.cpu() != at[rows]) | ~(off <= TOLERANCE)) & ~near[rows]
        if wrong.any():
            first = rows[int(wrong.int().argmax())]
            raise _refusal(f"they disagree with the run's chips on {texts[first][:60]!r}")


def _refusal(why: str) -> BundleError:
    return BundleError(
        f"Early exits do not work with this model: {why}.",
        "Blocks of its family cannot run on fewer texts than they began with; build it without.",
    )
