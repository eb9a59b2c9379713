"""What a bundle may have beside its chip: rounded weights, early exits, a threshold."""

from typing import Any, get_args

import streamlit as st

from chipviz.bundle.remarks import exits_in_words, threshold_in_words
from chipviz.config import DEFAULT_MARGIN, CutSpec, StoredDtype
from chipviz.errors import ChipvizError
from chipviz.keys import Cut
from chipviz.results.exits import plan_exits, trade_off
from chipviz.results.report import RunReport
from chipviz.results.run_folder import Predictions
from chipviz.results.thresholds import choose_threshold
from chipviz.ui import formatting, state, widgets
from chipviz.ui.plots.exits import exits_figure

_LIKELIER, _ALARMS, _COSTS = "the likelier class", "false alarms", "costs of errors"


def extras(report: RunReport, spec: CutSpec) -> CutSpec:
    """Ask what else the bundle is to have, and show what it would do.

    Args:
        report: Of the run.
        spec: The cut.

    Returns:
        The same cut with what is asked for.
    """
    with st.expander("More choices", icon=":material/tune:"):
        chosen: dict[str, Any] = {"dtype": _dtype()}
        said = state.predictions(report.run_id)
        if said is None or spec.key not in said.temperatures:
            st.caption("Early exits and thresholds need a run of this version: train it again.")
            return spec.asking(**chosen)
        if report.task.kind == "text" and not spec.key.joins:
            chosen["exit_margin"] = _exits(report, spec.cut, said)
        if len(report.task.label_names) == 2 and not chosen.get("exit_margin"):
            chosen |= _threshold(report, spec.cut, said)
    return spec.asking(**chosen)


def _dtype() -> str | None:
    published = "as published"
    chosen = st.selectbox(
        "Weights kept",
        [published, *get_args(StoredDtype)],
        key="bundle_dtype",
        help="The chip stays float32. What rounding moves is measured and stands on the card.",
    )
    return None if chosen == published else chosen


def _exits(report: RunReport, cut: Cut, said: Predictions) -> float | None:
    if not st.toggle(
        "Early exits",
        key="bundle_exits",
        help="Each text leaves at the first chip that is sure. Stock loaders do not see them.",
    ):
        return None
    points = st.number_input(
        "Accuracy not to lose, points",
        min_value=0.1,
        max_value=20.0,
        value=100 * DEFAULT_MARGIN,
        step=0.5,
        key="bundle_margin",
    )
    margin = points / 100
    try:
        found = ("plan", report.run_id, cut, margin)
        plan = state.drawn_once(found, lambda: plan_exits(said, cut, margin))
    except ChipvizError as error:
        widgets.show_error(error)
        return None
    st.write(exits_in_words(plan))
    figure = state.drawn_once(
        ("exits", report.run_id, cut, margin, state.look()),
        lambda: exits_figure(
            plan,
            {
                "validation": trade_off(said, cut, "validation"),
                "test": trade_off(said, cut, "test"),
            },
            look=state.look(),
        ),
    )
    st.plotly_chart(
        figure,
        key="exits_chart",
        theme=None,
        config={"displayModeBar": False},
        alt="Accuracy against the mean number of layers that a text runs through.",
    )
    st.dataframe(
        {
            "layer": plan.layers,
            "test texts that leave there": [formatting.percent(s) for s in plan.test.shares],
        },
        hide_index=True,
    )
    return margin


def _threshold(report: RunReport, cut: Cut, said: Predictions) -> dict[str, Any]:
    names = report.task.label_names
    how = st.selectbox("Answer by", [_LIKELIER, _ALARMS, _COSTS], key="bundle_answer")
    if how == _LIKELIER:
        return {}
    positive = st.selectbox("Class that is looked for", names, 1, key="bundle_positive")
    if how == _ALARMS:
        rate = st.number_input(
            "False alarms at most, %", 0.1, 50.0, 5.0, step=1.0, key="bundle_rate"
        )
        rule = f"fpr={rate:g}%"
    else:
        price = st.number_input(
            "Cost of a miss, in false alarms", 0.1, 1_000.0, 10.0, step=1.0, key="bundle_cost"
        )
        rule = f"cost=1:{price:g}"
    try:
        found = choose_threshold(said, cut, rule, names, positive)
    except ChipvizError as error:
        widgets.show_error(error)
        return {}
    st.write(threshold_in_words(found, [formatting.plain(name) for name in names]))
    return {"threshold": rule, "positive": positive}
