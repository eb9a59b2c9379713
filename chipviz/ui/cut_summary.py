"""The answer beside the curve: where the cut is, what it scores, what it keeps and saves."""

import streamlit as st

from chipviz.keys import Cut, Split
from chipviz.results.metrics import Score, mcnemar
from chipviz.results.report import Measured, RunReport
from chipviz.results.run_folder import Predictions
from chipviz.ui import widgets
from chipviz.ui.formatting import megabytes, millions, milliseconds, percent, plain
from chipviz.ui.plots.theme import chip_name

SURE = 0.05
"""Probability below which a difference of two chips is called sure."""


def show(report: RunReport, cut: Cut, predictions: Predictions | None) -> None:
    """Draw the headline, the scores, the stack with its savings, and how they were measured."""
    layers = report.backbone.n_layers
    st.html(
        f'<div class="cv-big">Cut at layer <span class="cv-accent">{cut.layer}</span> '
        f"of {layers}</div>"
    )
    validation, test = _at(report, cut, "validation"), _at(report, cut, "test")
    scores = [
        (percent(validation.accuracy), f"{report.judged} ({_interval(validation)})"),
        (percent(test.accuracy), f"test ({_interval(test)}, n = {test.n:,})"),
    ]
    if test.auroc is not None:
        words = f"AUROC on test, average precision {test.average_precision:.3f}"
        scores.append((f"{test.auroc:.3f}", words))
    st.html(widgets.facts(scores))
    st.caption(loss_words(report, cut, predictions))
    drawing = widgets.stack(layers, cut.layer)
    st.html(f'<div class="cv-side">{drawing}{widgets.facts(savings(report, cut))}</div>')
    st.caption(plain(_measured_words(report.measured, report.task.rows)))
    with st.popover("Parameters by part", type="tertiary", key="parts"):
        st.html(widgets.facts(by_part(report, cut)))


def loss_words(report: RunReport, cut: Cut, predictions: Predictions | None) -> str:
    """Compare the cut with the best chip on the same test texts.

    Intervals of two accuracies say too little: two chips on the same texts can differ for sure
    while their intervals still touch. McNemar's test looks at the texts that only one gets right.
    """
    best = report.selection["validate"].cut
    top, test = _at(report, best, "test"), _at(report, cut, "test")
    name = f"the best chip (layer {best.layer}, {chip_name(best.chip)}: {percent(top.accuracy)})"
    if best == cut:
        return "This is the best chip on validation."
    points = 100 * (test.accuracy - top.accuracy)
    gap = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
    if predictions is None:
        return f"{gap} {name}."
    here, there = (predictions.at(one, "test") == predictions.labels["test"] for one in (cut, best))
    p = mcnemar(here, there)
    on_texts = f"on the same {test.n:,} {report.task.rows} (McNemar, p = {p:.2g})"
    if p < SURE:
        return f"{gap} {name}: a sure difference {on_texts}."
    return f"No measurable loss against {name}: {gap} {on_texts}."


def _at(report: RunReport, cut: Cut, split: Split) -> Score:
    return report.score_at(cut, split)


def _interval(score: Score) -> str:
    return f"{100 * score.accuracy_low:.1f}-{100 * score.accuracy_high:.1f}"


def savings(report: RunReport, cut: Cut) -> list[tuple[str, str]]:
    """Figures and their meaning, cut against dense. What was not measured is left out."""
    cost, dense = report.cost_at(cut), report.dense
    kept = cost.n_parameters / dense.n_parameters
    rows = [
        (
            f"{100 * kept:.0f} % kept",
            f"{millions(cost.n_parameters)} of {millions(dense.n_parameters)} parameters",
        ),
        (megabytes(cost.weight_bytes), f"of {megabytes(dense.weight_bytes)} on disk"),
        (_times(dense.flops_per_token, cost.flops_per_token, "fewer"), "FLOPs a token"),
    ]
    if cost.latency_s and dense.latency_s:
        rows.append(
            (
                _times(dense.latency_s, cost.latency_s, "faster"),
                f"{milliseconds(dense.latency_s)} → {milliseconds(cost.latency_s)}",
            )
        )
    if cost.peak_bytes and dense.peak_bytes:
        rows.append(
            (
                megabytes(cost.peak_bytes),
                f"of {megabytes(dense.peak_bytes)} peak memory",
            )
        )
    return [
        *rows,
        (percent(cost.layer_ratio), "of layers removed (layer ratio)"),
        (percent(cost.parameter_ratio), "of parameters removed (parameter ratio)"),
    ]


def _times(dense: float, cut: float, word: str) -> str:
    return f"{dense / max(cut, 1e-12):.1f}x {word}"


def _measured_words(measured: Measured, rows: str) -> str:
    read = f"1 {rows[:-1]}" if measured.batch == 1 else f"{measured.batch} {rows}"
    return (
        f"Time and memory of one pass over {read} of {measured.n_tokens} tokens, "
        f"median of {measured.repeats}, on {measured.device} in {measured.dtype}."
    )


def by_part(report: RunReport, cut: Cut) -> list[tuple[str, str]]:
    """What the published model's parts count, and what becomes of each at this cut."""
    whole = report.parts
    kept, chip = whole.blocks[: cut.layer + 1], report.cost_at(cut)
    removed = whole.blocks[cut.layer + 1 :]
    head = "head: the embedding again, counted once" if whole.tied else "head, removed"
    rows = [
        (whole.embedding, "embedding, kept"),
        (sum(kept), f"{len(kept)} blocks, kept"),
        (sum(removed), f"{len(removed)} blocks, removed"),
        (whole.final_norm, "final norm, kept"),
        (whole.lm_head, f"language model's {head}"),
        (whole.other, "the rest, kept"),
        (chip.chip_parameters, f"the chip ({chip_name(cut.chip)}), added"),
    ]
    return [(f"{count:,}", words) for count, words in rows if count or "head" in words]
