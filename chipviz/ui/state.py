"""What a page looks at: the store, the run in the address, and the cut chosen for it.

The cut of each run is kept once a session and stands in the address. The widgets are views of it.
The address wins where it names a cut (a reload, a pasted link, the browser's back button). Reading
never writes: a cut is written where somebody chooses it, and once where a page opens a run.
"""

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import streamlit as st

from chipviz.config import RECOMMENDED, home_dir
from chipviz.errors import JobError
from chipviz.keys import ChipKey, Cut
from chipviz.results.report import RunReport
from chipviz.results.run_folder import Predictions
from chipviz.runs.model_client import Inference
from chipviz.runs.store import Job, Store
from chipviz.ui.plots.theme import DARK, LIGHT, Look

T = TypeVar("T")

SCOUTS = 3
"""Questions about what runs would read that are answered beside each other."""

FIGURES = 64
"""Drawn figures that are kept for all sessions."""


def store() -> Store:
    """The store of `CHIPVIZ_HOME`, shared by all sessions."""
    return _store(home_dir())


def inference() -> Inference:
    """The client of the one inference process that all sessions share."""
    return _inference(home_dir(), 1)


def scout() -> Inference:
    """The client of other such processes, for what runs would read.

    Fetching data may take minutes, and nobody should wait for what another person asked for.
    """
    return _inference(home_dir(), SCOUTS)


@st.cache_resource
def _store(home: Path) -> Store:
    return Store(home)


@st.cache_resource
def _inference(home: Path, most: int) -> Inference:
    return Inference(home, most=most)


def drawn_once(key: tuple[Hashable, ...], draw: Callable[[], T]) -> T:
    """What `draw` draws, kept for all sessions that ask for the same of this home folder.

    Drawing is most of the time of a page's rerun, and many people may watch one run.
    """
    return _drawn((str(home_dir()), *key), draw)


@st.cache_resource(max_entries=FIGURES, show_spinner=False)
def _drawn(key: tuple[Hashable, ...], _draw: Callable[[], T]) -> T:  # noqa: ARG001
    return _draw()


def predictions(run_id: str) -> Predictions | None:
    """What the chips of a finished run predicted; None where that is not on disk any more."""
    try:
        return store().folder(run_id).read_predictions()
    except JobError:
        return None


def look() -> Look:
    """The colours of the theme this browser shows."""
    return DARK if st.context.theme.type == "dark" else LIGHT


def requested_run() -> str | None:
    """The run named in the address, checked before anything is made of it."""
    return st.query_params.get("run")


def current_run() -> Job | None:
    """The run in the address, else the last one this session opened, else the newest done.

    Raises:
        ChipvizError: If the address names a run that does not exist.
    """
    wanted = requested_run()
    if wanted:
        store().folder(wanted)
        return store().run(wanted)
    return _remembered() or next((run for run in store().runs() if run.state == "done"), None)


def remember_run(run_id: str) -> None:
    """Keep the run that a page opens, for the pages that follow, and in the address."""
    st.session_state["run"] = run_id
    _write_address({"run": run_id})


def _remembered() -> Job | None:
    run_id = st.session_state.get("run")
    return next((run for run in store().runs() if run.run_id == run_id), None)


def current_cut(report: RunReport) -> Cut:
    """The cut chosen for a run: from the address, else kept, else what rule *within* says."""
    kept = _cuts().get(report.run_id, report.selection[RECOMMENDED].cut)
    return parse_cut(st.query_params.to_dict(), report, kept) or kept


def choose_cut(report: RunReport, cut: Cut) -> None:
    """Keep a cut for this run and show it in the address, where no kind of chip means linear."""
    _cuts()[report.run_id] = cut
    kind = "" if cut.chip.word == "linear" else cut.chip.word
    words = {"cut": str(cut.layer), "pooling": cut.chip.vector.name, "chip": kind}
    _write_address({"run": report.run_id} | words)


def parse_cut(params: Mapping[str, str], report: RunReport, kept: Cut) -> Cut | None:
    """The cut that an address names, with what is missing taken from `kept`. None if there is none.

    A layer or chip that the run does not have counts as not named, and so does a layer that the
    model cannot be cut after.
    """
    text = params.get("cut", "")
    layer = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else -1
    layer_fits = 0 <= layer < report.backbone.n_layers and layer not in report.backbone.no_cut
    chip = _parse_chip(params, report, kept.chip)
    if not layer_fits and chip is None:
        return None
    return Cut(layer if layer_fits else kept.layer, chip or kept.chip)


def _parse_chip(params: Mapping[str, str], report: RunReport, kept: ChipKey) -> ChipKey | None:
    """The chip an address names. None if it names none that the run has."""
    if not {"pooling", "chip"} & set(params):
        return None
    vector = params.get("pooling", kept.vector.name)
    kind = params.get("chip", "linear" if "pooling" in params else kept.word)
    named = (key for key in report.chips if (key.vector.name, key.word) == (vector, kind))
    return next(named, None)


def address() -> dict[str, str]:
    """What a link to another page must carry."""
    keys = ("run", "cut", "pooling", "chip")
    return {key: st.query_params[key] for key in keys if key in st.query_params}


def _cuts() -> dict[str, Cut]:
    return st.session_state.setdefault("cuts", {})


def _write_address(params: Mapping[str, str]) -> None:
    """Merge `params` into the address, an empty one away.

    All at once: each write is a place in the browser's history, and half a cut is another cut.
    """
    now = st.query_params.to_dict()
    wanted = {key: value for key, value in (now | dict(params)).items() if value}
    if wanted != now:
        st.query_params.from_dict(wanted)
