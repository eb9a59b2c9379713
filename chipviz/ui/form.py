"""The form of a new run: data, backbone and prompt, what each comes to, and folded options."""

from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from chipviz.config import EXAMPLE, RunConfig
from chipviz.errors import ChipvizError, Refusal
from chipviz.runs import scheduler
from chipviz.ui import (
    backbone_step,
    data_step,
    draft,
    lookups,
    nav,
    options,
    prompt_step,
    state,
    widgets,
)


def show() -> None:
    """Draw the three steps and what is known of the run they describe, and start it."""
    draft.restore()
    backbone_step.preselect()
    # A place each: what comes and goes in one step must not move the next while the page waits.
    texts, rows, model, size, prompt, read, more, said = (st.container() for _ in range(8))
    with texts:
        data = data_step.choose()
    embedded = data == {"data": EXAMPLE["data"]}
    pictures = data_step.are_pictures(data["data"] if data else None)
    with model:
        values = backbone_step.choose(pictures=pictures)
    if not pictures:
        with prompt:
            values |= prompt_step.choose(embedded=embedded)
    with more:
        values |= options.choose(embedded=embedded)
    draft.keep(data["data"] if data else None)
    fits = True
    if values["backbone"]:
        with size:
            fits = backbone_step.show_outlook(values)
    config = None if data is None else _config(values | data)
    ready = config is not None and fits and _looks_good(config, rows, size, read, said)
    with st.container(horizontal=True, vertical_alignment="center"):
        go = st.button("Train chips on all layers", type="primary", key="start", disabled=not ready)
        if "draft" in st.session_state:
            st.button("Start over", type="tertiary", key="over", on_click=draft.start_over)
    if go:
        assert config is not None
        _start(config)


def _config(values: dict[str, Any]) -> RunConfig | None:
    """The settings, checked. None where something is missing or wrong, which is said."""
    missing = [f"step {n}" for n, name in ((1, "data"), (2, "backbone")) if not values[name]]
    if missing:
        st.caption(f"Fill in {' and '.join(missing)} first.")
        return None
    try:
        return RunConfig.checked(**values)
    except ChipvizError as error:
        widgets.show_error(error)
        return None


def _looks_good(
    config: RunConfig,
    rows: DeltaGenerator,
    size: DeltaGenerator,
    read: DeltaGenerator,
    said: DeltaGenerator,
) -> bool:
    """Draw what the run would read, where that can be known now. Returns whether it can start."""
    if not lookups.is_here("data", config.data) or not lookups.is_here(
        "backbones", config.backbone
    ):
        return True
    with read:
        found = lookups.preview(config)
        if isinstance(found, Refusal):
            lookups.show_failure(found, config.data, config.backbone)
            return False
        prompt_step.show(found)
    with rows:
        data_step.show_rows(found)
    with said:  # above the button that starts
        widgets.show_notices(found.warnings)
    with size:  # with the features of so many texts
        return backbone_step.show_refusal(found.backbone)


def _start(config: RunConfig) -> None:
    try:
        job = scheduler.enqueue_run(state.store(), config)
    except ChipvizError as error:
        widgets.show_error(error)
        return
    nav.go("train", {"run": job.run_id})
