"""Score table + rule -> cut layer and a sentence why.

Looks only at validation. The one exception, *oracle*, says so. Never recomputes a score.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chipviz.config import DEFAULT_MARGIN, DEFAULT_TOLERANCE, Rule
from chipviz.errors import ConfigError
from chipviz.keys import EMBEDDING_LAYER, ChipKey, Cut, Split
from chipviz.results.metrics import Score, paired_lower_bound

FIXED_DEPTH = 5 / 8
"""Depth of rule *fixed*. Source: arXiv:2410.06541, section 4.1: layer 20 of 32."""
ELBOW_SHARE = 0.9
"""Share of a curve's rise after which rule *elbow* calls the drastic change done."""
DEFAULT_BUDGET = "parameters=50%"

Correct = Mapping[ChipKey, NDArray[np.bool_]]
"""Which validation texts the chips of each layer got right, shape (L, N)."""
Quantity = Literal["parameters", "memory", "latency"]
_UNITS: dict[Quantity, dict[str, tuple[float, str]]] = {
    "parameters": {
        "": (1, "parameters"),
        "k": (1e3, "thousand parameters"),
        "m": (1e6, "million parameters"),
        "b": (1e9, "billion parameters"),
    },
    "memory": {"": (1, "bytes"), "kb": (1e3, "KB"), "mb": (1e6, "MB"), "gb": (1e9, "GB")},
    "latency": {"s": (1, "s"), "ms": (1e-3, "ms")},
}
"""How a budget may be written: unit, its size, and its words."""
_ROUNDING = 1e-12
"""What arithmetic may add to a difference of accuracies."""


@dataclass(frozen=True)
class Selection:
    """Where to cut, and why."""

    rule: Rule
    cut: Cut
    why: str
    validation_accuracy: float


@dataclass(frozen=True)
class Budget:
    """What a cut may cost at most."""

    quantity: Quantity
    most: float
    """Parameters, bytes, or seconds."""
    words: str
    """The same in words."""


def parse_budget(text: str, dense: Mapping[Quantity, float | None]) -> Budget:
    """Read a budget such as `parameters=80M`, `memory=300MB`, `latency=20ms` or `latency=50%`.

    Args:
        text: What the user wrote. Units in any case, a share is one of the published model's cost.
        dense: That cost. None where it was not measured.

    Raises:
        ConfigError: If it cannot be read, or limits what was not measured.
    """
    found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d{1,18}(?:\.\d{1,9})?)\s*(%|[a-z]*)\s*", text.lower())
    quantity: Quantity | None = next((q for q in _UNITS if found and q == found[1]), None)
    if found is None or quantity is None or found[3] not in {"%", *_UNITS[quantity]}:
        raise ConfigError(
            f"The budget {text[:60]!r} cannot be read.",
            "Write parameters=80M, memory=300MB, latency=20ms, or a share such as parameters=50%.",
        )
    whole = dense[quantity]
    if whole is None:
        raise ConfigError(
            f"The {quantity} of this run was not measured.",
            "Train again with this version, or give a budget of parameters.",
        )
    number, unit = found[2], found[3]
    if unit == "%":
        return Budget(quantity, float(number) / 100 * whole, f"{number} % of the dense {quantity}")
    size, name = _UNITS[quantity][unit]
    return Budget(quantity, float(number) * size, f"{number} {name}")


