"""Step 2 of a new run: the backbone, and what it would take to load it."""

import html
from typing import Any

import streamlit as st

from chipviz import sources
from chipviz.config import EXAMPLE
from chipviz.errors import Refusal
from chipviz.preview import BackbonePreview
from chipviz.results import models
from chipviz.ui import draft, formatting, lookups, state, widgets
from chipviz.ui.formatting import megabytes, millions

EMBEDDED = {
    "smollm2-135m": "SmolLM2-135M-Instruct: a decoder of 30 layers, Apache-2.0.",
    "minilm-l6": "all-MiniLM-L6-v2: an encoder of 6 layers, Apache-2.0. Small and fast.",
}
SEEING = {
    "dinov2-small": "DINOv2 ViT-S/14: a vision encoder of 12 layers, Apache-2.0. It comes in the "
    "wheel of another project; whether that one tuned it is not known.",
}
"""Embedded backbones of texts, and of pictures."""


def choose(*, pictures: bool = False) -> dict[str, Any]:
    """Draw the step. `backbone` is empty where none is named yet."""
    st.subheader("2 Backbone", anchor=False)
    return {"backbone": name_one(pictures=pictures)}


def preselect() -> None:
    """Take the made model that a link names, once."""
    named = st.query_params.get("backbone")
    if named and models.made_folder(state.store().home, named):
        st.session_state["backbone_source"], st.session_state["backbone_made"] = "Made here", named
        del st.query_params["backbone"]


def name_one(*, pictures: bool = False) -> str:
    """Draw the choice of a backbone for texts or pictures. Empty where none is named yet."""
    kind = st.segmented_control(
        "Where the model comes from",
        draft.BACKBONE_SOURCES,
        default="Embedded",
        required=True,
        key="backbone_source",
    )
    if kind == "Embedded":
        known, key = (SEEING, "backbone_seeing") if pictures else (EMBEDDED, "backbone_embedded")
        names = list(known)
        first = str(EXAMPLE["backbone"])
        index = names.index(first) if first in names else 0
        name = st.selectbox("Embedded backbone", names, index=index, key=key)
        st.caption(known[name])
        return name
    if kind == "Made here":
        return _made() or ""
    if kind == "Hub":
        named = st.text_input(
            "Hub id of a model or LoRA adapter",
            placeholder="owner/name@revision",
            key="backbone_hub",
        )
        return named.strip()
    path = st.text_input(
        "Path on this computer",
        placeholder="/path/to/model",
        key="backbone_path",
        help="A folder written by save_pretrained, a GGUF file, or the folder of a LoRA adapter.",
    ).strip()
    return sources.absolute(path, ()) if path else ""


def _made() -> str | None:
    """One of the models made here. None where there are none."""
    records = {record.name: record for _, record in models.made_models(state.store().home)}
    if not records:
        st.caption("Nothing is made yet: the page Models tunes and prunes.")
        return None
    name = st.selectbox("Model made here", list(records), key="backbone_made")
    record = records[name]
    st.caption(f"{record.method} of {formatting.plain(record.parent)}, {record.n_layers} layers.")
    return name


def show_outlook(values: dict[str, Any]) -> bool:
    """Draw size and memory of a backbone that is here, else the offer to prepare it.

    Args:
        values: Fields of `RunConfig`: backbone, dtype, device_map.

    Returns:
        Whether a run with these settings can load it, as far as is known.
    """
    backbone: str = values["backbone"]
    if not lookups.is_here("backbones", backbone):
        lookups.offer("backbones", backbone)
        return True
    found = lookups.outlook(backbone, values["dtype"])
    if isinstance(found, Refusal):
        lookups.show_failure(found, backbone)
        return False
    st.html(_facts(found, embedded=backbone in EMBEDDED))
    return values["device_map"] is not None or show_refusal(found)


def show_refusal(found: BackbonePreview) -> bool:
    """Say why a backbone would be refused. True if it would not."""
    if found.refused:
        widgets.show_failure(Refusal(found.refused, found.hint, found.fields))
    return not found.refused


def _facts(found: BackbonePreview, *, embedded: bool) -> str:
    needed, free = found.memory_bytes, found.free_bytes
    share = min(1.0, needed / max(1, free))
    rows = [
        (str(found.n_layers), f"layers, {found.hidden_size:,} wide"),
        (
            millions(found.n_parameters),
            f"parameters, {megabytes(found.file_bytes)} on disk",
        ),
        (
            megabytes(needed),
            f"of memory needed in {found.dtype}, {megabytes(free)} free on {found.device}",
        ),
        *([(megabytes(found.feature_bytes), "of states on disk")] if found.feature_bytes else []),
    ]
    bar = widgets.bar(max(0.01, share), f"{100 * share:.0f} % of the free memory")
    licence = html.escape(found.licence or "none is stated in its folder")
    said = "" if embedded else f'<p class="cv-muted">Licence: {licence}</p>'
    return widgets.facts(rows) + bar + said
