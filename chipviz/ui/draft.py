"""What the form of a new run held: kept in the home folder, named in the address.

Streamlit forgets a form when its page is left or loaded again. A reload, the browser's back button
and a link find it by its name in the address; the same session finds its last one without.
"""

import json
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import streamlit as st

from chipviz.config import Contradictions, Importance, LayerWeights, Preset, StcSite
from chipviz.files import write_atomic
from chipviz.keys import ChipKind, Pooling
from chipviz.sources import BACKBONE_WHEELS
from chipviz.ui import state

DATA_SOURCES = ("Embedded", "Upload", "File or folder", "Hub")
BACKBONE_SOURCES = ("Embedded", "Made here", "File or folder", "Hub")
DTYPES = (None, "float32", "bfloat16")
_ID = re.compile(r"[0-9a-f]{12}")
_ONE_OF: dict[str, tuple[Any, ...]] = {
    "data_source": DATA_SOURCES,
    "backbone_source": BACKBONE_SOURCES,
    "backbone_embedded": tuple(BACKBONE_WHEELS),
    "backbone_seeing": tuple(BACKBONE_WHEELS),
    "preset": get_args(Preset),
    "contradictions": get_args(Contradictions),
    "importance": get_args(Importance),
    "layer_weights": get_args(LayerWeights),
    "dtype": DTYPES,
}
_SOME_OF = {
    "poolings": get_args(Pooling),
    "chips": get_args(ChipKind),
    "sites": get_args(StcSite),
}
_TEXTS = {"data_hub", "data_path", "backbone_hub", "backbone_path", "backbone_made"}
_TEXTS |= {"split", "group", "blocks"}
_SWITCHES = {"balanced", "refit", "spread", "stc"}
NUMBERS = {"repeats": (1, 10), "folds": (1, 20), "seed": (0, 2**31 - 1)}
"""Least and most of what the form takes."""
_FOR_DATA = re.compile(r"(template|limit|max_train|max_validation|max_test)_(True|False)")
"""Widgets that the example and all other data have their own of."""
_COLUMN = re.compile(r"column_\w+")
MAX_CHARS = 100_000
"""Maximum characters of one entry."""


def restore() -> None:
    """Give the widgets what they held. Only where the page is drawn for the first time."""
    if "data_source" in st.session_state:
        return
    name = st.query_params.get("draft", st.session_state.get("draft", ""))
    if not _ID.fullmatch(name):
        return
    st.session_state["draft"] = name
    for key, value in _read(_path(name)).items():
        if _fits(key, value):
            st.session_state[key] = value


def keep(data: str | None) -> None:
    """Keep what the widgets hold, if it is not what they held before.

    Args:
        data: What the form reads. An uploaded file is found again by the path that it was kept
            under: a browser gives no file twice.
    """
    held = {
        key: st.session_state[key] for key in st.session_state if _fits(key, st.session_state[key])
    }
    if held.get("data_source") == "Upload":
        held["data_source"] = "File or folder" if data else "Upload"
        held["data_path"] = data or ""
    text = json.dumps(held, ensure_ascii=False)
    before = st.session_state.get("draft_held")
    st.session_state["draft_held"] = text
    name = st.session_state.get("draft")
    if before is None and name is None:
        return  # nobody has chosen anything
    if before != text or name is None:
        name = name or secrets.token_hex(6)
        st.session_state["draft"] = name
        path = _path(name)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)
    if st.query_params.get("draft") != name:
        st.query_params["draft"] = name


def start_over() -> None:
    """Forget what this form held."""
    for key in [key for key in st.session_state if _fits(key, st.session_state[key])]:
        del st.session_state[key]
    for key in ("draft", "draft_held"):
        st.session_state.pop(key, None)
    st.query_params.pop("draft", None)


def _path(name: str) -> Path:
    return state.store().home / "drafts" / f"{name}.json"


def _read(path: Path) -> dict[str, Any]:
    found: Any = None
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text("utf-8"))
    return found if isinstance(found, dict) else {}


def _fits(key: str, value: Any) -> bool:
    """Whether a widget of the form has this key, and can hold this value."""
    if key in _ONE_OF:
        return value in _ONE_OF[key]
    if key in _SOME_OF:
        return isinstance(value, list) and set(map(str, value)) <= set(_SOME_OF[key])
    if key in _SWITCHES:
        return isinstance(value, bool)
    if key in NUMBERS:
        return (value is None and key == "folds") or _within(value, *NUMBERS[key])
    if key in _TEXTS or _COLUMN.fullmatch(key) or key.startswith("template_"):
        return value is None or (isinstance(value, str) and len(value) <= MAX_CHARS)
    if _FOR_DATA.fullmatch(key):
        if key.startswith("limit_"):
            return _within(value, 1, 32_768)
        return value is None or _within(value, 2, 2**31)
    return False


def _within(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
