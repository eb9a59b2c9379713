"""What a cut saves and costs, and the views under the curve."""

import numpy as np
import streamlit as st

from chipviz import charts
from chipviz.config import Split
from chipviz.metrics import Score, confusion_matrix
from chipviz.report import RunReport, load_examples, load_predictions
from chipviz.store import Job
from chipviz.ui import parts, state
from chipviz.ui.state import Cut

MISTAKES_SHOWN = 50


def savings(report: RunReport, cut: Cut) -> None:
    """The answer: where the cut is, what it scores, what stays and what goes."""
    layers = report.backbone.n_layers
    st.html(
        f'<div class="cv-big">Cut at layer <span class="cv-accent">{cut.layer}</span> '
        f"of {layers}</div>"
    )
    validation, test = _at(report, cut, "validation"), _at(report, cut, "test")
    scores = [
        (parts.percent(validation.accuracy), f"validation ({_interval(validation)})"),
        (parts.percent(test.accuracy), f"test ({_interval(test)}, n = {test.n:,})"),
    ]
    st.html(parts.facts(scores))
    st.caption(loss_words(report, cut))
    drawing = parts.stack(layers, cut.layer)
    st.html(f'<div class="cv-side">{drawing}{parts.facts(_saved(report, cut))}</div>')


def loss_words(report: RunReport, cut: Cut) -> str:
    """Compare the cut with the best chip on test, claiming no more than the interval allows.

    Overlapping intervals would be too weak a claim: two chips on the same texts can differ
    for sure while their intervals still touch.
    """
    best = report.selection["validate"]
    top = report.score_at(best.cut_layer, best.pooling, best.chip, "test")
    test = _at(report, cut, "test")
    name = f"the best chip (layer {best.cut_layer}, {best.pooling}: {parts.percent(top.accuracy)})"
    if (best.cut_layer, best.pooling) == (cut.layer, cut.pooling):
        return "This is the best chip on validation."
    if test.accuracy >= top.accuracy_low:
        return f"No measurable loss against {name}: inside its interval at n = {test.n:,}."
    return f"{100 * (top.accuracy - test.accuracy):.1f} points below {name}."


def tabs(job: Job, report: RunReport, cut: Cut) -> None:
    """The views under the curve; the table is the chart's accessible twin."""
    size, learning, confusion, mistakes, table = st.tabs(
        ["Accuracy against size", "Learning curve", "Confusion", "What the cut gets wrong", "Table"]
    )
    look = state.look()
    with size:
        figure = charts.size_figure(report, cut_layer=cut.layer, pooling=cut.pooling, look=look)
        _chart(figure, "size", "Accuracy against parameters kept")
    with learning:
        points = state.store().points(job.run_id)
        if points:
            figure = charts.learning_figure(points, cut_layer=cut.layer, look=look)
            _chart(figure, "learning", "Accuracy against training texts")
        else:
            st.info("This run read stored features, so there is no history to draw.")
    found = _test_predictions(job, cut)
    with confusion:
        _confusion(report, found)
    with mistakes:
        _mistakes(job, report, found)
    with table:
        st.dataframe(_table(report), hide_index=True, height=420)


def _at(report: RunReport, cut: Cut, split: Split) -> Score:
    return report.score_at(cut.layer, cut.pooling, "linear", split)


def _interval(score: Score) -> str:
    return f"{100 * score.accuracy_low:.1f}-{100 * score.accuracy_high:.1f}"


def _saved(report: RunReport, cut: Cut) -> list[tuple[str, str]]:
    cost, dense = report.cost_at(cut.layer, cut.pooling), report.dense
    kept = cost.n_parameters / dense.n_parameters
    return [
        (
            f"{100 * kept:.0f} % kept",
            f"{parts.millions(cost.n_parameters)} of {parts.millions(dense.n_parameters)} "
            "parameters",
        ),
        (
            f"{parts.megabytes(cost.weight_bytes)}",
            f"of {parts.megabytes(dense.weight_bytes)}",
        ),
        (
            f"{dense.flops_per_token / max(cost.flops_per_token, 1):.1f}x fewer",
            "FLOPs a token",
        ),
        (parts.percent(cost.layer_ratio), "of layers removed (layer ratio)"),
        (parts.percent(cost.parameter_ratio), "of parameters removed (parameter ratio)"),
    ]


def _chart(figure: object, key: str, alt: str) -> None:
    st.plotly_chart(
        figure,  # pyright: ignore[reportArgumentType]
        key=f"{key}_chart",
        theme=None,
        config={"displayModeBar": False},
        alt=alt,
    )


def _test_predictions(job: Job, cut: Cut) -> tuple[np.ndarray, np.ndarray] | None:
    """True and predicted class of every test text at the cut, each of shape (N,)."""
    try:
        arrays = load_predictions(state.store().run_dir(job.run_id))
    except OSError:
        return None
    return arrays["labels.test"], arrays[f"test.{cut.pooling}.linear"][cut.layer]


def _confusion(report: RunReport, found: tuple[np.ndarray, np.ndarray] | None) -> None:
    if found is None:
        st.info("The predictions of this run are not on disk any more.")
        return
    labels, predicted = (values.astype(np.int64) for values in found)
    counts = confusion_matrix(labels, predicted, report.task.n_classes)
    figure = charts.confusion_figure(
        counts,
        report.task.label_names,
        subtitle=f"test, n = {len(labels):,}; rows are the truth",
        look=state.look(),
    )
    _chart(figure, "confusion", "Counts of true against predicted class")


def _mistakes(job: Job, report: RunReport, found: tuple[np.ndarray, np.ndarray] | None) -> None:
    examples = load_examples(state.store().run_dir(job.run_id))
    if found is None or not examples:
        st.info("The texts of this run are not on disk any more.")
        return
    labels, predicted = found
    names = report.task.label_names
    wrong = [i for i in np.flatnonzero(labels != predicted) if i < len(examples)]
    st.caption(f"{len(wrong):,} of {len(labels):,} test texts; up to {MISTAKES_SHOWN} are shown.")
    st.dataframe(
        {
            "text": [examples[i].text for i in wrong[:MISTAKES_SHOWN]],
            "truth": [names[labels[i]] for i in wrong[:MISTAKES_SHOWN]],
            "the chip says": [names[predicted[i]] for i in wrong[:MISTAKES_SHOWN]],
        },
        hide_index=True,
        column_config={"text": st.column_config.TextColumn(width="large")},
    )


def _table(report: RunReport) -> list[dict[str, object]]:
    return [
        {
            "layer": str(s.layer) if s.layer >= 0 else "embedding",
            "pooling": s.pooling,
            "chip": s.chip,
            "split": s.split,
            "n": s.n,
            "accuracy, %": round(100 * s.accuracy, 1),
            "low, %": round(100 * s.accuracy_low, 1),
            "high, %": round(100 * s.accuracy_high, 1),
            "macro-F1": round(s.macro_f1, 3),
            "log-loss": round(s.log_loss, 3),
            "ECE": round(s.ece, 3),
        }
        for s in report.scores
    ]
