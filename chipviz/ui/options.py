"""The options of a new run that most people leave alone."""

from typing import Any

import streamlit as st

from chipviz.config import EXAMPLE, Preset
from chipviz.keys import ChipKind, Pooling

POOLINGS: tuple[Pooling, ...] = ("last", "mean", "first", "max")
CHIPS: dict[ChipKind, str] = {"linear": "Linear", "mlp": "MLP, 256 wide"}
PRESETS: dict[Preset, str] = {"sound": "Sound", "published": "As published, beside it"}
DTYPES = ("float32", "bfloat16")
MAX_FITS = 10


def choose(*, embedded: bool) -> dict[str, Any]:
    """Draw them, folded; the example has its own sizes.

    Returns:
        Fields of `RunConfig`.
    """
    with st.expander("More options"):
        return _chips() | _texts(embedded=embedded) | _computing() | _backbone()


def _chips() -> dict[str, Any]:
    left, right = st.columns(2)
    with left:
        poolings = st.multiselect(
            "Poolings",
            POOLINGS,
            placeholder="Those that suit the backbone",
            key="poolings",
            help="Which state of a text the chips read: its last token, the mean over all, its "
            "first token, or the largest value of each dimension. None named: the mean, and the "
            "last token of a decoder or the first of an encoder.",
        )
    with right:
        chips = st.multiselect(
            "Chips",
            list(CHIPS),
            default=["linear"],
            format_func=lambda kind: CHIPS[kind],
            key="chips",
            help="Linear fits in seconds and becomes part of a stock model. An MLP may find what "
            "is not linear.",
        )
    preset = st.segmented_control(
        "Recipe",
        list(PRESETS),
        default="sound",
        format_func=lambda name: PRESETS[name],
        required=True,
        key="preset",
    )
    st.caption(
        "As published adds the paper's own training of linear and MLP chips on raw last-token "
        "states. Its two leaks are not repeated: it draws the validation rows from the evaluation "
        "split, and picks the best layer on the test texts."
    )
    return {"poolings": poolings, "chips": chips, "preset": preset}


def _texts(*, embedded: bool) -> dict[str, Any]:
    known: dict[str, Any] = EXAMPLE if embedded else {}
    values: dict[str, Any] = {}
    fields = (
        ("max_train", "Training texts at most"),
        ("max_validation", "Validation texts at most"),
        ("max_test", "Test texts at most"),
    )
    for place, (field, label) in zip(st.columns(3), fields, strict=True):
        values[field] = place.number_input(
            label,
            min_value=2,
            value=known.get(field),
            placeholder="all",
            key=f"{field}_{embedded}",
        )
    balanced = st.toggle(
        "Balance the classes",
        key="balanced",
        help="Every class counts alike in training, however many texts it has.",
    )
    return values | {"class_weight": "balanced" if balanced else "none"}


def _computing() -> dict[str, Any]:
    left, right = st.columns(2)
    repeats = left.number_input(
        "Fits of each chip",
        min_value=1,
        max_value=MAX_FITS,
        value=1,
        key="repeats",
        help="From 2 on, each further fit sees another sample of the training texts, and a band "
        "shows how far the fits differ.",
    )
    seed = right.number_input("Seed", min_value=0, value=0, key="seed")
    spread = st.toggle(
        "Spread over devices",
        key="spread",
        help="For a model too large for one device: it is laid over all devices and memory.",
    )
    return {"repeats": repeats, "seed": seed, "device_map": "auto" if spread else None}


def _backbone() -> dict[str, Any]:
    left, right = st.columns(2)
    dtype = left.selectbox(
        "Compute in",
        [None, *DTYPES],
        format_func=lambda name: name or "what is fast here",
        key="dtype",
        help="bfloat16 needs half the memory of float32.",
    )
    blocks = right.text_input(
        "Path of the blocks",
        placeholder="found by itself",
        key="blocks",
        help="Where the backbone's layers are, such as transformer.h: for a model in which they "
        "are not found.",
    ).strip()
    return {"dtype": dtype, "blocks": blocks or None}
