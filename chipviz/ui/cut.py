"""The widgets that choose a cut, the same on every page: slider, chip, rules, chart click."""

import streamlit as st

from chipviz.config import CutSpec, Rule
from chipviz.keys import Cut
from chipviz.results.report import RunReport, SelectionInfo
from chipviz.ui import formatting, state
from chipviz.ui.plots import curves
from chipviz.ui.plots.theme import chip_name

RULE_NAMES: dict[Rule, str] = {
    "validate": "Best",
    "within": "Within 1 point",
    "non-inferior": "Not worse",
    "elbow": "Elbow",
    "budget": "Half the size",
    "fixed": "Fixed 5/8",
}
"""What people call the rules that a cut may be chosen by. *oracle* is none of them."""
SIDE_BY_SIDE = 24
"""Maximum letters of all chips' names together for which each chip gets a button."""


def controls(report: RunReport) -> Cut:
    """Draw slider and, where there are several, the chips. Both are views of the kept cut.

    A widget that is new on this page starts at the kept cut. One that is here already is moved.
    """
    cut = state.current_cut(report)
    last = report.backbone.n_layers - 1
    if last > 0:
        _show("cut", cut.layer)
        no_cut = report.backbone.no_cut
        if no_cut:
            layers = [layer for layer in range(last + 1) if layer not in no_cut]
            st.select_slider(
                "Cut layer", layers, cut.layer, key="cut", on_change=_moved, args=(report,)
            )
        else:
            st.slider("Cut layer", 0, last, cut.layer, key="cut", on_change=_moved, args=(report,))
    names = [chip_name(key) for key in report.chips]
    if len(names) > 1:
        _show("chip", chip_name(cut.chip))
        _chip_choice(report, names, cut)
    return cut


def rule_buttons(report: RunReport, cut: Cut) -> None:
    """One button per rule. Those that say the present cut are filled."""
    with st.container(horizontal=True, gap="small"):
        for rule, name in RULE_NAMES.items():
            choice = report.selection.get(rule)
            if choice is None:
                continue
            st.button(
                f"{name}: layer {choice.cut_layer}{_chip_words(report, choice)}",
                key=f"rule_{rule}",
                type="primary" if choice.cut == cut else "secondary",
                help=formatting.plain(sentence(choice.why)),
                on_click=state.choose_cut,
                args=(report, choice.cut),
            )


def why(report: RunReport, cut: Cut) -> str:
    """Why the cut stands where it stands: the first rule that says so, and who else does."""
    rules = _rules_at(report, cut)
    if not rules:
        return "Chosen by hand."
    others = " and ".join(RULE_NAMES[rule] for rule in rules[1:])
    same = f" Same cut by {others}." if others else ""
    return sentence(report.selection[rules[0]].why) + same


def oracle_words(report: RunReport) -> str | None:
    """What the test split would have chosen: a yardstick that no button offers."""
    choice = report.selection.get("oracle")
    if choice is None:
        return None
    return (
        f"Oracle: layer {choice.cut_layer}, {chip_name(choice.key)}, "
        f"{formatting.percent(choice.test_accuracy)} on test. "
        "Chosen on test, for comparison only."
    )


def sentence(words: str) -> str:
    """A reason, as a sentence."""
    return f"{words[:1].upper()}{words[1:]}."


def rule_of(report: RunReport, cut: Cut) -> Rule:
    """The first rule that says this cut, or `manual`."""
    rules = _rules_at(report, cut)
    return rules[0] if rules else "manual"


def spec_of(report: RunReport, cut: Cut) -> CutSpec:
    """This cut as a bundle is asked for, with the rule that says it."""
    return CutSpec.at(cut, rule_of(report, cut))


def curve(report: RunReport, cut: Cut) -> None:
    """Draw the curve. A click on a point cuts there.

    The cut is part of the figure, so each new cut makes a new chart and drops the old selection:
    a point can be clicked again later.
    """
    figure = curves.curve_figure(report, cut=cut, look=state.look())
    st.plotly_chart(
        figure,
        key="curve",
        on_select=lambda: _clicked(report),
        selection_mode="points",
        theme=None,
        config={"displayModeBar": False},
        alt=f"Accuracy of every layer's chip; cut at {cut.layer}, {chip_name(cut.chip)}. "
        "Same data: Table.",
    )


def _show(key: str, value: object) -> None:
    if st.session_state.get(key) != value:
        st.session_state[key] = value


def _chip_choice(report: RunReport, names: list[str], cut: Cut) -> None:
    if sum(map(len, names)) > SIDE_BY_SIDE:
        place = names.index(chip_name(cut.chip))
        st.selectbox("Chip", names, place, key="chip", on_change=_moved, args=(report,))
        return
    st.segmented_control(
        "Chip",
        names,
        default=chip_name(cut.chip),
        key="chip",
        required=True,
        on_change=_moved,
        args=(report,),
    )


def _chip_words(report: RunReport, choice: SelectionInfo) -> str:
    return f", {chip_name(choice.key)}" if len(report.chips) > 1 else ""


def _rules_at(report: RunReport, cut: Cut) -> list[Rule]:
    there = report.selection
    return [rule for rule in RULE_NAMES if rule in there and there[rule].cut == cut]


def _moved(report: RunReport) -> None:
    there = {chip_name(key): key for key in report.chips}
    only = next(iter(there))
    chip = there[st.session_state.get("chip", only)]
    state.choose_cut(report, Cut(st.session_state.get("cut", 0), chip))


def _clicked(report: RunReport) -> None:
    cut = curves.picked(st.session_state["curve"].selection.points)
    if cut and cut.layer in report.backbone.no_cut:
        why = formatting.plain(report.backbone.no_cut[cut.layer])
        st.toast(f"The model cannot be cut after layer {cut.layer}: {why}.")
    elif cut:
        state.choose_cut(report, cut)