def select(
    scores: Iterable[Score],
    rule: Rule,
    *,
    layer: int | None = None,
    chips: Collection[ChipKey] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    margin: float = DEFAULT_MARGIN,
    correct: Correct | None = None,
    budget: Budget | None = None,
    costs: Mapping[Cut, float] | None = None,
    no_cut: Mapping[int, str] | None = None,
) -> Selection:
    """Apply one rule to the scores of all layers. Ties go to the shallower layer.

    - *validate*: the best score.
    - *within*: the shallowest layer at most `tolerance` below the best.
    - *non-inferior*: the shallowest layer whose accuracy, less that of the best on the same texts,
      lies above -`margin` with 97.5 % confidence (lower end of Tango's 95 % score interval).
    - *elbow*: on the curve of the best score, from layer 0 to that score's layer: the first layer
      at or above lowest + 0.9 (best - lowest). There the drastic change is over.
    - *budget*: the best score among the cuts that cost at most `budget`.
    - *fixed*: the paper's 5/8 depth.
    - *oracle*: the best score on the test split. For comparison only, never a choice.
    - *manual*: the given `layer`.

    Args:
        scores: The score table. The embedding control is passed over.
        rule: See above.
        layer: The user's layer. Rule *manual* alone takes one.
        chips: Look only at these. None looks at all.
        tolerance: Accuracy given up for depth, in [0, 1).
        margin: Accuracy that must not be lost, in [0, 1).
        correct: For rule *non-inferior*.
        budget: For rule *budget*.
        costs: For rule *budget*: what each cut costs, in the budget's unit.
        no_cut: Layers that no rule may choose, and why.

    Raises:
        ConfigError: If no score fits, `tolerance` or `margin` is out of range, there is no such
            layer or no cut after it, or the rule lacks what it needs.

    Source: *validate*, *fixed* and *oracle* arXiv:2410.06541, sections 4.1 and 5.2. The rest ours.
    """
    no_cut = no_cut or {}
    refuse_layer(layer, no_cut)
    rows = [score for score in scores if score.layer not in no_cut]
    table = _table(rows, "validation", chips)
    for name, value in (("tolerance", tolerance), ("margin", margin)):
        if not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}, expected 0 to 1.", "0.01 means one point.")
    best = _best(table)
    if rule == "validate":
        chosen, why = best, f"best validation accuracy, {_percent(best.accuracy)}"
    elif rule == "within":
        chosen, why = _within(table, best, tolerance)
    elif rule == "non-inferior":
        chosen, why = _non_inferior(table, best, margin, correct)
    elif rule == "elbow":
        chosen, why = _elbow(table, best)
    elif rule == "budget":
        chosen, why = _within_budget(table, budget, costs)
    elif rule == "fixed":
        n_layers = 1 + max(s.layer for s in table)  # the last can always be cut after
        depth = fixed_layer(n_layers)
        chosen = _at(table, min(s.layer for s in table if s.layer >= depth))
        nearest = "" if chosen.layer == depth else ": the next layer that can be cut after"
        why = f"the paper's fixed depth, 5/8 of {n_layers} layers{nearest}"
    elif rule == "oracle":
        chosen, why = _oracle(table, _table(rows, "test", chips))
    else:
        chosen, why = _at(table, layer), "chosen by hand"
    return Selection(rule, chosen.cut, why, chosen.accuracy)


def fixed_layer(n_layers: int) -> int:
    """The paper's fixed depth for any model: layer 20 of 32, 25 of 40."""
    return min(n_layers - 1, round(FIXED_DEPTH * n_layers))


def refuse_layer(layer: int | None, no_cut: Mapping[int, str], n_layers: int | None = None) -> None:
    """Refuse a layer that the model does not have, or cannot be cut after.

    Args:
        layer: The layer. None is none.
        no_cut: Layers that it cannot be cut after, and why.
        n_layers: Layers of the model, where that is not known to fit.

    Raises:
        ConfigError: With the reason.
    """
    if layer is not None and n_layers is not None and layer >= n_layers:
        raise ConfigError(
            f"Layer {layer} does not exist, the last is {n_layers - 1}.",
            "Give the last layer to keep, counted from 0.",
        )
    if layer is not None and layer in no_cut:
        next_one = next(i for i in range(layer, layer + len(no_cut) + 1) if i not in no_cut)
        raise ConfigError(
            f"The model cannot be cut after layer {layer}: {no_cut[layer]}.",
            f"Cut after layer {next_one}, the next one that its family can build.",
            "layer",
        )


def _table(scores: Sequence[Score], split: Split, chips: Collection[ChipKey] | None) -> list[Score]:
    """The scores a rule may look at."""
    table = [
        s
        for s in scores
        if s.split == split and s.layer != EMBEDDING_LAYER and (chips is None or s.key in chips)
    ]
    if not table:
        raise ConfigError(
            f"No {split} score of the chips that were named.",
            "Name a pooling and a chip that the run has trained; `show RUN` lists them.",
        )
    return table


