"""Score table + rule -> cut layer and a sentence why; looks only at validation scores."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chipviz.config import DEFAULT_TOLERANCE, ChipKind, Pooling, Rule
from chipviz.errors import ConfigError
from chipviz.metrics import EMBEDDING_LAYER, Score

FIXED_DEPTH = 5 / 8
"""Depth of rule *fixed*. Source: arXiv:2410.06541, section 4.1: layer 20 of 32."""


@dataclass(frozen=True)
class Selection:
    """Where to cut, and why."""

    rule: Rule
    cut_layer: int
    """The last layer kept."""
    pooling: Pooling
    chip: ChipKind
    why: str
    validation_accuracy: float


def select(
    scores: Iterable[Score],
    rule: Rule,
    *,
    layer: int | None = None,
    pooling: Pooling | None = None,
    chip: ChipKind | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Selection:
    """Apply one rule to the validation scores of all layers; ties go to the shallower layer.

    Args:
        scores: The score table; other splits and the embedding control are passed over.
        rule: *validate* takes the best score, *within* the shallowest layer at most `tolerance`
            below the best, *fixed* the paper's 5/8 depth, *manual* the given `layer`.
        layer: The user's layer; rule *manual* alone takes one.
        pooling: Look only at chips on this pooling; None looks at all.
        chip: Look only at chips of this kind; None looks at all.
        tolerance: Accuracy given up for depth, in [0, 1].

    Raises:
        ConfigError: If no score fits, the layer is missing or out of range, or the tolerance is.

    Source: *validate* and *fixed* arXiv:2410.06541, sections 4.1 and 5.2; *within* is ours.
    """
    table = [
        s
        for s in scores
        if s.split == "validation"
        and s.layer != EMBEDDING_LAYER
        and pooling in (None, s.pooling)
        and chip in (None, s.chip)
    ]
    if not table:
        raise ConfigError(
            f"No validation score for pooling {pooling or 'any'} and chip {chip or 'any'}.",
            "Name a pooling and chip that the run has trained; `show RUN` lists them.",
        )
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance}, expected 0 to 1.", "0.01 means one point.")
    n_layers = 1 + max(s.layer for s in table)
    best = _best(table)
    if rule == "validate":
        chosen = best
        why = f"best validation accuracy, {_percent(best.accuracy)}"
    elif rule == "within":
        near = [s for s in table if s.accuracy >= best.accuracy - tolerance - 1e-12]
        shallowest = min(s.layer for s in near)
        chosen = _best([s for s in near if s.layer == shallowest])
        why = (
            f"shallowest layer within {_points(tolerance)} of the best validation accuracy "
            f"({_percent(best.accuracy)} at layer {best.layer}, {best.pooling})"
        )
    elif rule == "fixed":
        chosen = _at(table, fixed_layer(n_layers))
        why = f"the paper's fixed depth, 5/8 of {n_layers} layers"
    else:
        if layer is None:
            raise ConfigError("Rule manual needs a layer.", f"Give one from 0 to {n_layers - 1}.")
        chosen = _at(table, layer)
        why = "chosen by hand"
    return Selection(rule, chosen.layer, chosen.pooling, chosen.chip, why, chosen.accuracy)


def fixed_layer(n_layers: int) -> int:
    """The paper's fixed depth for any model: layer 20 of 32, 25 of 40."""
    return min(n_layers - 1, round(FIXED_DEPTH * n_layers))


def _best(table: Sequence[Score]) -> Score:
    """Highest accuracy; ties to the shallower layer, then to the lower log-loss."""
    return min(table, key=lambda s: (-s.accuracy, s.layer, s.log_loss))


def _at(table: Sequence[Score], layer: int) -> Score:
    here = [s for s in table if s.layer == layer]
    if not here:
        raise ConfigError(
            f"Layer {layer} does not exist, layers are 0 to {max(s.layer for s in table)}.",
            "Give the last layer to keep, counted from 0.",
        )
    return _best(here)


def _points(tolerance: float) -> str:
    return f"{100 * tolerance:g} point{'' if tolerance == 0.01 else 's'}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
