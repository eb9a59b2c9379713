"""The form of a new model: what to prune or tune, how, and what heals it."""

from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from chipviz import sources
from chipviz.config import EXAMPLE, RunConfig
from chipviz.errors import ChipvizError
from chipviz.results.models import PRUNING, SURGICAL, Fit, Heal, Method, ModelSpec
from chipviz.runs import scheduler
from chipviz.ui import backbone_step, data_step, nav, state, widgets

METHODS: dict[Method, str] = {
    "influence": "Block influence: layers that change their input least (ShortGPT)",
    "angular": "Angular distance: the run of layers that turns its input least",
    "greedy": "Greedy: the layer whose absence costs the least loss, again and again",
    "top": "Top: the last layers",
    "bottom": "Bottom: the first layers (LayerChop's choice)",
    "middle": "Middle: those around the middle",
    "alternate": "Alternate: every so many-th layer",
    "laco": "LaCo: layers merge into the one below, by the paper's rule",
    "laco-released": "LaCo as its public code does it",
    "blockpruner": "BlockPruner: attention and feed-forward units one by one",
    "slicegpt": "SliceGPT: dimensions of the residual stream",
    "llm-pruner": "LLM-Pruner: heads and channels that matter least to the loss",
}
HEALS: dict[str, tuple[Heal | None, bool]] = {
    "Nothing": (None, False),
    "A linear map in place of the layers (ReplaceMe)": ("replaceme", False),
    "LoRA on the calibration text": ("lora", False),
    "LoRA on a task": ("lora", True),
    "Pretraining goes on": ("pretrain", False),
}
"""What heals a model, and whether it learns a task."""


def show() -> None:
    """Draw the form, and start the job."""
    kind = st.segmented_control(
        "What to do",
        ("Take layers out", "Tune on a task"),
        default="Take layers out",
        required=True,
        key="make_kind",
    )
    prunes = kind == "Take layers out"
    values: dict[str, Any] = {"backbone": backbone_step.name_one()}
    pruned, learns = _pruning() if prunes else ({"method": "lora"}, True)
    values |= pruned
    task = _task() if learns else {}
    fit = _fit(values, learns)
    name = st.text_input(
        "Name of the new model",
        key="make_name",
        placeholder="smollm2-short",
        help="Letters, digits, dots, dashes and underscores. Runs take it as their backbone.",
    ).strip()
    missing = [
        words
        for words, there in (
            ("a backbone", values["backbone"]),
            ("data", task is not None and (not learns or task.get("data"))),
            ("a name", name),
        )
        if not there
    ]
    if missing:
        st.caption(f"Still missing: {', '.join(missing)}.")
    if st.button("Make it", type="primary", key="make", disabled=bool(missing)):
        _start(values | {"name": name}, task or {}, fit)


def _pruning() -> tuple[dict[str, Any], bool]:
    """What goes and what heals, and whether a task is learned."""
    left, right = st.columns([3, 1])
    method = left.selectbox(
        "Which layers go",
        [name for name in METHODS if name in PRUNING],
        format_func=lambda name: METHODS[name],
        key="make_method",
    )
    layers = right.number_input(
        "Layers to take out", min_value=1, max_value=999, value=7, key="make_layers"
    )
    if method in SURGICAL:
        st.caption(
            "As many parameters as so many layers have. Only chipviz can load what is left: stock "
            "code knows no such shapes."
        )
    healing = st.selectbox(
        "What follows",
        list(HEALS),
        key="make_heal",
        help="ReplaceMe wants one run of layers: angular, middle or top.",
    )
    with st.expander("Text to calibrate on"):
        named = st.text_input(
            "Data with a text column",
            key="make_calibrate",
            placeholder=str(EXAMPLE["data"]),
            help="File, folder, embedded name or Hub id. A tenth of it, or its test split, is held "
            "out and measured.",
        ).strip()
        length = st.number_input(
            "Tokens of a row of text", min_value=8, max_value=8192, value=256, key="make_length"
        )
    calibrate = sources.absolute(named, sources.DATA_WHEELS) if named else None
    heal, learns = HEALS[healing]
    return {
        "method": method,
        "layers": layers,
        "heal": heal,
        "calibrate": calibrate,
        "length": length,
    }, learns


def _task() -> dict[str, Any] | None:
    """Data and prompt of the task that is learned. None where the data cannot be used."""
    data = data_step.choose()
    template = st.text_area(
        "Prompt",
        key="make_template",
        placeholder="News: {text}\nTopic of this article:",
        help="What the model is asked. Without a question after the text it is asked 'Answer:'.",
    ).strip()
    left, right = st.columns(2)
    limit = left.number_input(
        "Length limit, tokens", min_value=1, max_value=8192, value=128, key="make_limit"
    )
    most = right.number_input(
        "Training texts at most", min_value=2, value=None, key="make_most", placeholder="all"
    )
    if data is None:
        return None
    return data | {"template": template or None, "max_length": limit, "max_train": most}


def _fit(values: dict[str, Any], learns: bool) -> dict[str, Any]:
    """How gradient descent is done, where there is any."""
    heal = values.get("heal")
    if not learns and heal not in ("lora", "pretrain"):
        return {}
    with st.expander("How it learns"):
        left, right = st.columns(2)
        if learns:
            epochs = left.number_input(
                "Epochs at most", min_value=1, max_value=100, value=Fit().epochs, key="make_epochs"
            )
            return {"epochs": epochs, "preset": _recipe(right)}
        tokens = left.number_input(
            "Tokens", min_value=1_000, value=Fit().tokens, step=100_000, key="make_tokens"
        )
        st.caption(
            "The paper pretrains on 20,000,000,000 tokens. A million repairs what was torn, "
            "and gives back no knowledge. Two cores learn from about 1,000 a second."
        )
        if heal == "lora":
            return {"tokens": tokens, "preset": _recipe(right)}
        optimizer = right.segmented_control(
            "Optimizer", ("adamw", "lion"), default="adamw", required=True, key="make_optimizer"
        )
        return {"tokens": tokens, "optimizer": optimizer}


def _recipe(place: DeltaGenerator) -> str:
    """Sound or published."""
    return place.segmented_control(
        "Recipe", ("sound", "published"), default="sound", required=True, key="make_preset"
    )


def _start(values: dict[str, Any], task: dict[str, Any], fit: dict[str, Any]) -> None:
    try:
        if task:
            values["task"] = RunConfig.checked(backbone=values["backbone"], **task)
        values["fit"] = Fit.checked(**fit)
        if values["method"] == "lora":
            values.pop("layers", None)
        scheduler.enqueue_model(state.store(), ModelSpec.checked(**values))
    except ChipvizError as error:
        widgets.show_error(error)
        return
    nav.go("models")
