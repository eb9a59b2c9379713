"""What a bundle is verified on: rows of its run, and some that anyone can make."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from chipviz.backbones.backbone import Backbone
from chipviz.bundle import vision
from chipviz.chips.chip import Chip
from chipviz.config import CutSpec
from chipviz.data.processor import Reader
from chipviz.data.prompt import Prompt, hard_endings
from chipviz.features.forward import forward_neurons, forward_pooled
from chipviz.results.report import Example

Row = tuple[str, str | None]
"""A text and its second text, or a picture's path or name."""
SELF_TEST = (
    ("The match ended two to one after extra time.", "Was there extra time?"),
    ("Shares rose as the central bank kept its rate.", "Did the bank change its rate?"),
    ("I would not watch this film again.", "The film was a joy."),
)
"""Texts, with a second text where one is read, whose probabilities stand in every bundle, so that
`verify` needs nothing else."""


def self_test(prompt: Reader) -> list[tuple[str, str | None]]:
    """Texts or pictures that anyone can ask a bundle about."""
    if not isinstance(prompt, Prompt):
        return [(name, None) for name in vision.MADE]
    return [(text, pair if prompt.takes_pair else None) for text, pair in SELF_TEST]


@contextmanager
def rows_to_check(prompt: Reader, rows: Sequence[Example]) -> Iterator[list[Row]]:
    """Validation rows as a fresh process is given them.

    Texts that may end in a token with a meaning stand behind them. Pictures are files for as long.

    Args:
        prompt: The run's own.
        rows: As the run kept them.
    """
    if isinstance(prompt, Prompt):
        hard = [
            (text, text if prompt.takes_pair else None) for text in hard_endings(prompt.tokenizer)
        ]
        yield [*((row.text, row.text_pair) for row in rows), *hard]
        return
    with vision.as_files(prompt, [row.text for row in rows]) as files:
        yield [(str(file), None) for file in files]


def expected(
    backbone: Backbone,
    prompt: Reader,
    chip: Chip,
    spec: CutSpec,
    check: Sequence[Row],
) -> Tensor:
    """What the run's own chip says, read from the dense model by hooks, in float32.

    Args:
        backbone: In the dtype its weights are stored in.
        prompt: The run's own.
        chip: The run's own.
        spec: Where it reads.
        check: What it is asked.

    Returns:
        Probabilities, shape (N, C).
    """
    stored = backbone.dtype
    texts = [text for text, _ in check]
    pairs = [pair or "" for _, pair in check] if prompt.takes_pair else None
    backbone.model.float()  # exact, and so is the way back
    pad_id, vector = prompt.pad_id, spec.key.vector
    try:
        pooled = [
            forward_neurons(backbone, [ids], pad_id, vector.pooling, chip.neurons)
            if chip.neurons is not None
            else forward_pooled(backbone, [ids], pad_id, [vector])[0][spec.cut_layer + 1]
            for ids in prompt.encode(texts, pairs)
        ]
    finally:
        backbone.model.to(stored)
    return chip.probabilities(torch.cat(pooled))  # of (N, D)
