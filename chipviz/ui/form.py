"""The form of a new run: data, backbone, prompt; the rest folded away."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import streamlit as st

from chipviz import jobs
from chipviz.config import EXAMPLE, ChipKind, Pooling, Preset, RunConfig
from chipviz.errors import ChipvizError, ConfigError
from chipviz.ui import nav, parts, state

UPLOADS = ["csv", "tsv", "jsonl", "parquet"]
MAX_UPLOAD_MB = 64
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "first", "max")
CHIPS: dict[ChipKind, str] = {"linear": "Linear", "mlp": "MLP, 256 wide"}
PRESETS: dict[Preset, str] = {"sound": "Sound", "published": "As published, beside it"}
MAX_FITS = 10


def show() -> None:
    """Draw the three steps and start the run they describe."""
    values = _data() | _backbone()
    values |= _prompt(embedded=values["data"] == EXAMPLE["data"])
    values |= _options(embedded=values["data"] == EXAMPLE["data"])
    if not st.button("Train chips on all layers", type="primary", key="start"):
        return
    try:
        job = jobs.enqueue_run(state.store(), _checked(values))
    except ChipvizError as error:
        parts.show_error(error)
        return
    nav.go("train", {"run": job.run_id})


def save_upload(home: Path, name: str, content: bytes) -> Path:
    """Keep an uploaded file under a name made here: a slug of its stem and its content's hash.

    The same content gives the same path, so that features of an earlier run are found again.
    """
    stem, dot, suffix = name.rpartition(".")
    if not dot or suffix.lower() not in UPLOADS:
        raise ConfigError(
            f"The file {name[-80:]!r} is not one of {', '.join(UPLOADS)}.",
            "Save the table in one of these forms and upload it again.",
        )
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40] or "data"
    folder = home / "data" / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}-{hashlib.sha256(content).hexdigest()[:8]}.{suffix.lower()}"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)  # noqa: PTH105 - whole or not at all
    return path


def _data() -> dict[str, Any]:
    st.subheader("1 Data", anchor=False)
    source = st.segmented_control(
        "Where the texts come from",
        ["Embedded", "Upload", "File or folder", "Hub"],
        default="Embedded",
        required=True,
        key="data_source",
    )
    if source == "Embedded":
        st.caption("BBC news: 2,225 articles in five topics.")
        return {"data": EXAMPLE["data"]}
    if source == "Upload":
        file = st.file_uploader(
            "A table with a text and a label column", type=UPLOADS, max_upload_size=MAX_UPLOAD_MB
        )
        return {"data": "", "upload": file}
    if source == "Hub":
        return {"data": st.text_input("Hub id of a data set", placeholder="owner/name")}
    return {"data": st.text_input("Path on this computer", placeholder="/path/to/reviews.csv")}


def _backbone() -> dict[str, Any]:
    st.subheader("2 Backbone", anchor=False)
    source = st.segmented_control(
        "Where the language model comes from",
        ["Embedded", "Folder", "Hub"],
        default="Embedded",
        required=True,
        key="backbone_source",
    )
    if source == "Embedded":
        st.caption("SmolLM2-135M-Instruct: 30 layers, Apache-2.0.")
        return {"backbone": EXAMPLE["backbone"]}
    if source == "Hub":
        return {"backbone": st.text_input("Hub id of a model", placeholder="owner/name")}
    return {"backbone": st.text_input("Folder of a saved model", placeholder="/path/to/model")}


def _prompt(*, embedded: bool) -> dict[str, Any]:
    st.subheader("3 Prompt", anchor=False)
    template = st.text_area(
        "Template",
        str(EXAMPLE["template"]) if embedded else "{text}",
        key=f"template_{embedded}",
        help="Where {text} stands, each text is put. What follows it decides what the last "
        "token knows. {text_pair} is the second column, where there is one.",
    )
    limit = st.number_input(
        "Length limit, tokens (template included)",
        min_value=1,
        max_value=32768,
        value=64 if embedded else 256,
        key=f"limit_{embedded}",
    )
    return {"template": template, "max_length": limit}


def _options(*, embedded: bool) -> dict[str, Any]:
    with st.expander("More options"):
        return _chips() | _texts(embedded=embedded) | _columns() | _computing()


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


def _columns() -> dict[str, Any]:
    values: dict[str, Any] = {}
    fields = (
        ("text", "Text column"),
        ("text_pair", "Second text column"),
        ("label", "Label column"),
    )
    for place, (field, label) in zip(st.columns(3), fields, strict=True):
        name = place.text_input(label, placeholder="guessed", key=field)
        values[field] = name.strip() or None
    return values


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


def _checked(values: dict[str, Any]) -> RunConfig:
    """The settings as a config; a file that was uploaded is kept first.

    Raises:
        ConfigError: If something is missing or does not fit.
    """
    rest = dict(values)
    if "upload" in rest:
        file = rest.pop("upload")
        if file is None:
            raise ConfigError("No file was uploaded.", "Choose a file in step 1.")
        rest["data"] = str(save_upload(state.store().home, file.name, file.getvalue()))
    for field, step in (("data", 1), ("backbone", 2)):
        rest[field] = str(rest[field]).strip()
        if not rest[field]:
            raise ConfigError(f"The {field} is not named yet.", f"Fill in step {step}.")
    return RunConfig.checked(**rest)
