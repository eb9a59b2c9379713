"""Runs of one task on one chart, accuracy against what is kept, and the table below it."""

import csv
import io
from contextlib import suppress
from dataclasses import asdict, fields
from typing import get_args

import pandas as pd
import streamlit as st

from chipviz.config import RECOMMENDED, Rule
from chipviz.errors import ChipvizError
from chipviz.results import compare as comparing
from chipviz.results.compare import Compared, Row
from chipviz.runs.store import Job
from chipviz.ui import formatting, nav, state, widgets
from chipviz.ui.plots import comparison

MOST = 12
"""Maximum runs that are compared at once."""


def show() -> None:
    """Draw the choice of runs, the chart and the table."""
    done = [job for job in state.store().runs() if job.state == "done"]
    if not done:
        st.info("No finished run yet. Train chips on a few backbones, then compare them here.")
        nav.link("runs", "Go to the home page")
        return
    chosen, rule, axis = _choose(done)
    if not chosen:
        st.caption("Name the runs to compare. They must be of one task, with the same test texts.")
        return
    try:
        runs = [_compared(run_id) for run_id in chosen]
        rows = comparing.compare(runs, rule)
    except ChipvizError as error:
        widgets.show_error(error)
        return
    reference = comparing.reference_of(runs).report
    st.plotly_chart(
        comparison.comparison_figure(runs, rows, axis=axis, look=state.look()),
        key="comparison",
        theme=None,
        config={"displayModeBar": False},
        alt="Test accuracy against what is kept, one curve a backbone, with every run's cut",
    )
    st.caption(
        f"Differences are to the best chip on the last layer of "
        f"{formatting.plain(reference.backbone.name)}, on the same test texts, with 95 % intervals "
        "of texts drawn again. A hollow mark is a model that answers by itself."
    )
    _table(rows)


def _choose(done: list[Job]) -> tuple[list[str], Rule, comparison.Axis]:
    """The runs, the rule that cuts them and the axis, kept in the address."""
    known = {job.run_id: job for job in done}
    named = [run for run in st.query_params.get("runs", "").split(",") if run in known]
    if "compare_runs" not in st.session_state:
        st.session_state["compare_runs"] = named or _alike(done)
    st.session_state["compare_runs"] = [r for r in st.session_state["compare_runs"] if r in known]
    chosen = st.multiselect(
        "Runs",
        list(known),
        key="compare_runs",
        format_func=lambda run: f"{known[run].name}, {formatting.ago(known[run].created)}",
        max_selections=MOST,
    )
    rules: list[Rule] = [r for r in get_args(Rule) if r not in ("manual", "budget")]
    axes = list(get_args(comparison.Axis))
    asked_rule, asked_axis = (st.query_params.get(name) for name in ("rule", "axis"))
    left, right = st.columns(2)
    rule = left.selectbox(
        "Cut by rule",
        rules,
        index=rules.index(asked_rule if asked_rule in rules else RECOMMENDED),
        key="compare_rule",
    )
    axis = right.segmented_control(
        "Against",
        axes,
        default=asked_axis if asked_axis in axes else axes[0],
        required=True,
        key="compare_axis",
    )
    wanted = {"runs": ",".join(chosen), "rule": rule, "axis": axis}
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)
    return chosen, rule, axis


def _alike(done: list[Job]) -> list[str]:
    """The newest run, and those of the newest ones that were tested on the same texts."""
    store, found = state.store(), list[tuple[str, str | None]]()
    for job in done[:MOST]:
        with suppress(ChipvizError):
            found.append((job.run_id, store.report(job.run_id).task.test_fingerprint))
    return [run for run, texts in found if texts == found[0][1]]


def _compared(run_id: str) -> Compared:
    store = state.store()
    return Compared(store.report(run_id), store.folder(run_id).read_predictions())


def _table(rows: list[Row]) -> None:
    shown = pd.DataFrame(
        {
            "backbone": [row.backbone for row in rows],
            "method": [row.method for row in rows],
            "chip": [f"layer {row.layer}, {row.chip}" if row.chip else "none" for row in rows],
            "layer ratio, %": [100 * row.layer_ratio for row in rows],
            "parameter ratio, %": [100 * row.parameter_ratio for row in rows],
            "accuracy, %": [100 * row.accuracy for row in rows],
            "from": [100 * row.accuracy_low for row in rows],
            "to": [100 * row.accuracy_high for row in rows],
            "difference, points": [100 * row.difference for row in rows],
            "at least": [100 * row.difference_low for row in rows],
            "at most": [100 * row.difference_high for row in rows],
            "texts": [row.n for row in rows],
        }
    )
    numbers = [name for name in shown.columns if shown[name].dtype == float]
    st.dataframe(
        shown,
        key="compare_table",
        hide_index=True,
        column_config={name: st.column_config.NumberColumn(format="%.1f") for name in numbers},
    )
    with st.container(horizontal=True):
        st.download_button(
            "CSV", _csv(rows), "comparison.csv", "text/csv", key="compare_csv", on_click="ignore"
        )
    with st.expander("Markdown to copy"):
        st.code(comparing.as_markdown(rows), language=None, wrap_lines=True)


def _csv(rows: list[Row]) -> str:
    """All numbers of the table. No cell begins as a formula does."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)])
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _harmless(value) for name, value in asdict(row).items()})
    return text.getvalue()


def _harmless(value: object) -> object:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
