"""What every rule would give: layer, accuracy, distance to the best, and what the cut saves."""

import html

from chipviz.config import RECOMMENDED, Rule
from chipviz.keys import Cut
from chipviz.results.metrics import paired_lower_bound
from chipviz.results.report import RunReport
from chipviz.results.run_folder import Predictions
from chipviz.ui.cut import RULE_NAMES
from chipviz.ui.plots.theme import chip_name

HEADS = ("Rule", "Cut", "Validation (95 %)", "To the best (95 %)", "Size", "Speed")


def rule_table(report: RunReport, cut: Cut, predictions: Predictions | None) -> str:
    """One row per rule in HTML, the recommended one first; rows that say the cut stand out.

    Args:
        report: Of a finished run.
        cut: The present cut.
        predictions: What its chips predicted; without them no distance has an interval.
    """
    rules = sorted(RULE_NAMES, key=lambda rule: rule != RECOMMENDED)
    rows = "".join(
        _row(report, rule, cut, predictions) for rule in rules if rule in report.selection
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    return f'<div class="cv-rules"><table><tr>{heads}</tr>{rows}</table></div>'


def _row(report: RunReport, rule: Rule, cut: Cut, predictions: Predictions | None) -> str:
    choice = report.selection[rule]
    score, cost = report.score_at(choice.cut, "validation"), report.cost_at(choice.cut)
    speed = ""
    if report.dense.latency_s and cost.latency_s:
        speed = f"{report.dense.latency_s / cost.latency_s:.1f} x"
    cells = [
        f"{choice.cut_layer}, {chip_name(choice.key)}",
        f"{100 * score.accuracy:.1f} % ({_range(score.accuracy_low, score.accuracy_high)})",
        _distance(report, choice.cut, predictions),
        f"{100 * cost.n_parameters / report.dense.n_parameters:.0f} %",
        speed,
    ]
    name = RULE_NAMES[rule] + (" (recommended)" if rule == RECOMMENDED else "")
    here = ' class="cv-here"' if choice.cut == cut else ""
    rest = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<tr{here}><th scope="row">{name}</th>{rest}</tr>'


def _distance(report: RunReport, cut: Cut, predictions: Predictions | None) -> str:
    """Points of validation accuracy between a cut and the best chip, in pairs of texts."""
    best = report.selection["validate"].cut
    if cut == best:
        return "best"
    gap = report.score_at(cut, "validation").accuracy - report.score_at(best, "validation").accuracy
    points = f"{100 * gap:+.1f}"
    if predictions is None:
        return points
    labels = predictions.labels["validation"]
    here, there = (predictions.at(one, "validation") == labels for one in (cut, best))
    low, high = paired_lower_bound(here, there), -paired_lower_bound(there, here)
    return f"{points} ({100 * low:+.1f} to {100 * high:+.1f})"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f}-{100 * high:.1f}"