def _within(table: Sequence[Score], best: Score, tolerance: float) -> tuple[Score, str]:
    chosen = _shallowest([s for s in table if s.accuracy >= best.accuracy - tolerance - _ROUNDING])
    return chosen, (
        f"shallowest layer within {_points(tolerance)} of the best validation accuracy {_top(best)}"
    )


def _non_inferior(
    table: Sequence[Score], best: Score, margin: float, correct: Correct | None
) -> tuple[Score, str]:
    if correct is None:
        raise ConfigError(
            "Rule non-inferior needs the predictions of the run.",
            "They stand in the run's folder, in predictions.safetensors.",
        )
    top = correct[best.key][best.layer]
    chosen = _shallowest(
        [
            s
            for s in table
            if s is best or paired_lower_bound(correct[s.key][s.layer], top) > -margin
        ]
    )
    return chosen, (
        f"shallowest layer that loses less than {_points(margin)} to the best {_top(best)} "
        f"with 97.5 % confidence (Tango's score interval, n = {best.n:,})"
    )


def _elbow(table: Sequence[Score], best: Score) -> tuple[Score, str]:
    curve = sorted((s for s in table if s.key == best.key), key=lambda s: s.layer)
    rising = [s for s in curve if s.layer <= best.layer]
    low = min(s.accuracy for s in rising)
    goal = low + ELBOW_SHARE * (best.accuracy - low)
    chosen = next(s for s in rising if s.accuracy >= goal - _ROUNDING)
    if low == best.accuracy:  # ties go to the shallower layer, so the best is the first
        return chosen, f"the curve of {_chip(best)} never rises above its first layer"
    return chosen, (
        f"first layer of {_chip(best)} at least {100 * ELBOW_SHARE:.0f} % of the way from "
        f"{_percent(low)} up to {_percent(best.accuracy)}"
    )


def _within_budget(
    table: Sequence[Score], budget: Budget | None, costs: Mapping[Cut, float] | None
) -> tuple[Score, str]:
    if budget is None or costs is None:
        raise ConfigError("Rule budget needs a budget.", "For example parameters=50%.", "budget")
    fitting = [s for s in table if costs[s.cut] <= budget.most]
    if not fitting:
        smallest = min(costs[s.cut] for s in table)
        raise ConfigError(
            f"No cut fits {budget.words}.",
            f"The smallest takes {_amount(smallest, budget.quantity)}; give a larger budget.",
        )
    chosen = _best(fitting)
    return chosen, (
        f"best validation accuracy, {_percent(chosen.accuracy)}, among cuts of at most "
        f"{budget.words}"
    )


def _oracle(table: Sequence[Score], test: Sequence[Score]) -> tuple[Score, str]:
    best = _best(test)
    chosen = {s.cut: s for s in table}[best.cut]
    return chosen, (
        f"best test accuracy, {_percent(best.accuracy)}: chosen on test, for comparison only"
    )


def _best(table: Sequence[Score]) -> Score:
    """Highest accuracy. Ties to the shallower layer, the lower log-loss, the simpler chip."""
    return min(table, key=lambda s: (-s.accuracy, s.layer, s.log_loss, s.key.name))


def _shallowest(table: Sequence[Score]) -> Score:
    layer = min(s.layer for s in table)
    return _best([s for s in table if s.layer == layer])


def _at(table: Sequence[Score], layer: int | None) -> Score:
    last = max(s.layer for s in table)
    if layer is None:
        raise ConfigError("Rule manual needs a layer.", f"Give one from 0 to {last}.")
    here = [s for s in table if s.layer == layer]
    if not here:
        raise ConfigError(
            f"Layer {layer} does not exist, layers are 0 to {last}.",
            "Give the last layer to keep, counted from 0.",
        )
    return _best(here)


def _chip(score: Score) -> str:
    key = score.key
    return key.vector.name if key.word == "linear" else f"{key.vector.name} {key.word}"


def _top(best: Score) -> str:
    return f"({_percent(best.accuracy)} at layer {best.layer}, {_chip(best)})"


def _points(share: float) -> str:
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _amount(value: float, quantity: Quantity) -> str:
    if quantity == "latency":
        return f"{1000 * value:.3g} ms"
    return f"{value:,.0f} {'bytes' if quantity == 'memory' else quantity}"
