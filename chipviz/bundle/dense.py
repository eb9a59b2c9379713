"""What the dense model says of the rows that a bundle is checked on, in float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chipviz.backbones.backbone import Backbone
from chipviz.bundle.check import Row
from chipviz.bundle.extras import Drift, Extras
from chipviz.chips.chip import Chip, Chips
from chipviz.config import CutSpec
from chipviz.data.processor import Reader
from chipviz.features.forward import forward_neurons, forward_pooled
from chipviz.results.exits import ExitPlan


def ask_dense(
    backbone: Backbone,
    prompt: Reader,
    chips: Chips,
    spec: CutSpec,
    rows: Sequence[Row],
    extras: Extras,
) -> tuple[Tensor, Extras]:
    """What a bundle is compared with.

    Args:
        backbone: In the dtype its weights are stored in. Left in that of the bundle.
        prompt: The run's own.
        chips: All of the run.
        spec: What is built.
        rows: What is asked.
        extras: What the bundle has beside.

    Returns:
        Probabilities of the run's own chip, shape (N, C), and the extras with what their check
        needs.
    """
    chip = chips.at(spec.cut)
    said = expected(backbone, prompt, chip, spec, rows)
    if spec.dtype is not None and getattr(torch, spec.dtype) != backbone.dtype:
        round_weights(backbone.model, getattr(torch, spec.dtype))
        published, said = said, expected(backbone, prompt, chip, spec, rows)
        extras = replace(
            extras, rounding=Drift.between(said, published, f"weights rounded to {spec.dtype}")
        )
    if extras.plan is not None:
        stack = chips.stack_at(spec.key, extras.plan.layers)
        logits = expected_exits(backbone, prompt, stack, spec, extras.plan, rows)
        extras = replace(extras, chips=stack, exit_logits=logits)
    return said, extras


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
    pad_id, vector = prompt.pad_id, spec.key.vector
    with exactly(backbone.model):
        pooled = [
            forward_neurons(backbone, [ids], pad_id, vector.pooling, chip.neurons)
            if chip.neurons is not None
            else forward_pooled(backbone, [ids], pad_id, [vector])[0][spec.cut_layer + 1]
            for ids in _encoded(prompt, check)
        ]
    return chip.probabilities(torch.cat(pooled))  # of (N, D)


def expected_exits(
    backbone: Backbone,
    prompt: Reader,
    chips: Chip,
    spec: CutSpec,
    plan: ExitPlan,
    check: Sequence[Row],
) -> Tensor:
    """What the run's own chips of all exits say, read from the dense model, in float32.

    Args:
        backbone: In the dtype its weights are stored in.
        prompt: The run's own.
        chips: Of the exits, a stack of E.
        spec: What they read.
        plan: The exits.
        check: What they are asked.

    Returns:
        Class scores at each exit's temperature, shape (E, N, C).
    """
    with exactly(backbone.model):
        pooled = [
            forward_pooled(backbone, [ids], prompt.pad_id, [spec.key.vector])[0]
            for ids in _encoded(prompt, check)
        ]
    layers = torch.tensor(plan.layers) + 1
    read = torch.cat(pooled, dim=1)[layers.to(pooled[0].device)]  # (E, N, D)
    logits = chips.to(read.device).logits(read).cpu()
    return logits / torch.tensor(plan.temperatures)[:, None, None]


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Compute in float32, and go back to the very same numbers.

    Not `model.to`: it would round buffers that are kept in float32, such as rotary frequencies, and
    single parameters that are.
    """
    stored = [(one, one.dtype) for one in model.parameters()]
    buffers = [
        (module, name, one)
        for module in model.modules()
        for name, one in module._buffers.items()
        if one is not None and one.is_floating_point()
    ]
    for one, _ in stored:
        one.data = one.data.float()
    for module, name, one in buffers:
        module._buffers[name] = one.float()
    try:
        yield
    finally:
        for one, dtype in stored:
            one.data = one.data.to(dtype)
        for module, name, one in buffers:
            module._buffers[name] = one


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round parameters to a number format. Buffers are none of the weights."""
    for one in model.parameters():
        one.data = one.data.to(dtype)


def _encoded(prompt: Reader, check: Sequence[Row]) -> Sequence[Any]:
    """Rows as the dense model takes them."""
    texts = [text for text, _ in check]
    pairs = [pair or "" for _, pair in check] if prompt.takes_pair else None
    return prompt.encode(texts, pairs)
