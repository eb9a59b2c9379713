"""The views under the curve: size, learning, confusion, mistakes, and the table behind them all."""

import csv
import io
from collections.abc import Sequence

import numpy as np
import streamlit as st

from chipviz.keys import Cut
from chipviz.results.metrics import Score, confusion_matrix
from chipviz.results.report import RunReport
from chipviz.results.run_folder import Predictions
from chipviz.runs.store import Job
from chipviz.ui import state, thumbnails
from chipviz.ui.plots import curves, heatmaps
from chipviz.ui.plots.theme import chip_name

MISTAKES_SHOWN = 50
CHARS_SHOWN = 2_000
"""Characters of a text that a table shows."""
CONFUSIONS_SHOWN = 50


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
VIEWS = (
    "Accuracy against size",
    "Learning curve",
    "Confusion",
    "What the cut gets wrong",
    "Table",
)


def tabs(job: Job, report: RunReport, cut: Cut, predictions: Predictions | None) -> None:
    """Draw the open tab alone: a moved slider need not wait for four hidden ones.

    The table is the charts' accessible twin.
    """
    # True and predicted class of every test text at the cut, each of shape (N,).
    found = predictions and (predictions.labels["test"], predictions.at(cut, "test"))
    size, learning, confusion, mistakes, table = st.tabs(VIEWS, key="views", on_change="rerun")
    if size.open:
        with size:
            figure = curves.size_figure(report, cut=cut, look=state.look())
            _chart(figure, "size", "Accuracy against parameters kept")
    if learning.open:
        with learning:
            _learning(job, cut)
    if confusion.open:
        with confusion:
            _confusion(report, cut, found)
    if mistakes.open:
        with mistakes:
            _mistakes(job, report, found)
    if table.open:
        with table:
            _scores(report)


def _chart(figure: object, key: str, alt: str) -> None:
    st.plotly_chart(
        figure,  # pyright: ignore[reportArgumentType]
        key=f"{key}_chart",
        theme=None,
        config={"displayModeBar": False},
        alt=alt,
    )


def _learning(job: Job, cut: Cut) -> None:
    points = state.store().points(job.run_id)
    steps = {p.n_train for p in points if p.cut.chip == cut.chip}
    if len(steps) < 2:
        st.info(
            "This chip was fitted once, on all texts, so there is no history to draw: linear chips "
            "are drawn while texts are read, unless the texts had been read by an earlier run."
        )
        return
    figure = curves.learning_figure(points, cut=cut, look=state.look())
    _chart(figure, "learning", "Accuracy against training texts")


def _confusion(report: RunReport, cut: Cut, found: tuple[np.ndarray, np.ndarray] | None) -> None:
    if found is None:
        st.info("The predictions of this run are not on disk any more.")
        return
    labels, predicted = (values.astype(np.int64) for values in found)
    counts = confusion_matrix(labels, predicted, report.task.n_classes)
    many = report.task.n_classes > heatmaps.MAX_CLASSES
    draw = heatmaps.coarse_confusion_figure if many else heatmaps.confusion_figure
    figure = draw(
        counts,
        report.task.label_names,
        subtitle=f"layer {cut.layer}, {chip_name(cut.chip)}; test, n = {len(labels):,}",
        look=state.look(),
    )
    if many:
        _largest_confusions(counts, report.task.label_names)
    _chart(figure, "confusion", "Counts of true against predicted class")


