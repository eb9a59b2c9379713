"""The options of a new run that most people leave alone."""

from typing import Any, get_args

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from chipviz.config import EXAMPLE, Contradictions, Importance, LayerWeights, Preset, StcSite
from chipviz.keys import ChipKind, Pooling
from chipviz.ui import draft, formatting

CHIPS: dict[ChipKind, str] = {
    "linear": "Linear",
    "mlp": "MLP, 256 wide",
    "sparse": "Linear with L1",
}
PRESETS: dict[Preset, str] = {"sound": "Sound", "published": "As published, beside it"}


def choose(*, embedded: bool) -> dict[str, Any]:
    """Draw them, folded. The example has its own sizes.

    Returns:
        Fields of `RunConfig`.
    """
    with st.expander("More options"):
        return _chips() | _texts(embedded=embedded) | _computing() | _backbone()


def _named(field: str) -> dict[str, Any]:
    """Label and help of the widget of a setting."""
    return {"label": formatting.label_of(field), "help": formatting.help_of(field)}


def _number(field: str) -> dict[str, Any]:
    """The same with its bounds."""
    least, most = draft.NUMBERS[field]
    return _named(field) | {"min_value": least, "max_value": most, "key": field}


def _chips() -> dict[str, Any]:
    left, right = st.columns(2)
    poolings = left.multiselect(
        **_named("poolings"),
        options=get_args(Pooling),
        placeholder="Those that suit the backbone",
        key="poolings",
    )
    chips = right.multiselect(
        **_named("chips"),
        options=list(CHIPS),
        default=["linear"],
        format_func=lambda kind: CHIPS[kind],
        key="chips",
    )
    stc = left.toggle(**_named("stc"), key="stc")
    sites = right.multiselect(
        **_named("sites"),
        options=get_args(StcSite),
        default=["block", "ffn_in"],
        disabled=not stc,
        key="sites",
    )
    preset = st.segmented_control(
        **_named("preset"),
        options=list(PRESETS),
        default="sound",
        format_func=lambda name: PRESETS[name],
        required=True,
        key="preset",
    )
    st.caption(
        "Two leaks of the published recipe are not repeated: it draws the validation rows from the "
        "evaluation split, and picks the best layer on the test texts."
    )
    joined = {"stc": stc, "sites": sites} | _joining(left, right) if stc else {}
    return {"poolings": poolings, "chips": chips, "preset": preset} | joined


def _joining(left: DeltaGenerator, right: DeltaGenerator) -> dict[str, Any]:
    """How neurons are chosen and weighted."""
    found: dict[str, Any] = {}
    for place, field, names in (
        (left, "importance", get_args(Importance)),
        (right, "layer_weights", get_args(LayerWeights)),
    ):
        found[field] = place.segmented_control(
            **_named(field), options=names, default=names[0], required=True, key=field
        )
    return found


def _texts(*, embedded: bool) -> dict[str, Any]:
    known: dict[str, Any] = EXAMPLE if embedded else {}
    fields = ("max_train", "max_validation", "max_test")
    values: dict[str, Any] = {
        field: place.number_input(
            **_named(field),
            min_value=2,
            value=known.get(field),
            placeholder="all",
            key=f"{field}_{embedded}",
        )
        for place, field in zip(st.columns(3), fields, strict=True)
    }
    values["contradictions"] = st.segmented_control(
        **_named("contradictions"),
        options=get_args(Contradictions),
        default="keep",
        required=True,
        key="contradictions",
    )
    left, right = st.columns(2)
    for place, field in ((left, "split"), (right, "group")):
        said = place.text_input(**_named(field), placeholder="none", key=field)
        values[field] = (said or "").strip() or None
    balanced = st.toggle(
        "Balance the classes", key="balanced", help=formatting.help_of("class_weight")
    )
    return values | {"class_weight": "balanced" if balanced else "none"}


def _computing() -> dict[str, Any]:
    left, middle, right = st.columns(3)
    refit = st.toggle(**_named("refit"), value=True, key="refit")
    repeats = left.number_input(**_number("repeats"), value=1)
    folds = middle.number_input(**_number("folds"), value=None, placeholder="5 or 1")
    seed = right.number_input(**_number("seed"), value=0)
    spread = st.toggle(**_named("device_map"), key="spread")
    return {
        "refit": refit,
        "folds": folds,
        "repeats": repeats,
        "seed": seed,
        "device_map": "auto" if spread else None,
    }


def _backbone() -> dict[str, Any]:
    left, right = st.columns(2)
    dtype = left.selectbox(
        **_named("dtype"),
        options=draft.DTYPES,
        format_func=lambda name: name or "what is fast here",
        key="dtype",
    )
    blocks = right.text_input(**_named("blocks"), placeholder="found by itself", key="blocks")
    return {"dtype": dtype, "blocks": (blocks or "").strip() or None}
