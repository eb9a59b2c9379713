"""The widgets that choose a cut, the same on every page: slider, pooling, rules, chart click."""

from typing import get_args

import streamlit as st

from chipviz import charts
from chipviz.config import Pooling, Rule
from chipviz.report import RunReport, SelectionInfo
from chipviz.ui import state
from chipviz.ui.state import Cut

RULE_NAMES: dict[Rule, str] = {
    "validate": "Best",
    "within": "Within 1 point",
    "fixed": "Fixed 5/8",
}


def controls(report: RunReport) -> Cut:
    """Draw slider and pooling choice, both views of the kept cut, and return it.

    A widget that is new on this page starts at the kept cut; one that is here already is moved.
    """
    cut = state.current_cut(report)
    _show("cut", cut.layer)
    _show("pooling", cut.pooling)
    last = report.backbone.n_layers - 1
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    if last > 0:
        with left:
            st.slider("Cut layer", 0, last, cut.layer, key="cut", on_change=_moved, args=(report,))
    with right:
        st.segmented_control(
            "Pooling",
            state.poolings(report),
            default=cut.pooling,
            key="pooling",
            required=True,
            on_change=_moved,
            args=(report,),
        )
    return cut


def rule_buttons(report: RunReport, cut: Cut) -> None:
    """One button a rule; the one that says the present cut is filled."""
    with st.container(horizontal=True):
        for rule, name in RULE_NAMES.items():
            choice = report.selection.get(rule)
            if choice is None:
                continue
            st.button(
                f"{name}: layer {choice.cut_layer}, {choice.pooling}",
                key=f"rule_{rule}",
                type="primary" if _says(choice, cut) else "secondary",
                on_click=state.choose_cut,
                args=(report, choice.cut_layer, choice.pooling),
            )


def why(report: RunReport, cut: Cut) -> str:
    """Why the cut stands where it stands: the rules that say so, or the user's hand."""
    reasons = [choice.why for choice in report.selection.values() if _says(choice, cut)]
    return "; ".join(reasons) or "chosen by hand"


def rule_of(report: RunReport, cut: Cut) -> Rule:
    """The first rule that says this cut, or `manual`."""
    names: list[Rule] = [rule for rule, said in report.selection.items() if _says(said, cut)]
    return names[0] if names else "manual"


def curve(report: RunReport, cut: Cut) -> None:
    """Draw the curve; a click on a point cuts there.

    The cut is part of the figure, so each new cut makes a new chart and drops the old selection:
    a point can be clicked again later.
    """
    st.plotly_chart(
        charts.curve_figure(report, cut_layer=cut.layer, pooling=cut.pooling, look=state.look()),
        key="curve",
        on_select=lambda: _clicked(report),
        selection_mode="points",
        theme=None,
        config={"displayModeBar": False},
        alt=f"Accuracy of a chip on every layer; cut at layer {cut.layer}. Same data under Table.",
    )


def _show(key: str, value: object) -> None:
    if st.session_state.get(key) != value:
        st.session_state[key] = value


def _says(choice: SelectionInfo, cut: Cut) -> bool:
    return (choice.cut_layer, choice.pooling) == (cut.layer, cut.pooling)


def _moved(report: RunReport) -> None:
    pooling = next(name for name in get_args(Pooling) if name == st.session_state["pooling"])
    state.choose_cut(report, st.session_state.get("cut", 0), pooling)


def _clicked(report: RunReport) -> None:
    hit = charts.picked(st.session_state["curve"].selection.points)
    if hit:
        state.choose_cut(report, *hit)