def _largest_confusions(counts: np.ndarray, names: Sequence[str]) -> None:
    """A table of the pairs of classes that are mixed up most often."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:CONFUSIONS_SHOWN]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place] > 0]
    st.caption(
        f"{len(names):,} classes. The {len(pairs)} largest of {np.count_nonzero(wrong):,} "
        "confusions, and under them a coarse map."
    )
    st.dataframe(
        {
            "true class": [names[truth][:CHARS_SHOWN] for truth, _ in pairs],
            "the chip says": [names[said][:CHARS_SHOWN] for _, said in pairs],
            "rows": [int(wrong[pair]) for pair in pairs],
            "of this class": [int(counts[truth].sum()) for truth, _ in pairs],
        },
        hide_index=True,
    )


def _mistakes(job: Job, report: RunReport, found: tuple[np.ndarray, np.ndarray] | None) -> None:
    examples = state.store().folder(job.run_id).read_examples("test")
    if found is None or not examples:
        st.info(f"The {report.task.rows} of this run are not on disk any more.")
        return
    labels, predicted = found
    names = report.task.label_names
    wrong = [i for i in np.flatnonzero(labels != predicted) if i < len(examples)]
    st.caption(
        f"{len(wrong):,} of {len(labels):,} test {report.task.rows}; up to {MISTAKES_SHOWN} are "
        "shown."
    )
    if report.task.kind == "image":
        shown = wrong[:MISTAKES_SHOWN]
        st.dataframe(
            {
                "picture": [thumbnails.thumbnail(examples[i].text) for i in shown],
                "truth": [names[labels[i]] for i in shown],
                "the chip says": [names[predicted[i]] for i in shown],
            },
            hide_index=True,
            row_height=96,
            column_config={"picture": st.column_config.ImageColumn(width="small")},
        )
        return
    st.dataframe(
        {
            "text": [examples[i].text[:CHARS_SHOWN] for i in wrong[:MISTAKES_SHOWN]],
            "truth": [names[labels[i]] for i in wrong[:MISTAKES_SHOWN]],
            "the chip says": [names[predicted[i]] for i in wrong[:MISTAKES_SHOWN]],
        },
        hide_index=True,
        column_config={"text": st.column_config.TextColumn(width="large")},
    )
    rows = [(examples[i].text, names[labels[i]], names[predicted[i]]) for i in wrong]
    st.download_button(
        "Download all as CSV",
        lambda: mistakes_csv(rows),
        f"chipviz-{report.run_id}-mistakes.csv",
        "text/csv",
        key="mistakes_csv",
        icon=":material/download:",
        on_click="ignore",
    )


def mistakes_csv(rows: Sequence[tuple[str, str, str]]) -> str:
    """Text, true and predicted label of every mistake.

    A cell that a spreadsheet would run as a formula gets an apostrophe before it (OWASP).
    """
    text = io.StringIO()
    lines = csv.writer(text)  # its ends of lines: a cell with either half of one is quoted
    lines.writerow(["text", "label", "prediction"])
    for row in rows:
        lines.writerow([f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in row])
    return text.getvalue()


def _scores(report: RunReport) -> None:
    decimals = {"accuracy, %": "%.1f", "macro-F1": "%.3f", "log-loss": "%.3f", "ECE": "%.3f"}
    columns = {
        name: st.column_config.NumberColumn(format=form) for name, form in decimals.items()
    } | {"layer": st.column_config.TextColumn(width=96)}
    st.dataframe(_table(report), hide_index=True, height=420, column_config=columns)
    st.download_button(
        "Download as CSV",
        scores_csv(report.scores),
        f"chipviz-{report.run_id}.csv",
        "text/csv",
        key="scores_csv",
        icon=":material/download:",
        on_click="ignore",
    )


def scores_csv(scores: list[Score]) -> str:
    """Every score with all its digits, one a line. `repeats` are set apart by spaces."""
    text = io.StringIO()
    rows = [score.model_dump() for score in scores]
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    for row in rows:
        lines.writerow(row | {"repeats": " ".join(map(str, row["repeats"]))})
    return text.getvalue()


def _table(report: RunReport) -> list[dict[str, object]]:
    """What is read first stands first: a narrow screen shows the left columns."""
    return [
        {
            "layer": str(s.layer) if s.layer >= 0 else "embedding",
            "chip": chip_name(s.key),
            "split": s.split,
            "accuracy, %": round(100 * s.accuracy, 1),
            "accuracy, 95 %": f"{100 * s.accuracy_low:.1f} to {100 * s.accuracy_high:.1f}",
            "macro-F1": round(s.macro_f1, 3),
            "macro-F1, 95 %": f"{s.macro_f1_low:.3f} to {s.macro_f1_high:.3f}",
            "log-loss": round(s.log_loss, 3),
            "log-loss, 95 %": f"{s.log_loss_low:.3f} to {s.log_loss_high:.3f}",
            **_ranking(s),
            "ECE": round(s.ece, 3),
            "ECE, 95 %": f"{s.ece_low:.3f} to {s.ece_high:.3f}",
            "n": s.n,
        }
        for s in report.scores
    ]


def _ranking(score: Score) -> dict[str, float]:
    """What two classes have beside accuracy."""
    if score.auroc is None or score.average_precision is None:
        return {}
    return {
        "AUROC": round(score.auroc, 4),
        "average precision": round(score.average_precision, 4),
    }
