"""What the Train page asks before a run starts: found by a process of its own, kept here.

A refusal is an answer too: a page is drawn many times, and nothing is asked twice.
"""

import re
import threading
import time
from collections import OrderedDict
from itertools import islice
from typing import Any, TypeVar

import streamlit as st

from chipviz import sources
from chipviz.config import RunConfig
from chipviz.errors import ChipvizError, JobError, Refusal
from chipviz.preview import BackbonePreview, ColumnsPreview, Preview
from chipviz.results.models import made_folder
from chipviz.runs.questions import (
    LookAhead,
    LookAtBackbone,
    LookAtColumns,
    Question,
    line_of,
)
from chipviz.ui import state, widgets

A = TypeVar("A")

WAIT_S = 120.0
"""Seconds that a look at what is on this machine may take."""
FETCH_S = 1800.0
"""Seconds where somebody asked to fetch it. What does not answer is given up by itself before."""
KEPT_S = 900
KEPT = 128


def columns(data: str, label: str | None) -> ColumnsPreview | Refusal:
    """The columns of a table."""
    return _answer(LookAtColumns(data, label), ColumnsPreview, _stamp(data))


def outlook(backbone: str, dtype: str | None) -> BackbonePreview | Refusal:
    """The size of a backbone."""
    return _answer(LookAtBackbone(backbone, dtype), BackbonePreview, _stamp(backbone))


def preview(config: RunConfig) -> Preview | Refusal:
    """What a run would read. Settings that do not change that ask nothing anew."""
    reads = RunConfig.checked(**config.model_dump(include=RunConfig.reads()))
    stamp = (_stamp(config.data), _stamp(config.backbone))
    return _answer(LookAhead(reads), Preview, stamp)


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
    if kind == "backbones" and made_folder(state.store().home, source):
        return True
    path = sources.on_disk(source)
    if path is None:
        return sources.looks_like_path(source)  # nothing is there, and that is said at once
    # A GGUF file is unpacked first, an adapter's backbone may have to be fetched.
    return path.suffix.lower() != ".gguf" and not (path / sources.ADAPTER).is_file()


def offer(kind: str, source: str) -> None:
    """Offer to bring a source here and look at it now. Otherwise the run does it when it starts."""
    st.button(
        "Prepare and look",
        key=f"prepare_{kind}",
        icon=":material/download:",
        on_click=_wanted().add,
        args=(source,),
        help="It is fetched, unpacked or merged now, which may take minutes. Otherwise that "
        "happens when the run starts.",
    )


def show_failure(refusal: Refusal, *sources_asked: str) -> None:
    """Show why there is no answer about the sources that were asked about.

    Files that change are looked at again by themselves. For others there is a button.
    """
    widgets.show_failure(refusal)
    if any(sources.on_disk(source) is None for source in sources_asked):
        st.button(
            "Look again",
            key=f"again_{len(sources_asked)}_{sources_asked[0]}",
            icon=":material/refresh:",
            on_click=forget,
        )


def _wanted() -> set[str]:
    return st.session_state.setdefault("wanted", set())


def forget() -> None:
    """Ask everything anew."""
    _kept().clear()


def _answer(question: Question, kind: type[A], stamp: object) -> A | Refusal:
    """What was found, or why nothing was. A process that broke down is asked anew the next time."""
    key, kept = (line_of(question), stamp), _kept()
    if (found := kept.get(key)) is not None:
        return found
    wait_s = FETCH_S if _wanted() else WAIT_S
    with st.spinner("Looking …"):
        place = st.empty()
        start = time.monotonic()

        def waiting() -> None:
            # What is drawn here is also where Streamlit ends a page that somebody left or changed.
            place.caption(f"{time.monotonic() - start:.0f} s")

        try:
            found = state.scout().ask(question, kind, wait_s, waiting)
        except JobError as error:
            return error.refusal
        except ChipvizError as error:
            found = error.refusal
        finally:
            place.empty()
    kept.put(key, found)
    return found


class _Kept:
    """Answers of the last minutes, shared by all sessions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[object, tuple[float, Any]] = OrderedDict()

    def get(self, key: object) -> Any:
        with self._lock:
            when, answer = self._answers.get(key, (0.0, None))
            return answer if time.monotonic() - when < KEPT_S else None

    def put(self, key: object, answer: object) -> None:
        with self._lock:
            self._answers[key] = time.monotonic(), answer
            self._answers.move_to_end(key)
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._answers.clear()


@st.cache_resource
def _kept() -> _Kept:
    return _Kept()


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
