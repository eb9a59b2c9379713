"""What the Train page asks before a run starts: found by a process of its own, kept here.

An answer that could not be had is an answer too, with `error` and `hint`: a page is drawn many
times, and nothing is asked twice.
"""

import json
import re
from itertools import islice
from typing import Any

import streamlit as st

from chipviz import sources
from chipviz.config import RunConfig
from chipviz.errors import ChipvizError, JobError
from chipviz.ui import parts, state

WAIT_S = 1800.0
"""Fetching may take its time; what does not answer is given up by the process itself."""
KEPT_S = 900
_READ = {
    *("backbone", "data", "template", "text", "text_pair", "label", "choices", "poolings"),
    *("max_train", "max_validation", "max_test", "max_length", "preset", "seed"),
    *("dtype", "device_map"),
}
"""Settings that change what a run reads, or the memory it takes."""


def columns(data: str, label: str | None) -> dict[str, Any]:
    """The columns of a table; see `chipviz.preview.ColumnsPreview`."""
    return _answer(_line("columns", data=data, label=label), _stamp(data))


def outlook(backbone: str, dtype: str | None) -> dict[str, Any]:
    """The size of a backbone; see `chipviz.preview.BackbonePreview`."""
    return _answer(_line("outlook", backbone=backbone, dtype=dtype), _stamp(backbone))


def preview(config: RunConfig) -> dict[str, Any]:
    """What a run would read; see `chipviz.preview.Preview`."""
    asked = config.model_dump(include=_READ)
    return _answer(_line("preview", config=asked), (_stamp(config.data), _stamp(config.backbone)))


def is_here(kind: str, source: str) -> bool:
    """Whether a source can be looked at without long work, or a person asked for that work.

    Args:
        kind: `data` or `backbones`, the folder of the home where what was fetched lies.
        source: As in `RunConfig`.
    """
    if source in _wanted():
        return True
    if re.fullmatch(r"[a-z0-9-]+", source) and (state.store().home / kind / source).is_dir():
        return True
    path = sources.on_disk(source)
    if path is None:
        return sources.looks_like_path(source)  # nothing is there, and that is said at once
    # A GGUF file is unpacked first, an adapter's backbone may have to be fetched.
    return path.suffix.lower() != ".gguf" and not (path / sources.ADAPTER).is_file()


def offer(kind: str, source: str) -> None:
    """Offer to bring a source here and look at it now; otherwise the run does it when it starts."""
    st.button(
        "Prepare and look",
        key=f"prepare_{kind}",
        icon=":material/download:",
        on_click=_wanted().add,
        args=(source,),
        help="It is fetched, unpacked or merged now, which may take minutes. Otherwise that "
        "happens when the run starts.",
    )


def trouble(answer: dict[str, Any], *asked: str) -> bool:
    """Show why there is no answer about the sources that were asked about; true if there is none.

    Files that change are looked at again by themselves; for others there is a button.
    """
    if "error" not in answer:
        return False
    parts.show_trouble(answer["error"], answer["hint"])
    if any(sources.on_disk(source) is None for source in asked):
        st.button(
            "Look again",
            key=f"again_{len(asked)}_{asked[0]}",
            icon=":material/refresh:",
            on_click=_ask.clear,
        )
    return True


def _wanted() -> set[str]:
    return st.session_state.setdefault("wanted", set())


def _line(op: str, **asked: object) -> str:
    return json.dumps({"op": op, **asked}, sort_keys=True)


def _answer(request: str, stamp: object) -> dict[str, Any]:
    """What was found, or why nothing was; a process that broke down is asked anew the next time."""
    try:
        return _ask(request, stamp)
    except JobError as error:
        return {"error": error.message, "hint": error.hint}


@st.cache_data(max_entries=128, ttl=KEPT_S, show_spinner="Looking …")
def _ask(request: str, stamp: object) -> dict[str, Any]:
    """`stamp` changes when the files that were asked about do."""
    del stamp
    try:
        return state.scout().ask(json.loads(request), WAIT_S)
    except JobError:
        raise
    except ChipvizError as error:
        return {"error": error.message, "hint": error.hint}


def _stamp(source: str) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of a file, or of the first files of a folder."""
    path = sources.on_disk(source)
    if path is None:
        return ()
    try:
        files = sorted(islice(path.iterdir(), 100)) if path.is_dir() else [path]
        stats = [(file.name, file.stat()) for file in files]
    except OSError:  # gone, or not ours to read: the answer says so
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
