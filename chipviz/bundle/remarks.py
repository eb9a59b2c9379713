"""What a card says of early exits, of a threshold and of rounded numbers."""

from typing import Any

from chipviz.bundle.metadata import Metadata
from chipviz.results.exits import NEVER, ExitPlan
from chipviz.results.thresholds import Threshold


def remarks(metadata: Metadata) -> str:
    """Sections of a card, for what its bundle has."""
    parts = []
    if metadata.threshold is not None:
        parts.append(_threshold(metadata.threshold, metadata))
    if metadata.exits is not None:
        parts.append(_exits(metadata.exits))
    if drift := metadata.everything.get("drift"):
        parts.append(_drift(drift))
    return "".join(f"\n{part}\n" for part in parts)


def exits_in_words(plan: ExitPlan) -> str:
    """What early exits reach, and whether they pay."""
    test, last = plan.test, plan.layers[-1] + 1
    if plan.threshold == NEVER:
        return (
            f"No text may leave early: {plan.validation.n} validation texts cannot show that less "
            f"than {100 * plan.margin:g} points would be lost. A fixed cut is as good."
        )
    saved = (
        f"On the test split a text runs through {test.mean_layers:.1f} of {last} layers, with "
        f"{100 * test.accuracy:.1f} % accuracy ({100 * test.accuracy_low:.1f} to "
        f"{100 * test.accuracy_high:.1f}); all texts read to the end give "
        f"{100 * test.fixed_accuracy:.1f} %."
    )
    rival = f"A single cut that passes the same test keeps {plan.fixed_layer + 1} layers"
    verdict = "early exits save more" if plan.pays else "early exits do not pay here"
    return f"{saved} {rival}: {verdict}."


def threshold_in_words(found: Threshold, names: list[str]) -> str:
    """From where on the answer is yes, and what that gives on test."""
    test, name = found.test, names[found.positive]
    return (
        f"The answer is “{name}” from a probability of {found.at:.4f} on ({found.rule}, chosen on "
        f"validation). On the test split: {100 * test.false_positive_rate:.1f} % false alarms, "
        f"{100 * test.true_positive_rate:.1f} % found, accuracy {100 * test.accuracy:.1f} %."
    )


def _exits(plan: ExitPlan) -> str:
    rows = "\n".join(
        f"| {layer} | {100 * share:.0f} % |"
        for layer, share in zip(plan.layers, plan.test.shares, strict=True)
    )
    return f"""## Early exits

`python -m chipviz predict PATH --adaptive` lets a text leave at the first chip that is sure
(calibrated probability {plan.sure:.3f} or more). {exits_in_words(plan)}

| layer | test texts that leave there |
| ---: | ---: |
{rows}

Stock loaders read the bundle to its last layer."""


def _threshold(found: Threshold, metadata: Metadata) -> str:
    names = metadata.task.label_names
    plain = ["".join(c for c in name if c.isalnum() or c in " ._-/")[:120] for name in names]
    return f"""## Threshold

{threshold_in_words(found, plain)}
`python -m chipviz predict` and `serve` use it; stock loaders give probabilities and need the
comparison."""


def _drift(drift: list[dict[str, Any]]) -> str:
    rows = "\n".join(
        f"| {one['what']} | {one['batch']} | {one['n_agree']} of {one['n']} | "
        f"{one['max_difference']:.1e} |"
        for one in drift
    )
    return f"""## Rounding

Probabilities beside those of the run's own chip, on validation texts.

| numbers | texts a pass | same label | largest difference |
| --- | ---: | ---: | ---: |
{rows}"""
