"""LaCo (arXiv:2402.11187): a block takes up the ones above it, as long as the output stays alike.

From the top down, a block and the blocks above it become one. The merge is kept if the states after
the last block are still like those of the whole model on a few texts. How many blocks go depends on
that threshold, so it is searched for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from chipviz.backbones.language_model import LanguageModel, skipping
from chipviz.errors import ConfigError
from chipviz.progress import Progress, ProgressFn, silent

MergeRule = Literal["paper", "released"]
"""*paper* adds to a block's matrices what each block above differs from it. *released* is what the
public code does: it adds to a copy that has changed already, so the last block of the group takes
the place of the first, but for its norms."""
GROUP = 3
"""Blocks that become one, at most. More at a time cost more: found on small models."""
INTERVAL = 1
TEXTS = 8
"""Rows of text that the output is compared on."""
ROUNDS = 12
"""Thresholds that are tried."""


@dataclass(frozen=True)
class Merge:
    """Blocks that were taken up by others."""

    removed: list[int]
    weights: dict[int, dict[str, Tensor]]
    """New matrices of a block that took up others, by name."""
    threshold: float
    """Cosine that every merge had to exceed."""
    similarity: float
    """Cosine of the states after the last block to those of the whole model, when all is merged."""
    lowest: float
    """The lowest that a merge on the way had."""


def merged(rule: MergeRule, group: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Matrices of one block in place of a group.

    Args:
        rule: *paper*: theta_0 + sum_k (theta_k - theta_0). *released*: the last block's.
        group: Matrices of each block, from the input on.
    """
    first = group[0]
    if rule == "released":
        return {name: group[-1][name].clone() for name in first}
    return {
        name: own + sum((other[name] - own for other in group[1:]), torch.zeros_like(own))
        for name, own in first.items()
    }


def matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the attention and feed-forward parts of a block: norms are left out."""
    return {
        f"{where}.{name}" if where else name: parameter
        for where, module in block.named_modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False)
    }


def merge(
    model: LanguageModel,
    rows: Tensor,
    n_removed: int,
    rule: MergeRule,
    progress: ProgressFn = silent,
) -> Merge:
    """Merge blocks until so many are gone, at the highest threshold that lets them go.

    Args:
        model: The whole model. It is not changed.
        rows: Text to compare on, shape (N, T).
        n_removed: Blocks to remove.
        rule: How matrices are merged.
        progress: Told every threshold.

    Raises:
        ConfigError: If no threshold lets so many go.
    """
    rows = rows[:TEXTS].to(model.device)
    low, high, best = -1.0, 1.0, None
    reference = _final(model, rows)
    for turn in range(ROUNDS):
        threshold = low if turn == 0 else (low + high) / 2
        label = f"threshold {threshold:.2f}"
        progress(Progress("fitting", label, turn, ROUNDS))
        found = _merge_at(model, rows, reference, n_removed, rule, threshold)
        if len(found.removed) == n_removed:
            best, low = found, min(high, max(threshold, found.lowest))
        elif best is None:
            break
        else:
            high = threshold
        if high - low < 1e-3:
            break
    if best is None:
        raise ConfigError(
            f"LaCo cannot merge {n_removed} of the {model.n_layers} blocks of {model.name} away.",
            "Take out fewer.",
            "layers",
        )
    return replace(best, threshold=min(low, best.lowest))


def _merge_at(
    model: LanguageModel,
    rows: Tensor,
    reference: Tensor,
    n_removed: int,
    rule: MergeRule,
    threshold: float,
) -> Merge:
    alive, removed = list(range(model.n_layers)), list[int]()
    weights: dict[int, dict[str, Tensor]] = {}
    place, similarity, lowest = len(alive) - GROUP, 1.0, 1.0
    while place >= 0 and len(removed) < n_removed:
        group = alive[place : place + 1 + min(GROUP - 1, n_removed - len(removed))]
        parts = [weights.get(layer) or _values(model.blocks[layer]) for layer in group]
        tried = {**weights, group[0]: merged(rule, parts)}
        with changed(model, tried), skipping(model, [*removed, *group[1:]]):
            alike = _similarity(_final(model, rows), reference)
        if alike > threshold:
            weights, similarity, lowest = tried, alike, min(lowest, alike)
            removed += group[1:]
            alive = [layer for layer in alive if layer not in group[1:]]
            place = min(place - INTERVAL, len(alive) - GROUP)
        else:
            place -= 1
    kept = {layer: found for layer, found in weights.items() if layer not in removed}
    return Merge(sorted(removed), kept, threshold, similarity, lowest)


def _values(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in matrices(block).items()}


@contextmanager
def changed(model: LanguageModel, weights: Mapping[int, Mapping[str, Tensor]]) -> Iterator[None]:
    """Give some blocks other matrices, inside the block."""
    parameters = {layer: matrices(model.blocks[layer]) for layer in weights}
    before = {
        layer: {name: parameter.data for name, parameter in found.items()}
        for layer, found in parameters.items()
    }
    try:
        put(model, weights)
        yield
    finally:
        put(model, before)


def put(model: LanguageModel, weights: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Give some blocks other matrices."""
    for layer, values in weights.items():
        parameters = matrices(model.blocks[layer])
        for name, value in values.items():
            parameters[name].data = value


@torch.inference_mode()
def _final(model: LanguageModel, rows: Tensor) -> Tensor:
    """States that the LM head reads, one row a text: shape (N, T D)."""
    output = model.base(input_ids=rows, attention_mask=torch.ones_like(rows))
    return output.last_hidden_state.flatten(1).float()


def _similarity(found: Tensor, reference: Tensor) -> float:
    """Mean cosine over the texts. A model that gives no number is like nothing."""
    return float(cosine_similarity(found, reference, dim=1).mean().nan_to_num(-2.0))
